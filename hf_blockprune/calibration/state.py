"""Calibration as parts of an unfinished run: its statistics when they are done, and running sums before."""

from typing import TYPE_CHECKING

from torch import Tensor

from ..runs.resume import RunState
from ..score.statistics import LayerStatistics

if TYPE_CHECKING:
    from ..data.batches import CorruptImages
    from .accumulator import Accumulator

CALIBRATION, RUNNING = "calibration", "calibrating"
PARTS = ("mean", "second_moment", "output_weight", "token_weight", "gradient_moment", "gradient", "block_gradients")
ORIGIN = "origin"


def keep_statistics(run_state: RunState, statistics: dict[str, LayerStatistics], corrupt: list[str]) -> None:
    """Keep what calibration came to.

    Args:
        run_state: of the run.
        statistics: by name of a Linear.
        corrupt: files that cannot be decoded.
    """
    tensors = {
        f"{name}/{part}": value
        for name, s in statistics.items()
        for part in PARTS
        if (value := getattr(s, part)) is not None
    }
    counts = {name: [s.num_tokens, s.num_images] for name, s in statistics.items()}
    values = {"counts": counts, "corrupt": corrupt}
    run_state.write(CALIBRATION, tensors, values, done="calibration", instead_of=(RUNNING,))


def kept_statistics(run_state: RunState) -> tuple[dict[str, LayerStatistics], list[str]] | None:
    """What `keep_statistics` was given; None where an interrupted run did not come so far."""
    stored = run_state.read(CALIBRATION)
    if stored is None:
        return None
    tensors, values = stored
    device = run_state.accelerator.device
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in values["counts"]}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        parts[name][part] = tensor.to(device)
    counts = values["counts"].items()
    found = {name: LayerStatistics(tokens, images, **parts[name]) for name, (tokens, images) in counts}
    return found, values["corrupt"]


class RunningSums:
    """The sums of one process, kept now and then in the middle of calibration.

    Each process keeps its own: adding them up in the middle would round otherwise than at the end.

    Args:
        run_state: of the run, None where nothing is kept.
        accumulators: by name of a Linear.
        corrupt: counts images that cannot be decoded.
        batches: how many there are for a process, None where nobody knows.
    """

    def __init__(
        self,
        run_state: RunState | None,
        accumulators: "dict[str, Accumulator]",
        corrupt: "CorruptImages",
        batches: int | None,
    ) -> None:
        self.run_state, self.accumulators, self.corrupt, self.batches = run_state, accumulators, corrupt, batches

    @property
    def _part(self) -> str:
        assert self.run_state is not None
        processes = self.run_state.accelerator
        return f"{RUNNING}-{processes.process_index}-of-{processes.num_processes}"

    def restore(self) -> int:
        """Give the accumulators the sums that an interrupted run left; how many batches they hold."""
        stored = None if self.run_state is None else self.run_state.read(self._part)
        if stored is None:
            return 0
        tensors, values = stored
        for name, accumulator in self.accumulators.items():
            accumulator.num_tokens, accumulator.num_images = values["counts"][name]
            for key in list(accumulator.sums):
                accumulator.sums[key] = tensors[f"{name}/{key}"].to(accumulator.sums[key].device)
            origin = tensors.get(f"{name}/{ORIGIN}")
            accumulator.origin = None if origin is None else origin.to(accumulator.linear.weight.device)
        self.corrupt.files, self.corrupt.seen, self.corrupt.reason = values["corrupt"]
        return values["batches"]

    def save_if_due(self, batches: int) -> None:
        """Keep the sums over so many batches, if it is time to."""
        if self.run_state is None or not self.run_state.due():
            return
        tensors: dict[str, Tensor] = {}
        for name, accumulator in self.accumulators.items():
            tensors |= {f"{name}/{key}": value for key, value in accumulator.sums.items()}
            if accumulator.origin is not None:
                tensors[f"{name}/{ORIGIN}"] = accumulator.origin
        counts = {name: (a.num_tokens, a.num_images) for name, a in self.accumulators.items()}
        corrupt = (self.corrupt.files, self.corrupt.seen, self.corrupt.reason)
        values = {"batches": batches, "counts": counts, "corrupt": corrupt}
        done = f"calibration, batch {batches}" + (f" of {self.batches}" if self.batches else "")
        self.run_state.write(self._part, tensors, values, done=done, own=True)
