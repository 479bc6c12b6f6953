"""`BlockPruner`: load a dense vision transformer, prune it, measure it, save it."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..calibration.shared import SharedCalibration
from ..checkpoint import measurements
from ..config import RecoveryConfig
from ..data.batches import ImageSet, load_images
from ..display.stages import planned
from ..errors import CheckpointError, ModelError
from ..evaluate.accuracy import EVALUATION_SPLITS
from ..hub.blockprune_config import INT8
from ..hub.blockprune_int8 import NO_GRADIENTS
from ..hub.blockprune_layers import is_int8, is_pruned
from ..hub.blockprune_rounding import quantize
from ..model.copying import copied
from ..model.structure import find_residual_stream
from ..recover.recovery import Recovery, recover, recovery_stages
from ..recover.state import recovery_job
from ..reorder.stream import permute_stream
from ..report.values import RecoveryReport, Report
from ..runs.resume import RunState
from ..sources.named import Images
from .loaded_model import LoadedModel
from .measuring import Measuring
from .other_model import TEACHER, find_other, misfit
from .pruning import Pruning
from .saving import Saving

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..finetune.config import FinetuneConfig


class BlockPruner(Measuring, Saving):
    """Block-structured pruning of a transformers image classifier or encoder after training.

    Args:
        model: the dense model, of transformers; pruned in place. A block-sparse one can be recovered and evaluated, not
            pruned again. What `torch.compile`, `DataParallel`, DDP or accelerate put around it is taken off.
        processor: its image processor.
        config: how to prune.
        name: what to call the model in reports.
        accelerator: device and processes; one is made where none is given.

    Example:
        ```python
        pruner = BlockPruner.from_pretrained("facebook/deit-base-patch16-224", BlockPruneConfig(block_shape=(32, 32)))
        model = pruner.prune("path/to/calibration/images")
        print(pruner.evaluate("path/to/labelled/images", against="facebook/deit-base-patch16-224"))
        pruner.save_pretrained("deit-base-pruned")
        ```
    """

    def prune(
        self,
        dataset: Images | ImageSet | None = None,
        *,
        split: str | None = None,
        work_dir: str | Path | None = None,
        shared: SharedCalibration | None = None,
    ) -> "PreTrainedModel":
        """Remove blocks until the budget is met, and store the rest block-sparse.

        Args:
            dataset: calibration images: a folder, files, a Hub name, a `datasets` object, or a `DataSource` that says
                how to read them. `taylor` uses labels where there are any, `magnitude` without refit needs no images.
            split: split of the data set; "train" by default.
            work_dir: a folder that keeps the state of the run: calibration, and what was chosen and refitted since. A
                run that was interrupted goes on from there when it is started again with the same folder, with the
                same result.
            shared: one for several runs on the same dense model, and for `recover` after them, which then read images
                and calibrate once where they can.

        Returns:
            The pruned transformers model, which is `self.model`.

        Raises:
            ModelError: no target Linears, or the model is pruned already.
            ConfigError: the config does not fit the model.
            DataError: the images cannot be used.
            BudgetError: no mask meets the budget.
            CheckpointError: `work_dir` holds the state of another run, or cannot be written.
        """
        if is_pruned(self.model):
            raise ModelError(f"{self.name} is block-sparse already; prune the dense model it was made from")
        shared = shared or SharedCalibration()
        self._report = Pruning(self.model, self.processor, self.config, self.name, self.accelerator, shared).run(
            dataset, split, work_dir
        )
        return self.model

    def quantize(self) -> "PreTrainedModel":
        """Round the pruned layers' weights to int8, a scale for each output; for inference, after all training.

        Activations are rounded too, by token, as they come: no calibration is needed. Layers of which all blocks are
        kept are rounded as well; what is not block-sparse (patch embedding, norms, classifier) stays as it is.

        Returns:
            The model in int8, which is `self.model`.

        Raises:
            ModelError: nothing was pruned yet.
            BlockSparseFormatError: a weight is not finite.
        """
        if not is_pruned(self.model):
            raise ModelError(f"{self.name} has no block-sparse layers to quantize; call prune() first")
        quantize(self.model)
        if self._report is not None and self._report.dtype != INT8:
            self._report.dtype = INT8
            measurements.drop(self._report.measured)  # it was of other weights
        return self.model

    def recover(
        self,
        dataset: Images | ImageSet,
        *,
        teacher: "str | Path | BlockPruner | None" = None,
        split: str | None = None,
        work_dir: str | Path | None = None,
        shared: SharedCalibration | None = None,
    ) -> "PreTrainedModel":
        """Train a pruned model to behave like the dense one, without labels; its masks stay as they are.

        `config.recovery` says how; where it is None, the defaults of `RecoveryConfig` hold. The model changes at the
        end, all at once, and only where images that were not learned from say that it became better.

        Args:
            dataset: calibration images, named as for `prune`.
            teacher: the dense model: a name, a folder or a `BlockPruner`. By default it is loaded again from where
                `from_pretrained` found it; needed where the model was loaded pruned, or was passed in.
            split: split of the data set; "train" by default.
            work_dir: a folder that keeps the state now and then, which may be that of `prune`. A run that was
                interrupted goes on from there when it is started again with the same folder, with the same result.
            shared: the one that `prune` was given, whose images need not be read again.

        Returns:
            The recovered model, which is `self.model`.

        Raises:
            ModelError: the model is not pruned or in int8, the teacher is missing or another model, or the loss is not
                finite.
            CheckpointError: the report beside the model was made for another dense model; or `work_dir` holds the state
                of another run, or cannot be written.
            DataError: the images cannot be used.
        """
        self._check_recovers()
        settings, seed = self.config.recovery or RecoveryConfig(), self.config.calibration.seed
        dense = self._teacher(teacher)
        found = load_images(dataset, split=split, labels=False).fitted(self.model, self.processor)
        images = found.sample(settings.samples, seed)
        if shared is not None:
            images = shared.sample(found, settings.samples, self.processor, self.config.calibration)
        self.model.to(self.accelerator.device)
        teaching = self._in_same_order(dense.model)
        run_state = None
        if work_dir is not None:
            job = recovery_job(self.model, teaching, settings, images, seed)
            run_state = RunState(Path(work_dir), job, self.accelerator)
        with planned(recovery_stages(settings)):
            result = recover(
                self.model,
                teaching,
                images,
                self.processor,
                settings,
                accelerator=self.accelerator,
                seed=seed,
                run_state=run_state,
            )
        if self._report is not None:
            _describe_recovery(self._report, result, settings, images.public_name)
        return self.model

    def finetune(
        self,
        dataset: Images | ImageSet,
        settings: "FinetuneConfig | None" = None,
        *,
        teacher: "str | Path | BlockPruner | None" = None,
        split: str | None = None,
        evaluation: Images | ImageSet | None = None,
        work_dir: str | Path | None = None,
    ) -> "PreTrainedModel":
        """Train a pruned model on images, with labels, a dense model's answers or both; masks stay, or shrink slowly.

        Args:
            dataset: images to learn from, named as for `prune`.
            settings: how; where `settings.gradual` is set the model may be dense.
            teacher: the dense model, named as for `recover`; not needed without distillation.
            split: split of the data set; "train" by default.
            evaluation: labelled images, other ones, that choose which epoch's weights to keep; None keeps the last.
            work_dir: a folder that keeps the state of the run. One that was interrupted goes on from there when it is
                started again with the same folder, with the same result.

        Returns:
            The trained model, which is `self.model`.

        Raises:
            ModelError: the model is not pruned or in int8, the teacher is missing or another model, or the loss is not
                finite.
            ConfigError: the settings do not fit the model or the accelerator.
            DataError: the images or labels cannot be used.
            BudgetError: `settings.gradual` asks for what no masks meet.
            CheckpointError: `work_dir` holds the state of another run, or cannot be written.
        """
        from ..finetune.config import FinetuneConfig
        from ..finetune.report import with_finetuning
        from ..finetune.training import Finetuning

        settings = settings or FinetuneConfig()
        self._check_learns()
        if not self._classifies():
            raise ModelError(f"{self.name} is an encoder, and training needs a classifier; use recover()")
        dense = self._in_same_order(self._teacher(teacher).model) if settings.distillation.needs_teacher else None
        judged = None
        if evaluation is not None:
            judged = load_images(evaluation, prefer_splits=EVALUATION_SPLITS).fitted(self.model, self.processor)
        run = Finetuning(
            self.model,
            self.processor,
            load_images(dataset, split=split, labels=settings.uses_labels).fitted(self.model, self.processor),
            settings,
            self.accelerator,
            teacher=dense,
            evaluation=judged,
            work_dir=work_dir,
        )
        run.run()
        if self._report is None or run.gradual is not None:
            self.config = run.pruning_config(self.config)
        self._report = with_finetuning(self._report, run, self.config, self.name)
        return self.model

    def _check_recovers(self) -> None:
        if not is_pruned(self.model):
            raise ModelError(f"{self.name} has no block-sparse layers to recover; call prune() first")
        self._check_learns()

    def _check_learns(self) -> None:
        """Refuse to train weights in int8.

        Raises:
            ModelError: saying what to do.
        """
        if any(is_int8(layer) for layer in self.model.modules()):
            raise ModelError(f"{self.name}: {NO_GRADIENTS}")

    def _teacher(self, given: "str | Path | BlockPruner | None") -> LoadedModel:
        teacher = find_other(self, given, TEACHER)
        if teacher is not None:
            return teacher.pruner
        if self._reload_dense is None:
            raise misfit(self.name, TEACHER)
        return self._reload_dense()

    def _in_same_order(self, dense: "PreTrainedModel") -> "PreTrainedModel":
        """The dense model with its residual stream in the order of this one's, so that layers' outputs compare."""
        order = None if self._report is None else self._report.residual_order
        stream = find_residual_stream(dense) if order is not None else None
        if order is None or stream is None:
            return dense
        name, axis = next(iter(stream.axes.items()))
        width = dense.get_parameter(name).shape[axis]
        if len(order) != width:
            why = f"has a report that orders {len(order)} features, where this dense model has {width}"
            raise CheckpointError(str(misfit(self.name, TEACHER, why)))
        dense = copied(dense)
        permute_stream(dense, stream, torch.tensor(order))
        return dense


def _describe_recovery(report: Report, result: Recovery, settings: RecoveryConfig, dataset: str) -> None:
    """Write a recovery into a report; what was measured so far was of the model before."""
    report.recovery = RecoveryReport(
        dataset=dataset,
        settings=asdict(settings),
        **asdict(result),
        evaluation_before=report.measured.evaluation,
    )
    measurements.drop(report.measured)
    report.seconds = {**report.seconds, "recovery": round(sum(result.seconds.values()), 3)}
