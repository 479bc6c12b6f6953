"""Changes of a model's parameters in place, each of which can be undone to the last bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class _Change:
    """`before` is the parameter's old value; without one its features changed places, and go back the other way."""

    parameter: Tensor
    before: Tensor | None
    axis: int = 0
    order: Tensor | None = None


@dataclass
class Changes:
    """Makes changes and notes how to undo them.

    Features that change places take no memory: the other way round is exact. An interruption may come at any moment, so
    the old value is held while a parameter changes.

    Example:
        >>> changes, parameter = Changes(), torch.tensor([1.0, 2.0, 3.0])
        >>> changes.permute(parameter, 0, torch.tensor([2, 0, 1]))
        >>> parameter
        tensor([3., 1., 2.])
        >>> changes.undo()
        >>> parameter
        tensor([1., 2., 3.])
    """

    _made: list[_Change] = field(default_factory=list, init=False)
    _others: list[Callable[[], None]] = field(default_factory=list, init=False)

    def then(self, undo: Callable[[], None]) -> None:
        """Another change is about to be made; this undoes it, and does nothing where it was not made."""
        self._others.append(undo)

    @torch.no_grad()
    def permute(self, parameter: Tensor, axis: int, order: Tensor) -> None:
        """Let feature i be what feature order[i] was.

        Args:
            parameter: any, changed in place.
            axis: of the features.
            order: int64 [features].
        """
        order = order.to(parameter.device)
        change = _Change(parameter, parameter.detach().clone(), axis, order)
        self._made.append(change)
        parameter.copy_(parameter.index_select(axis, order))
        change.before = None

    @torch.no_grad()
    def overwrite(self, parameter: Tensor, value: Tensor) -> None:
        """Give a parameter other values; the old ones are held for as long as this object is."""
        self._made.append(_Change(parameter, parameter.detach().clone()))
        parameter.copy_(value)

    @torch.no_grad()
    def undo(self) -> None:
        """Undo all changes, the last one first; those of parameters after the others."""
        while self._others:
            self._others[-1]()
            self._others.pop()
        while self._made:
            change = self._made[-1]
            if change.before is None:
                assert change.order is not None
                change.before = change.parameter.index_select(change.axis, change.order.argsort())
            change.parameter.copy_(change.before)
            self._made.pop()


@contextmanager
def undone_on_failure() -> Iterator[Changes]:
    """Changes that are undone where the block ends with any exception, interruptions included."""
    changes = Changes()
    try:
        yield changes
    except BaseException:
        changes.undo()
        raise
