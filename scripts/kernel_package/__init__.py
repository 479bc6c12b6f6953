"""Block-sparse linear products: y = activation(x W^T + b) + residual, with W stored as its kept blocks."""

from . import layers
from .blockprune_backends import available_backends
from .blockprune_layout import BlockSparseFormatError, PackedWeight, pack, unpack
from .blockprune_ops import block_sparse_linear

__all__ = [
    "BlockSparseFormatError",
    "PackedWeight",
    "available_backends",
    "block_sparse_linear",
    "layers",
    "pack",
    "unpack",
]
