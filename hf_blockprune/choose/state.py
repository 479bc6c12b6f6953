"""The choice of masks as parts of an unfinished run: what took long is kept, all in between is made again from it."""

import torch

from ..calibration.state import CALIBRATION
from ..reorder.state import MOVES, ORDER, ROTATION
from ..runs.resume import KeptParts
from ..score.trace import RemovalTrace

SELECTION = "selection"
TOKENS, TRACE, LOSS = "tokens", "trace", "loss"
# Beginnings of the names of all parts that nobody asks for once the masks are chosen.
UNTIL_SELECTED = (TOKENS, CALIBRATION, f"{MOVES}-", f"{ORDER}-", f"{ROTATION}-", f"{TRACE}-", f"{LOSS}-")


class SelectionState(KeptParts):
    """Keeps what a selection found out, and gives back what an interrupted one had."""

    def trace(self, number: int, name: str, device: torch.device) -> tuple[RemovalTrace, float] | None:
        """(trace, seconds that it took) of a layer, the `number`th time that traces are taken; None where not kept."""
        stored = self.read(f"{TRACE}-{number}-{name}")
        if stored is None:
            return None
        tensors, values = stored
        order, loss = (tensors[key].to(device) for key in ("order", "loss"))
        return RemovalTrace(order, loss, tuple(values["grid"])), values["seconds"]

    def keep_trace(self, number: int, name: str, trace: RemovalTrace, seconds: float) -> None:
        """Keep what `trace` gives back; the process that made the trace does."""
        tensors, values = {"order": trace.order, "loss": trace.loss}, {"grid": trace.grid, "seconds": seconds}
        again = f", round {number + 1}" if number else ""
        self.write(f"{TRACE}-{number}-{name}", tensors, values, f"saliency of {name}{again}", own=True)

    def loss(self, number: int, group: int) -> float | None:
        """The true loss of a group, the `number`th time that they are measured; None where it is not kept."""
        stored = self.read(f"{LOSS}-{number}-{group}")
        return None if stored is None else stored[1]["loss"]

    def keep_loss(self, number: int, group: int, groups: int, loss: float) -> None:
        """Keep what `loss` gives back; the process that measured it does."""
        done = f"true losses, {group + 1} of {groups}"
        self.write(f"{LOSS}-{number}-{group}", {}, {"loss": loss}, done, own=True)
