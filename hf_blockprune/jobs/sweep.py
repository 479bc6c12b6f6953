"""One model pruned at every point of a grid of settings, measured, and compared; goes on where it was interrupted."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Literal

from ..budget import Budget
from ..calibration.shared import SharedCalibration
from ..checkpoint.inspection import inspect_checkpoint
from ..config import DEFAULT_BLOCK_SHAPE, BlockPruneConfig
from ..data.batches import ImageSet, load_images
from ..display.stages import part, planned, stage
from ..errors import BlockPruneError, BlockSparseFormatError, ConfigError
from ..evaluate.accuracy import EVALUATION_SPLITS, Outputs, Predictions, summarise
from ..evaluate.frontier import frontier
from ..model.outputs import classifies
from ..model.tasks import SINGLE, task_of
from ..pages.page import sweep_page
from ..pruner.measuring import EVALUATION
from ..pruner.pruner import BlockPruner
from ..runs.environment import environment
from ..runs.interruption import Interrupted
from ..runs.resume import weights_fingerprint
from ..runs.unfinished import discard, kept_in
from ..types import JsonDict
from ..version import __version__
from .beforehand import check_inputs
from .prune import PruneJob, job_stages, prune_and_measure
from .sweep_folder import SweepFolder

FORMAT_VERSION = 1
KEEP = ("all", "frontier", "none")
REPORTED = ("flops_ratio", "linear_flops_ratio", "params_ratio", "density", "size_bytes", "dense_size_bytes")
MEASURED = ("calibration", "evaluation", "recovery", "predicted", "budgets", "seconds")


@dataclass(frozen=True)
class Grid:
    """The settings that a sweep varies; it goes through them with budgets innermost.

    Attributes:
        budgets: what may remain.
        block_shapes: (rows, cols).
        methods: names of `score.methods.METHODS`.
    """

    budgets: tuple[Budget, ...]
    block_shapes: tuple[tuple[int, int], ...] = (DEFAULT_BLOCK_SHAPE,)
    methods: tuple[str, ...] = ("obs",)

    def points(self, config: BlockPruneConfig) -> dict[str, BlockPruneConfig]:
        """The config of each point by its name, which serves as a folder's too.

        Raises:
            ConfigError: the grid is empty, two points are the same, or settings contradict each other.
        """
        found: dict[str, BlockPruneConfig] = {}
        for method, shape, budget in product(self.methods, self.block_shapes, self.budgets):
            name = f"{method}-{shape[0]}x{shape[1]}-{_budget_name(budget)}"
            if name in found:
                raise ConfigError(f"{name}: is twice in the grid; name each method, block shape and budget once")
            found[name] = config.replace(method=method, block_shape=shape, budget=budget)
        if not found:
            raise ConfigError("the grid is empty; name at least one method, one block shape and one budget")
        return found


def _budget_name(budget: Budget) -> str:
    amount = budget.ratio if budget.value is None else budget.value
    where = "" if budget.device is None else f"-{Path(budget.device).stem}-{budget.batch}"
    return re.sub(r"[^\w.-]", "_", f"{budget.metric}-{amount:g}{where}")


def run_sweep(
    job: PruneJob,
    grid: Grid,
    *,
    keep: Literal["all", "frontier", "none"] = "frontier",
    on_point: Callable[[JsonDict], None] | None = None,
    restart: bool = False,
) -> JsonDict:
    """Prune, measure and compare at every point that is not done yet.

    Points on one dense model share what they can: its answers on the labelled images, and calibration where method and,
    for taylor, block shape are the same. After each point `sweep.json` and `sweep.html` in the output are whole and
    up to date.

    Args:
        job: the model, images and settings that all points have in common; `output` is the sweep's folder.
        grid: what varies.
        keep: whose checkpoints stay in `checkpoints/`: of all points, of those that no other beats in accuracy and
            FLOPs, or of none.
        on_point: called with each point as soon as it is done.
        restart: throw away what points that are not done keep of their runs; by default these go on.

    Returns:
        What `sweep.json` holds. A point that failed has the status "failed" and an `error`; it is tried again when the
        sweep is started again.

    Raises:
        ConfigError: the grid or its settings make no sense, or there are no labelled images.
        CheckpointError: the folder holds something else, a sweep with other settings, or cannot be written.
        ModelError, DataError: the model or the images cannot be used at all.
        Interrupted: Ctrl-C or SIGTERM ended it; says what is kept.
    """
    if keep not in KEEP:
        raise ConfigError(f"keep: expected one of {', '.join(KEEP)}, got {keep!r}")
    if job.evaluation is None:
        raise ConfigError("evaluation: a sweep compares accuracies; name labelled images")
    configs = grid.points(job.config)
    folder = SweepFolder(Path(job.output).expanduser().resolve(), list(configs))
    folder.check()
    budgets = [budget for config in configs.values() for budget in (config.budget, config.second_budget)]
    _, evaluation = check_inputs(job.model, evaluation=job.evaluation, budgets=tuple(budgets))
    job = replace(job, evaluation=evaluation)
    if restart:
        folder.discard_unfinished()
    with planned(["loading", EVALUATION]):
        return _open_sweep(job, configs, folder, keep).run(on_point or (lambda point: None))


def _open_sweep(job: PruneJob, configs: dict[str, BlockPruneConfig], folder: SweepFolder, keep: str) -> "_Sweep":
    """The sweep of a job with its dense model, which is loaded once."""
    with stage("loading", aside=True):
        dense = BlockPruner.from_pretrained(job.model)
    if not classifies(dense.model, dense.processor.to_dict()):
        raise ConfigError(f"model: a sweep compares accuracies, and {job.model} is an encoder; prune it once a budget")
    if dense.accelerator.num_processes > 1:
        raise ConfigError("a sweep runs in one process; start it without accelerate launch")
    if (problem := task_of(dense.model.config).problem) != SINGLE:
        raise ConfigError(f"a sweep compares accuracies, the model's task is {problem}; prune point by point")
    return _Sweep(job, configs, dense, folder, keep)


@dataclass
class _Sweep:
    job: PruneJob
    configs: dict[str, BlockPruneConfig]
    dense: BlockPruner
    folder: SweepFolder
    keep: str

    @property
    def evaluation(self) -> ImageSet:
        """The labelled images, which `check_inputs` opened."""
        assert isinstance(self.job.evaluation, ImageSet)
        return self.job.evaluation

    def run(self, on_point: Callable[[JsonDict], None]) -> JsonDict:
        values = self.folder.open({"format_version": FORMAT_VERSION, "settings": self._settings(), "points": []})
        done = {point["name"]: point for point in values["points"] if point["status"] == "done"}
        values["points"] = list(done.values())
        try:
            self._run_missing(values, on_point)
        except KeyboardInterrupt as stop:
            raise Interrupted(self._kept(values), stop) from None
        self._write(values)  # checkpoints may be kept by another rule than before
        if all(point["status"] == "done" for point in values["points"]):
            self.folder.discard_unfinished()
        return values

    def _run_missing(self, values: JsonDict, on_point: Callable[[JsonDict], None]) -> None:
        done = {point["name"] for point in values["points"]}
        if missing := [name for name in self.configs if name not in done]:
            answers, shared = self.dense.predictions(self.evaluation), SharedCalibration()
            values |= {"model": self.dense.name, "dense": summarise(answers).to_dict(), "environment": environment()}
            for number, name in enumerate(missing):
                with self._part(missing, number, answers):
                    values["points"].append(point := self._point(name, answers, shared))
                self._write(values)
                on_point(point)

    def _kept(self, values: JsonDict) -> str:
        """What an interrupted sweep leaves, for the user."""
        done = sum(point["status"] == "done" for point in values["points"])
        begun = [f"of {name} {kept}" for name in self.configs if (kept := kept_in(self.folder.work_dir(name)))]
        return f"kept are {', and '.join([f'{done} of {len(self.configs)} points', *begun])}; the same command goes on"

    def _part(self, missing: list[str], number: int, answers: Predictions | Outputs) -> AbstractContextManager[None]:
        """Show a point's stages; points of one method and block shape take about as long."""
        kinds = [f"{self.configs[name].method} {self.configs[name].block_shape}" for name in missing]
        stages = job_stages(replace(self.job, config=self.configs[missing[number]]), answers)
        return part(
            missing[number],
            ["loading", *stages, "saving"],
            number=number + 1,
            of=len(missing),
            kind=kinds[number],
            ahead=kinds[number + 1 :],
        )

    def _settings(self) -> JsonDict:
        """All that decides the results, as JSON-ready values."""
        calibration, labels = None, any(config.scoring.gradients for config in self.configs.values())
        if self.job.dataset is not None:
            calibration = load_images(self.job.dataset, split=self.job.split, labels=labels).identity
        evaluation = load_images(self.evaluation, prefer_splits=EVALUATION_SPLITS).identity
        return {
            "model": self.dense.name,
            "weights": weights_fingerprint(self.dense.model),
            "calibration": calibration,
            "evaluation": evaluation,
            "points": {name: config.to_dict() for name, config in self.configs.items()},
            "version": __version__,
        }

    def _point(self, name: str, answers: Predictions | Outputs, shared: SharedCalibration) -> JsonDict:
        """Prune, measure and save one point; errors that a user can act on become part of it."""
        config = self.configs[name]
        shape = list(config.block_shape)
        point = {"name": name, "method": config.method, "block_shape": shape, "budget": asdict(config.budget)}
        start = perf_counter()
        try:
            found = self._prune(name, config, answers, shared)
        except (BlockPruneError, BlockSparseFormatError) as error:
            found = {"status": "failed", "error": " ".join(str(error).split())}
        return {**point, **found, "wall_seconds": round(perf_counter() - start, 1)}

    def _prune(
        self, name: str, config: BlockPruneConfig, answers: Predictions | Outputs, shared: SharedCalibration
    ) -> JsonDict:
        with stage("loading", aside=True):
            pruner = BlockPruner.from_pretrained(self.job.model, config, accelerator=self.dense.accelerator)
        job, work_dir = replace(self.job, config=config), self.folder.work_dir(name)
        prune_and_measure(pruner, job, work_dir=work_dir, dense=answers, shared=shared)
        checkpoint = self.folder.checkpoint(name)
        with stage("saving", aside=True):
            pruner.save_pretrained(checkpoint, overwrite=True)
        discard(work_dir)
        report, stored = pruner.report(), inspect_checkpoint(checkpoint)
        return {
            "status": "done",
            **{key: stored[key] for key in REPORTED},
            **{key: report[key] for key in MEASURED},
        }

    def _write(self, values: JsonDict) -> None:
        """Mark the frontier, drop checkpoints that are not to be kept, and write both files."""
        points = [point for point in values["points"] if point["status"] == "done"]
        marks = frontier([(point["flops_ratio"], point["evaluation"]["top1"]) for point in points])
        for point, on_frontier in zip(points, marks, strict=True):
            point["frontier"] = on_frontier
            kept = self.keep == "all" or (self.keep == "frontier" and on_frontier)
            point["checkpoint"] = self.folder.keep(point["name"]) if kept else self.folder.drop(point["name"])
        self.folder.write(values, sweep_page(values))
