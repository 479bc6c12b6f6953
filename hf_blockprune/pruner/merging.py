"""Tokens of a model that is being pruned, which merge before anything is measured of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..calibration.shared import SharedCalibration
from ..choose.state import TOKENS
from ..config import BlockPruneConfig, MoveName
from ..data.batches import ImageSet
from ..display.stages import stage
from ..errors import BlockSparseFormatError, BudgetError, ModelError
from ..hub.blockprune_tokens import TokenSchedule, UnmergeableError, forget_schedule
from ..model.copying import copied
from ..model.merging import Merging
from ..refit.boundary import HELD_BACK_EVERY
from ..reorder.changes import Changes
from ..report.values import TokensReport
from ..runs.resume import KeptParts, RunState
from ..runs.timing import timed
from .tokens import POWERS, TokenChoice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .pruning import Pruning

JUDGED = (HELD_BACK_EVERY, 64)  # one calibration image in so many, and how many at most, judges what was tried
SEARCHED, TRIED = 64, 192  # others, at most: what tokens are looked for on, and what trials fit


class TokensState(KeptParts):
    """Keeps a choice of tokens, and gives back the one of an interrupted run."""

    def found(self, choose: Callable[[], TokensReport]) -> TokensReport:
        """What was chosen before, or is now."""
        stored = self.read(TOKENS)
        if stored is not None:
            return TokensReport.from_dict(stored[1], "the run's state")
        found = choose()
        self.write(TOKENS, {}, found.to_dict(), "the choice of tokens")
        return found


def merge_tokens(
    pruning: "Pruning",
    images: ImageSet | None,
    run_state: RunState | None,
    moves: tuple[MoveName, ...],
    changes: Changes,
    seconds: dict[str, float],
) -> TokensReport | None:
    """Let a model's tokens merge as its config says; None where none do.

    Args:
        pruning: of the model.
        images: to calibrate on.
        run_state: keeps a schedule that had to be found.
        moves: what else may leave.
        changes: undo this too.
        seconds: of each stage; gets one where a schedule had to be found.

    Raises:
        ModelError: the model is of a kind whose tokens cannot merge, or has another number of layers.
        BudgetError: however many merge, the other moves cannot save the rest.
    """
    if pruning.config.tokens == "keep":
        return None
    try:
        merging = merging_of(pruning)
    except UnmergeableError as error:
        raise ModelError(f"{error}; leave tokens out") from None
    if pruning.config.tokens == "auto":
        assert images is not None  # the config was checked
        with timed(seconds, "tokens"):
            found = TokensState(run_state).found(lambda: _chosen(pruning, images, moves, merging))
    else:
        found = TokensReport(leave=list(pruning.config.tokens), patches=merging.patches)
    changes.then(lambda: forget_schedule(pruning.model))
    try:
        merging.set(found.leave)
    except BlockSparseFormatError as error:
        raise ModelError(str(error)) from None
    return found


def _chosen(pruning: "Pruning", images: ImageSet, moves: tuple[MoveName, ...], merging: Merging) -> TokensReport:
    """A schedule that was looked for."""
    with stage("tokens", (len(POWERS) if moves else 0) + 2, unit="shares of the budget") as bar:
        return TokenChoice(
            merging,
            pruning.targets,
            pruning.flops,
            pruning.config,
            pruning.accelerator,
            pruning.pixels(images.beside(*JUDGED, SEARCHED)),
            pruning.pixels(images.every(*JUDGED)),
            (lambda schedule: _trial(pruning, images.beside(*JUDGED, TRIED), moves, schedule)) if moves else None,
        ).choose(bar)


def merging_of(pruning: "Pruning") -> Merging:
    """The tokens of its model.

    Raises:
        UnmergeableError: it is of a kind whose tokens cannot merge.
    """
    return Merging.of(pruning.model, {name: pruning.flops.linear_tokens[name] for name in pruning.targets})


def _trial(
    pruning: "Pruning", images: ImageSet, moves: tuple[MoveName, ...], schedule: TokenSchedule
) -> "PreTrainedModel | None":
    """A copy of the model, pruned by a schedule on few images; None where the budget cannot be met so."""
    config = _rough(pruning.config, moves, schedule)
    trial = replace(pruning, model=copied(pruning.model), config=config, shared=SharedCalibration(), rough=True)
    try:
        trial.run(images, None, None)
    except BudgetError:
        return None
    return trial.model


def _rough(config: BlockPruneConfig, moves: tuple[MoveName, ...], schedule: TokenSchedule) -> BlockPruneConfig:
    """A config that prunes by a schedule of tokens in a fraction of the time, to compare it with others."""
    return config.replace(
        tokens=schedule.leave,
        moves=tuple(move for move in moves if move != "blocks") or moves,
        permute_stream=False if config.permutes else None,
        coupling_rounds=0,
        recovery=None,
    )
