"""The work behind `recipes/finetune.py`: one training from a recipe file and overrides."""

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.folder import check_output
from ..data.batches import ImageSet
from ..display.stages import planned, stage
from ..errors import ConfigError
from ..finetune.config import FinetuneConfig
from ..pruner.measuring import evaluation_stages
from ..pruner.pruner import BlockPruner
from ..runs.unfinished import unfinished_run
from ..settings_file import read_settings
from ..sources.named import Images
from ..types import JsonDict
from .beforehand import check_inputs
from .prune import job_values

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}
PROJECT = "hf_blockprune"


@dataclass(frozen=True)
class FinetuneJob:
    """What to train, on which images, and where to put it.

    Attributes:
        model: Hub name or folder of a pruned model, or of a dense one where `config.gradual` is set.
        output: folder to write.
        dataset: images to learn from; in a recipe what `DataSource.path` can be, or a mapping with its attributes.
        teacher: Hub name or folder of the dense model; where the model is dense itself, that one by default.
        split: of the data set; by default "train".
        evaluation: labelled images that choose the epoch whose weights are kept, or None; written like `dataset`.
        config: epochs, losses, views and rates; see `FinetuneConfig`.
    """

    model: str
    output: str
    dataset: Images
    teacher: str | None = None
    split: str | None = None
    evaluation: Images | ImageSet | None = None
    config: FinetuneConfig = field(default_factory=FinetuneConfig)

    @classmethod
    def read(cls, recipe: str | Path | None, **overrides: object) -> "FinetuneJob":
        """A job from a recipe file and overrides, which win; an override of None leaves the recipe's value.

        A recipe holds the keys of `FinetuneConfig` and any of model, teacher, dataset, split, evaluation and output.
        `dataset_options` and `evaluation_options` are attributes of `DataSource`, which win over those in the recipe.

        Raises:
            ConfigError: unknown or impossible settings, or no model, data set or output anywhere.
        """
        settings = read_settings(recipe) if recipe is not None else {}
        given: JsonDict = {key: value for key, value in overrides.items() if value is not None}
        values = job_values(cls, FinetuneConfig, settings, given)
        if values.get("dataset") is None:
            raise ConfigError("dataset: name images to learn from, on the command line or in the recipe")
        return cls(**values)


def make_accelerator(settings: FinetuneConfig, logs: str | Path) -> "Accelerator":
    """An accelerator with the precision and trackers of settings.

    Args:
        settings: of the training; its `precision` and `trackers` count here.
        logs: folder for trackers that write files; made where they do.

    Raises:
        ConfigError: a tracker is not installed, or the device cannot compute at this precision.
    """
    from accelerate import Accelerator

    for tracker in settings.trackers:
        if not any(importlib.util.find_spec(package) for package in PACKAGES[tracker]):
            raise ConfigError(f"trackers: {tracker} is not installed; pip install {tracker}, or take it out")
    try:
        accelerator = Accelerator(
            mixed_precision=settings.precision, log_with=list(settings.trackers) or None, project_dir=str(logs)
        )
    except ValueError as error:
        raise ConfigError(f"precision: {settings.precision!r} does not work here ({error})") from error
    if settings.trackers:
        accelerator.init_trackers(PROJECT, config=_flat(settings.to_dict()))
    return accelerator


def _flat(values: JsonDict, prefix: str = "") -> dict[str, bool | int | float | str]:
    """Settings as trackers take them: text and numbers by dotted names."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def run_finetune(job: FinetuneJob, *, overwrite: bool = False, resume: bool = False, restart: bool = False) -> JsonDict:
    """Train, evaluate where the job names labelled images, and save.

    Arguments, what is kept, and errors as for `jobs.prune.run_prune`.
    """
    check_output(job.output, overwrite=overwrite)
    gradual = job.config.gradual
    budgets = () if gradual is None else (gradual.budget,)
    _, evaluation = check_inputs(job.model, evaluation=job.evaluation, other=job.teacher, budgets=budgets)
    job = replace(job, evaluation=evaluation)
    evaluation = evaluation_stages(job.teacher) if job.evaluation is not None else []
    with planned(["loading", "training", *evaluation, "saving"]):
        return _run_finetune(job, overwrite=overwrite, resume=resume, restart=restart)


def _run_finetune(job: FinetuneJob, *, overwrite: bool, resume: bool, restart: bool) -> JsonDict:
    output = Path(job.output).expanduser().resolve()
    with unfinished_run(output, resume=resume, restart=restart) as work_dir:
        accelerator = make_accelerator(job.config, output.with_name(f"{output.name}-logs"))
        with stage("loading", aside=True):
            pruner = BlockPruner.from_pretrained(job.model, accelerator=accelerator)
        pruner.finetune(
            job.dataset,
            job.config,
            teacher=job.teacher,
            split=job.split,
            evaluation=job.evaluation,
            work_dir=work_dir,
        )
        if job.evaluation is not None:
            pruner.evaluate(job.evaluation, against=job.teacher)
        with stage("saving", aside=True):
            pruner.save_pretrained(job.output, overwrite=overwrite)
    accelerator.end_training()
    return {"output": job.output, **pruner.report()}
