"""Subclasses that are made while a program runs, and whose objects can be copied and pickled all the same."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import nn

Make: TypeAlias = Callable[[type[nn.Module]], type[nn.Module]]


def subclass(base: type[nn.Module], make: Make, members: Mapping[str, object]) -> type[nn.Module]:
    """A subclass of the same name.

    Args:
        base: a module's class.
        make: gives the subclass of a class, always the same one; found by its name in its module, as pickles need it.
        members: of the subclass.
    """

    def reduce(self: nn.Module, protocol: object) -> tuple[object, ...]:
        """Classes made at run time cannot be found by their name."""
        return _new, (make, base), vars(self)

    own = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (base,), {**own, "__reduce_ex__": reduce, **members})


def _new(make: Make, base: type[nn.Module]) -> nn.Module:
    made = make(base)
    return made.__new__(made)
