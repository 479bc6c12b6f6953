"""Which form of a block-sparse layer's weight is faster: the kept blocks for kernels, or the whole matrix for torch.

Few blocks removed, small layers and processors without kernels leave torch's own product ahead. A layer then holds the
whole matrix as its parameter, with zeros where there is no block. That is decided when a model is loaded or pruned and
when it is moved, without measuring: processes of one machine shall not differ, nor start threads before they fork.
`BLOCKPRUNE_STORAGE` decides instead where it says "packed", for the least memory, or "unpacked".
"""

import os
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .blockprune_backends import beats_dense, wanted_backend
from .blockprune_layout import (
    BackendError,
    BlockSparseFormatError,
    PackedWeight,
    expand_mask,
    grid_shape,
    pack,
    unpack,
)
from .blockprune_reference import LayerArguments

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

VARIABLE, CHOICES = "BLOCKPRUNE_STORAGE", ("auto", "packed", "unpacked")
DEFAULT_TOKENS = 64  # of configs that do not say how large images are
# Elements, too few for torch to start threads: when it fills or copies, and when it looks places up.
PIECE, INDEXED_PIECE = 16384, 2048


def wanted_storage() -> str:
    """What `BLOCKPRUNE_STORAGE` says, "auto" where it is unset or empty.

    Raises:
        BackendError: it is none of `CHOICES`.
    """
    name = os.environ.get(VARIABLE) or "auto"
    if name not in CHOICES:
        raise BackendError(f"{VARIABLE}: unknown storage {name!r}; choose one of {list(CHOICES)}")
    return name


def is_best_packed(layer: LayerArguments, in_features: int, tokens: int) -> bool:
    """Whether a layer is to hold its kept blocks alone, or all of them where kernels beat torch at whole matrices too.

    Args:
        layer: with its weight packed.
        in_features: its inputs.
        tokens: of the smallest input that is expected.

    Raises:
        BackendError: a variable of the environment names no storage, or no backend.
    """
    storage = wanted_storage()
    if storage != "auto":
        return storage == "packed"
    if wanted_backend() != "auto":
        return True  # a backend that is named shall run
    return beats_dense(layer, in_features, tokens)


def least_tokens(config: "PreTrainedConfig") -> int | None:
    """Tokens of one image in the layer of a model that sees fewest; None where its config does not say.

    Args:
        config: of a transformers vision model.

    Example:
        >>> from transformers import SwinConfig, ViTConfig
        >>> least_tokens(ViTConfig()), least_tokens(SwinConfig())
        (196, 49)
    """
    sides = []
    for value in (getattr(config, "image_size", None), getattr(config, "patch_size", None)):
        pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
            return None
        sides.append(pair)
    patches = prod(pixels // patch for pixels, patch in zip(*sides, strict=True))
    stages = getattr(config, "depths", None)  # each takes four neighbours of the one before together
    return max(1, patches // 4 ** (len(stages) - 1 if isinstance(stages, (list, tuple)) and stages else 0))


def unpack_in_pieces(packed: PackedWeight, out_features: int, in_features: int) -> Tensor:
    """`unpack` without threads on a CPU: the process may fork next."""
    _, rows, cols = packed.weight.shape
    if packed.weight.device.type != "cpu":
        return unpack(packed, out_features, in_features)
    grid = grid_shape(out_features, in_features, (rows, cols))
    dense = packed.weight.new_empty(grid[0] * rows, grid[1] * cols)
    for piece in dense.view(-1).split(PIECE):
        piece.zero_()
    blocks = dense.view(grid[0], rows, grid[1], cols).transpose(1, 2)
    for block_row, (start, end) in enumerate(pairwise(packed.crow_indices.tolist())):
        _fill(blocks[block_row], packed.col_indices[start:end], packed.weight[start:end])
    if dense.shape == (out_features, in_features):
        return dense
    whole = dense.new_empty(out_features, in_features)
    for to, row in zip(whole, dense, strict=False):
        to.copy_(row[:in_features])
    return whole


def _fill(row: Tensor, columns: Tensor, kept: Tensor) -> None:
    """Write kept blocks [n, rows, cols] into a block row [block_cols, rows, cols]."""
    rows, cols = kept.shape[1:]
    if rows * cols <= INDEXED_PIECE:
        size = INDEXED_PIECE // (rows * cols)
        for places, blocks in zip(columns.split(size), kept.split(size), strict=True):
            row[places.long()] = blocks
    else:
        size = max(1, PIECE // cols)
        for place, block in zip(columns.tolist(), kept, strict=True):
            for to, part in zip(row[place].split(size), block.split(size), strict=True):
                to.copy_(part)


def kept_blocks(weight: Tensor, mask: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """The kept blocks [nnz_blocks, rows, cols] of a whole matrix.

    Raises:
        BlockSparseFormatError: they are not all that it holds.
    """
    blocks = pack(weight, mask, block_shape).weight
    if blocks.count_nonzero() != weight.count_nonzero():
        raise BlockSparseFormatError(
            "weight: has values other than zero where there is no block, which block-sparse storage cannot hold; "
            "layer.weight.data.mul_(layer.entry_mask()) takes them out"
        )
    return blocks


class _Context(Protocol):
    """What `KeptBlocksLearn` leaves for its backward pass; torch makes it."""

    block_shape: tuple[int, int]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class KeptBlocksLearn(torch.autograd.Function):
    """A weight as it is, the gradient of which is zero outside of the kept blocks."""

    @staticmethod
    def forward(ctx: _Context, weight: Tensor, mask: Tensor, block_shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.block_shape = block_shape
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return grads[0] * expand_mask(mask, grads[0].shape, ctx.block_shape), None, None
