"""The work behind `blockprune recover`: one recovery from a recipe file and overrides."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ..checkpoint.folder import check_output
from ..config import RecoveryConfig
from ..data.batches import ImageSet
from ..errors import ConfigError
from ..pruner.pruner import BlockPruner
from ..runs.unfinished import unfinished_run
from ..settings_file import read_settings
from ..sources.named import Images
from ..types import JsonDict
from .beforehand import check_inputs
from .prune import PruneJob


@dataclass(frozen=True)
class RecoverJob:
    """What to recover, with which images, and where to put it.

    Attributes:
        model: Hub name or folder of the pruned model.
        teacher: of the dense model that it was pruned from.
        output: folder to write.
        dataset: images to learn from; labels are not read.
        split: of the data set; by default "train".
        evaluation: labelled images to compare the recovered with the dense model on, or None.
        recovery: numbers of images and epochs, and rates; see `RecoveryConfig`.
        seed: of the draw of images and of the steps.
    """

    model: str
    teacher: str
    output: str
    dataset: Images
    split: str | None = None
    evaluation: Images | ImageSet | None = None
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    seed: int = 0

    @classmethod
    def read(
        cls,
        recipe: str | Path | None,
        *,
        model: str | None,
        output: str | None,
        teacher: str | None = None,
        recovery: JsonDict | None = None,
        seed: int | None = None,
        **overrides: object,
    ) -> "RecoverJob":
        """A job from the recipe that a model was pruned with and overrides, which win where they are not None.

        Of the recipe are taken `recovery`, the seed of its calibration, its images, and its model as the teacher.

        Args:
            recipe: YAML or JSON file of a pruning run, None for none.
            model: Hub name or folder of the pruned model.
            output: folder to write.
            teacher: of the dense model, where it is not the recipe's.
            recovery: keys of `RecoveryConfig`, which win over the recipe's.
            seed: of the draw of images and of the steps.
            overrides: as for `PruneJob.read`.

        Raises:
            ConfigError: unknown or impossible settings, or no model, teacher, data set or output.
        """
        settings = read_settings(recipe) if recipe is not None else {}
        given: JsonDict = {key: value for key, value in overrides.items() if value is not None}
        given["recovery"] = {**(settings.get("recovery") or {}), **(recovery or {})}
        if seed is not None:
            given["calibration"] = {**(settings.get("calibration") or {}), "seed": seed}
        named = {
            "model": model,
            "teacher": teacher or settings.get("model"),
            "output": output,
            "dataset": given.get("dataset") or settings.get("dataset"),
        }
        if missing := [key for key, value in named.items() if value is None]:
            where = " or in the recipe" if missing[0] in ("teacher", "dataset") else ""
            raise ConfigError(f"{missing[0]}: name one on the command line{where}")
        read = PruneJob.read(recipe, **{**given, "model": named["teacher"], "output": output})
        return cls(
            model=str(model),
            teacher=read.model,
            output=read.output,
            dataset=cast(Images, read.dataset),  # it is named
            split=read.split,
            evaluation=read.evaluation,
            recovery=read.config.recovery or RecoveryConfig(),
            seed=read.config.calibration.seed,
        )


def run_recover(job: RecoverJob, *, overwrite: bool = False, resume: bool = False, restart: bool = False) -> JsonDict:
    """Recover, evaluate where the job names labelled images, and save.

    Arguments, what is kept, and errors as for `run_prune`.
    """
    check_output(job.output, overwrite=overwrite)
    _, evaluation = check_inputs(job.model, evaluation=job.evaluation, other=job.teacher)
    with unfinished_run(job.output, resume=resume, restart=restart) as work_dir:
        pruner = BlockPruner.from_pretrained(job.model)
        calibration = {**pruner.config.to_dict()["calibration"], "seed": job.seed}
        pruner.config = pruner.config.replace(recovery=job.recovery, calibration=calibration)
        pruner.recover(job.dataset, teacher=job.teacher, split=job.split, work_dir=work_dir)
        if evaluation is not None:
            pruner.evaluate(evaluation, against=job.teacher)
        pruner.save_pretrained(job.output, overwrite=overwrite)
    return {"output": job.output, **pruner.report()}
