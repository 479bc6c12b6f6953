"""Recovery as parts of an unfinished run: the best weights after each step, and now and then the step under way."""

from dataclasses import asdict, dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import RecoveryConfig
from ..data.batches import ImageSet
from ..runs.resume import RunState, weights_fingerprint
from ..runs.training_state import moments_of, set_moments
from ..types import JsonDict
from ..version import __version__

BEST, RUNNING = "recovery-best", "recovery-running"
GENERATOR, WEIGHTS, MOMENTS = "generator", "weights/", "moments/"


def recovery_job(
    model: nn.Module, teacher: nn.Module, settings: RecoveryConfig, images: ImageSet, seed: int
) -> JsonDict:
    """All that decides a recovery's result, as JSON-ready values."""
    return {
        "weights": weights_fingerprint(model),
        "teacher": weights_fingerprint(teacher),
        "recovery": asdict(settings),
        "images": images.identity,
        "seed": seed,
        "version": __version__,
    }


@dataclass(frozen=True, order=True)
class Place:
    """Where in a recovery a descent is; later ones of a step compare greater.

    Attributes:
        step: its name.
        layer: number of the layer, 0 where all learn.
    """

    step: str
    layer: int = 0


@dataclass
class RecoveryState:
    """Keeps where a recovery is, and goes on with an interrupted one.

    Args:
        run_state: of the run, None where nothing is kept.
        student: what learns.
        generator: of all random draws.

    Attributes:
        at: the descent that an interrupted run was in; None where there is none to go on with.
    """

    run_state: RunState | None
    student: nn.Module
    generator: torch.Generator
    at: Place | None = field(default=None, init=False)
    _running: tuple[dict[str, Tensor], JsonDict] | None = field(default=None, init=False)
    _began: float = field(default=0.0, init=False)

    def finished(self) -> tuple[dict[str, Tensor], JsonDict] | None:
        """(best weights, values) after the last finished step, as `finish` kept them; the draws go on from there."""
        stored = None if self.run_state is None else self.run_state.read(BEST)
        if stored is None:
            return None
        self.generator.set_state(stored[0].pop(GENERATOR))
        return stored

    def finish(self, best: dict[str, Tensor], values: JsonDict, done: str) -> None:
        """Keep the best weights after a step, and JSON-ready values."""
        if self.run_state is not None:
            tensors = {**best, GENERATOR: self.generator.get_state()}
            self.run_state.write(BEST, tensors, values, done=done, instead_of=(RUNNING,))

    def begin(self, step: str) -> float:
        """Go on with a step's weights where an interrupted run was in it; the seconds that it had spent there."""
        stored = None if self.run_state is None else self.run_state.read(RUNNING)
        self._began, self.at, self._running = perf_counter(), None, None
        if stored is None or stored[1]["step"] != step:
            return 0.0
        self.at, self._running = Place(step, stored[1]["layer"]), stored
        self.student.load_state_dict(_named(stored[0], WEIGHTS))
        self._began -= stored[1]["seconds"]
        return stored[1]["seconds"]

    def passed(self, place: Place) -> bool:
        """Whether an interrupted run had come to the end of a descent, whose weights the student has then."""
        return self.at is not None and place < self.at

    def restore(self, place: Place, optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> int:
        """Give an optimizer what an interrupted run left of it; how many gradient steps of the descent are done."""
        if self._running is None or place != self.at:
            return 0
        tensors, values = self._running
        self._running = None  # as large as the model and its moments
        set_moments(optimizer, parameters, _named(tensors, MOMENTS))
        self.generator.set_state(tensors[GENERATOR])
        return values["done"]

    def save_if_due(
        self, place: Place, done: int, where: str, optimizer: Optimizer, parameters: dict[str, nn.Parameter]
    ) -> None:
        """Keep where a descent is, if it is time to.

        Args:
            place: of the descent.
            done: gradient steps of it that are.
            where: the same for the user.
            optimizer: Adam.
            parameters: what learns, by name.
        """
        if self.run_state is None or not self.run_state.accelerator.is_main_process or not self.run_state.due():
            return
        tensors = {f"{WEIGHTS}{name}": value for name, value in self.student.state_dict().items()}
        tensors |= {f"{MOMENTS}{name}": value for name, value in moments_of(optimizer, parameters).items()}
        tensors[GENERATOR] = self.generator.get_state()
        seconds = perf_counter() - self._began
        values = {"step": place.step, "layer": place.layer, "done": done, "seconds": seconds}
        self.run_state.write(RUNNING, tensors, values, done=where)


def _named(tensors: dict[str, Tensor], begin: str) -> dict[str, Tensor]:
    """Those whose names begin so, without that."""
    return {name.removeprefix(begin): value for name, value in tensors.items() if name.startswith(begin)}
