"""The choice of masks as parts of an unfinished run: what took long is kept, all in between is made again from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calibration_state import CALIBRATION
from .permutation import Move
from .progress import Progress
from .saliency import RemovalTrace

SELECTION = "selection"
MOVES, ORDER, TRACE, LOSS = "moves", "order", "trace", "loss"
# Beginnings of the names of all parts that nobody asks for once the masks are chosen.
UNTIL_SELECTED = (CALIBRATION, f"{MOVES}-", f"{ORDER}-", f"{TRACE}-", f"{LOSS}-")


@dataclass
class SelectionState:
    """Keeps what a selection decided and found out, and gives back what an interrupted one had.

    Args:
        progress: of the run, None where nothing is kept.
    """

    progress: Progress | None = None

    def moves(self, which: str, choose: Callable[[], list[Move]]) -> list[Move]:
        """Those that were chosen before, or are now."""
        stored = self._read(f"{MOVES}-{which}")
        if stored is not None:
            orders, ends = stored[0], stored[1]["ends"]
            return [Move(tuple(p), consumer, orders[str(i)]) for i, (p, consumer) in enumerate(ends)]
        moves = choose()
        orders = {str(i): move.order for i, move in enumerate(moves)}
        ends = [[list(move.producers), move.consumer] for move in moves]
        self._write(f"{MOVES}-{which}", orders, {"ends": ends}, "permutation")
        return moves

    def order(self, which: str, choose: Callable[[], Tensor]) -> Tensor:
        """The one that was chosen before, or is now."""
        stored = self._read(f"{ORDER}-{which}")
        if stored is not None:
            return stored[0]["order"]
        order = choose()
        self._write(f"{ORDER}-{which}", {"order": order}, {}, "permutation")
        return order

    def trace(self, number: int, name: str, device: torch.device) -> tuple[RemovalTrace, float] | None:
        """(trace, seconds that it took) of a layer, the `number`th time that traces are taken; None where not kept."""
        stored = self._read(f"{TRACE}-{number}-{name}")
        if stored is None:
            return None
        tensors, values = stored
        order, loss = (tensors[key].to(device) for key in ("order", "loss"))
        return RemovalTrace(order, loss, tuple(values["grid"])), values["seconds"]

    def keep_trace(self, number: int, name: str, trace: RemovalTrace, seconds: float) -> None:
        """Keep what `trace` gives back; the process that made the trace does."""
        tensors, values = {"order": trace.order, "loss": trace.loss}, {"grid": trace.grid, "seconds": seconds}
        again = f", round {number + 1}" if number else ""
        self._write(f"{TRACE}-{number}-{name}", tensors, values, f"saliency of {name}{again}", own=True)

    def loss(self, number: int, group: int) -> float | None:
        """The true loss of a group, the `number`th time that they are measured; None where it is not kept."""
        stored = self._read(f"{LOSS}-{number}-{group}")
        return None if stored is None else stored[1]["loss"]

    def keep_loss(self, number: int, group: int, groups: int, loss: float) -> None:
        """Keep what `loss` gives back; the process that measured it does."""
        done = f"true losses, {group + 1} of {groups}"
        self._write(f"{LOSS}-{number}-{group}", {}, {"loss": loss}, done, own=True)

    def _read(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return None if self.progress is None else self.progress.read(part)

    def _write(
        self, part: str, tensors: dict[str, Tensor], values: dict[str, Any], done: str, *, own: bool = False
    ) -> None:
        if self.progress is not None:
            self.progress.write(part, tensors, values, done=done, own=own)
