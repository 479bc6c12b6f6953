"""Copies of models that may hold what has no copy: a lock, an open file, a tensor that is a result."""

import copy
from types import FunctionType
from typing import Any, TypeVar

from torch import nn

from .errors import ModelError

Module = TypeVar("Module", bound=nn.Module)
NO_COPY = (TypeError, RuntimeError, NotImplementedError, copy.Error)  # what is raised by that which has none

OWN = ("_parameters", "_buffers", "_modules")  # are a copy's own in any case


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


def replaced_forward(module: nn.Module) -> bool:
    """Whether a function that holds a module, which it goes on calling in a copy, stands in place of forward."""
    found = vars(module).get("forward")
    if not isinstance(found, FunctionType):
        return False
    held = [*(found.__defaults__ or ()), *(found.__kwdefaults__ or {}).values()]
    held += [cell.cell_contents for cell in found.__closure__ or ()]
    return any(isinstance(getattr(value, "__self__", value), nn.Module) for value in held)


def deep_copy(model: Module, memo: dict[int, Any]) -> Module:
    """A deep copy; what a module holds that has none is shared with the original.

    Args:
        model: any module.
        memo: what stands for what in the copy, by id, as of `copy.deepcopy`.
    """
    try:
        return copy.deepcopy(model, dict(memo))
    except NO_COPY:
        held = [value for part in model.modules() for name, value in vars(part).items() if name not in OWN]
        # A dictionary, such as that of hooks, is one of its own, so that what is added to one is not in the other.
        shared = {id(value): copy.copy(value) if isinstance(value, dict) else value for value in held}
        return copy.deepcopy(model, memo | {key: shared[key] for key in _without_copy(held, memo)})


def _without_copy(held: list[Any], memo: dict[int, Any]) -> set[int]:
    """Ids of values that cannot be copied."""
    found = set()
    for value in held:
        try:
            copy.deepcopy(value, dict(memo))
        except NO_COPY:
            found.add(id(value))
    return found
