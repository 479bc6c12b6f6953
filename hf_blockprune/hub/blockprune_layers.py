"""Which modules of a model are block-sparse layers, and what they say of themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .blockprune_linear import BlockSparseLinear


def block_sparse_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every block-sparse layer, also of one made by another copy of this code."""
    for name, module in model.named_modules():
        if type(module).__name__ == BlockSparseLinear.__name__:
            yield name, module


@contextmanager
def packed_states(model: nn.Module) -> Iterator[None]:
    """While it lasts, a model's `state_dict()` has blocks alone, whichever form the weights of its layers have."""
    layers = [layer for _, layer in block_sparse_layers(model)]
    for layer in layers:
        layer.saves_packed = True
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("saves_packed", None)
