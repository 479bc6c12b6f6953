"""Copies of models that may hold what has no copy: a lock, an open file, a tensor that is a result."""

from typing import TypeVar

from torch import nn

from ..errors import ModelError
from ..hub.blockprune_skeleton import deep_copy, replaced_forward

Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module) -> Module:
    """A deep copy that runs by itself; what a module holds that has no copy is shared with the original.

    Raises:
        ModelError: a `forward` was put in place of a module's own that would run the original.
    """
    for name, module in model.named_modules():
        if replaced_forward(module):
            raise ModelError(
                f"{name or type(model).__name__}: its forward was replaced by a plain function, which in a copy runs "
                "the original; remove it (del module.forward), or make it a method of the class"
            )
    return deep_copy(model, {})
