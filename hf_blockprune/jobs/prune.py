"""The work behind the command line and the recipes: one job from a recipe file and overrides."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from ..calibration.shared import SharedCalibration
from ..checkpoint.folder import check_output
from ..config import BlockPruneConfig
from ..data.batches import ImageSet
from ..display.stages import planned, stage
from ..errors import ConfigError
from ..evaluate.accuracy import Outputs, Predictions
from ..pruner.measuring import evaluation_stages
from ..pruner.pruner import BlockPruner
from ..pruner.pruning import pruning_stages
from ..recover.recovery import recovery_stages
from ..runs.unfinished import unfinished_run
from ..settings_file import read_settings
from ..sources.named import DataSource, Images
from ..types import JsonDict
from .beforehand import check_inputs


@dataclass(frozen=True)
class PruneJob:
    """What to prune, with which images, and where to put it.

    Attributes:
        model: Hub name or folder of the dense model.
        output: folder to write.
        dataset: calibration images; in a recipe what `DataSource.path` can be, or a mapping with its attributes.
        split: their split; by default "train".
        evaluation: labelled images to compare the pruned with the dense model on, or None; written like `dataset`.
        config: budget, blocks and method; see `BlockPruneConfig`.
    """

    model: str
    output: str
    dataset: Images | None = None
    split: str | None = None
    evaluation: Images | ImageSet | None = None
    config: BlockPruneConfig = field(default_factory=BlockPruneConfig)

    def __post_init__(self) -> None:
        if self.config.recovery is not None and self.dataset is None:
            raise ConfigError("recovery: learns from images; name a dataset, or leave recovery out")

    @classmethod
    def read(cls, recipe: str | Path | None, **overrides: object) -> "PruneJob":
        """A job from a recipe file and overrides, which win; an override of None leaves the recipe's value.

        A recipe holds the keys of `BlockPruneConfig` and any of model, dataset, split, evaluation and output. Overrides
        of calibration settings are merged into the recipe's. A `recover` of True adds recovery with its defaults to a
        recipe without, False takes it out. `dataset_options` and `evaluation_options` are attributes of `DataSource`,
        which win over those in the recipe.

        Raises:
            ConfigError: unknown or impossible settings, or no model or output anywhere.
        """
        settings = read_settings(recipe) if recipe is not None else {}
        given: JsonDict = {key: value for key, value in overrides.items() if value is not None}
        calibration = {**(settings.get("calibration") or {}), **given.pop("calibration", {})}
        if (wanted := given.pop("recover", None)) is not None:
            settings["recovery"] = (settings.get("recovery") or {}) if wanted else None
        if calibration:
            given["calibration"] = calibration
        return cls(**job_values(cls, BlockPruneConfig, settings, given))


def job_values(job: type, config: type, settings: JsonDict, overrides: JsonDict) -> JsonDict:
    """What a job is made from: its own keys, and the config that all others make.

    Args:
        job: a dataclass with `config` among its fields.
        config: the class of that field, with a `from_dict`.
        settings: of a recipe, by key.
        overrides: which win; `dataset_options` and `evaluation_options` are attributes of `DataSource`.

    Raises:
        ConfigError: unknown or impossible settings, or no model or output.
    """
    options = {key: overrides.pop(f"{key}_options", {}) for key in ("dataset", "evaluation")}
    settings = {**settings, **overrides}
    for key in options:
        if settings.get(key) is not None:
            settings[key] = DataSource.of(settings[key], **options[key])
    own = [f.name for f in dataclasses.fields(job) if f.name != "config"]
    made = config.from_dict({key: value for key, value in settings.items() if key not in own})
    for key in ("model", "output"):
        if not isinstance(settings.get(key), str):
            raise ConfigError(f"{key}: name one on the command line or in the recipe")
    return {"config": made, **{key: settings[key] for key in own if key in settings}}


def run_prune(job: PruneJob, *, overwrite: bool = False, resume: bool = False, restart: bool = False) -> JsonDict:
    """Prune, recover where the config says so, evaluate after both where the job names labelled images, and save.

    The state of a run that does not come to its end stays beside the output.

    Args:
        job: what to do.
        overwrite: replace an older checkpoint.
        resume: go on with what an interrupted run left beside the output.
        restart: throw that away and start from the beginning.

    Returns:
        The report, with `output` added.

    Raises:
        CheckpointError: an interrupted run left its state, and neither `resume` nor `restart` says what to do with it;
            or it belongs to another run.
        Interrupted: Ctrl-C or SIGTERM ended it; says what is kept.
    """
    check_output(job.output, overwrite=overwrite)
    budgets = (job.config.budget, job.config.second_budget)
    _, evaluation = check_inputs(job.model, evaluation=job.evaluation, budgets=budgets)
    job = dataclasses.replace(job, evaluation=evaluation)
    with (
        planned(["loading", *job_stages(job, job.model), "saving"]),
        unfinished_run(job.output, resume=resume, restart=restart) as work_dir,
    ):
        with stage("loading", aside=True):
            pruner = BlockPruner.from_pretrained(job.model, job.config)
        prune_and_measure(pruner, job, work_dir=work_dir)
        with stage("saving", aside=True):
            pruner.save_pretrained(job.output, overwrite=overwrite)
    return {"output": job.output, **pruner.report()}


def job_stages(job: PruneJob, against: object) -> list[str]:
    """The stages of `prune_and_measure` that are shown, where it compares with `against`, a model or its answers."""
    evaluation = evaluation_stages(against) if job.evaluation is not None else []
    recovery = [] if job.config.recovery is None else [*recovery_stages(job.config.recovery), *evaluation]
    return [*pruning_stages(job.config), *evaluation, *recovery]


def prune_and_measure(
    pruner: BlockPruner,
    job: PruneJob,
    *,
    work_dir: Path,
    dense: Predictions | Outputs | None = None,
    shared: SharedCalibration | None = None,
) -> None:
    """The steps of a job between loading and saving.

    Args:
        pruner: with the dense model.
        job: what to do.
        work_dir: keeps the state of an unfinished run.
        dense: what the dense model answers on the labelled images; by default it is loaded again and asked.
        shared: calibration of other runs on the same dense model.
    """
    against = job.model if dense is None else dense
    shared = shared or SharedCalibration()
    pruner.prune(job.dataset, split=job.split, work_dir=work_dir, shared=shared)
    if job.evaluation is not None:
        pruner.evaluate(job.evaluation, against=against)
    if job.config.recovery is not None:
        assert job.dataset is not None  # else there were no such job
        pruner.recover(job.dataset, split=job.split, work_dir=work_dir, shared=shared)
        if job.evaluation is not None:
            pruner.evaluate(job.evaluation, against=against)
