"""Which modules of a model are block-sparse layers."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from .blockprune_linear import BlockSparseLinear


def block_sparse_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every block-sparse layer, also of one made by another copy of this code."""
    for name, module in model.named_modules():
        if type(module).__name__ == BlockSparseLinear.__name__:
            yield name, module
