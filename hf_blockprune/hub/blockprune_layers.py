"""Which modules of a model are block-sparse layers, and what they say of themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

from torch import nn

from .blockprune_int8_linear import Int8BlockSparseLinear
from .blockprune_linear import BlockSparseLinear

CLASS_NAMES = (BlockSparseLinear.__name__, Int8BlockSparseLinear.__name__)


def is_block_sparse(module: nn.Module) -> TypeGuard[BlockSparseLinear]:
    """Whether a module is a block-sparse layer, also one of another copy of this code, whose class is another."""
    return type(module).__name__ in CLASS_NAMES


def is_int8(module: nn.Module) -> TypeGuard[Int8BlockSparseLinear]:
    """Whether a module is a block-sparse layer in int8, also one of another copy of this code."""
    return type(module).__name__ == Int8BlockSparseLinear.__name__


def block_sparse_layers(model: nn.Module) -> Iterator[tuple[str, BlockSparseLinear]]:
    """(name, module) of every block-sparse layer, also of one made by another copy of this code."""
    for name, module in model.named_modules():
        if is_block_sparse(module):
            yield name, module


@contextmanager
def packed_states(model: nn.Module) -> Iterator[None]:
    """While it lasts, a model's `state_dict()` has blocks alone, whichever form the weights of its layers have."""
    layers = [layer for _, layer in block_sparse_layers(model)]
    for layer in layers:
        vars(layer)["saves_packed"] = True
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("saves_packed", None)


def is_pruned(model: nn.Module) -> bool:
    """Whether a model has block-sparse layers."""
    return next(block_sparse_layers(model), None) is not None
