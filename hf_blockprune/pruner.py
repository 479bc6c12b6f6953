"""`BlockPruner`: load a dense vision transformer, prune it, measure it, save it."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from . import checkpoint, measurements
from .card import card_digest, model_card
from .config import BlockPruneConfig, RecoveryConfig
from .copying import copied
from .data import load_images
from .display import planned
from .errors import CheckpointError, ModelError
from .evaluation import EVALUATION_SPLITS, Outputs, Predictions, need_labels, predict, summarise
from .fidelity import Embeddings, Fidelity, compare, embed
from .hub.blockprune_quantizer import block_sparse_layers
from .inspection import describe_checkpoint, open_checkpoint
from .latency import measure_latency
from .loading import load_model
from .measured import MeasuredFidelity, MeasuredLatency, MeasuredScores, Measurement
from .model_input import picture_size, shared_picture_size
from .outputs import classifies
from .progress import Progress, weights_fingerprint
from .pruning import Pruning
from .publish import upload_checkpoint
from .recovery import Recovery, recover, recovery_stages
from .recovery_state import recovery_job
from .report import PruneReport, RecoveryReport, Report
from .residual import permute_stream
from .shared_statistics import SharedStatistics
from .simulation import predict_checkpoint
from .skeleton import skeleton
from .structure import find_residual_stream
from .unwrapping import plain_model

if TYPE_CHECKING:
    from accelerate import Accelerator
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel

    from .finetune_config import FinetuneConfig

logger = logging.get_logger(__name__)
MEASURED: dict[str, type[Measurement]] = {
    "evaluation": MeasuredScores,
    "fidelity": MeasuredFidelity,
    "latency": MeasuredLatency,
}
BASELINE, EVALUATION = "evaluation of the other model", "evaluation"  # stages that are shown


def evaluation_stages(against: Any) -> list[str]:
    """The stages of `BlockPruner.evaluate` that are shown."""
    answers = against is None or isinstance(against, (Predictions, Outputs, Embeddings))
    return [EVALUATION] if answers else [BASELINE, EVALUATION]


class BlockPruner:
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

    def __init__(
        self,
        model: "PreTrainedModel",
        processor: Any,
        config: BlockPruneConfig | None = None,
        *,
        name: str = "model",
        accelerator: "Accelerator | None" = None,
    ) -> None:
        self.model = plain_model(model)
        self.processor = processor
        self.config = config or BlockPruneConfig()
        self.name = name
        self._accelerator = accelerator
        self._report: Report | None = None
        self._reload_dense: Callable[[], BlockPruner] | None = None
        self._measured_weights: str | None = None  # of the model that the report's measurements are of
        self._stored: tuple[Path, str] | None = None  # the folder that holds those weights, and its fingerprint

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        config: BlockPruneConfig | None = None,
        *,
        accelerator: "Accelerator | None" = None,
        model_class: type | None = None,
        **kwargs: Any,
    ) -> "BlockPruner":
        """Load a classifier or an encoder of images, and its image processor, from the Hub or a folder.

        Args:
            name_or_path: a Hub name such as "facebook/deit-base-patch16-224", or a folder; also of a pruned model, to
                recover or evaluate it.
            config: how to prune; of a pruned model, by default the one it was pruned with.
            accelerator: device and processes.
            model_class: a model class of transformers, for checkpoints of which a part is wanted, such as
                `CLIPVisionModelWithProjection` of a CLIP; by default the one that the checkpoint was saved from.
            **kwargs: passed to transformers' `from_pretrained` (revision, token, cache_dir, ...).

        Raises:
            ModelError: nothing is there, it neither classifies nor encodes images, or it lacks trained weights.
            CheckpointError: the files are damaged.
            ConfigError: the stored settings are none.
            BlockSparseFormatError: a block-sparse checkpoint's config and tensors disagree.
        """
        model, processor = load_model(str(name_or_path), kwargs, model_class)
        # Only the folder's name of a local path belongs into reports that may be published.
        path = Path(name_or_path).expanduser()
        name = path.resolve().name if path.exists() else str(name_or_path)
        pruner = cls(model, processor, config, name=name, accelerator=accelerator)
        if next(block_sparse_layers(model), None):
            file = checkpoint.report_file(str(name_or_path), kwargs)
            if file is not None:
                pruner._read_report(file, local=path.is_dir(), config=config)
        else:
            pruner._reload_dense = lambda: cls.from_pretrained(
                name_or_path, accelerator=accelerator, model_class=model_class, **kwargs
            )
        return pruner

    def _read_report(self, file: Path, *, local: bool, config: BlockPruneConfig | None) -> None:
        """Take the report beside a model that was loaded, and what it says was measured, where that is of its weights.

        Args:
            file: the report.
            local: whether it lies in a folder of the user's, where more that is measured may be kept.
            config: how to prune, None for what the report says.
        """
        stored = checkpoint.read_report(file)
        assert stored is not None
        self.config = config or BlockPruneConfig.from_dict(stored.config)
        self._report = stored
        weights = measurements.files_fingerprint(file.parent)
        if measurements.drop_stale(stored.measured, weights):
            logger.warning(f"{file}: what was measured is of other weights than those beside it, and is left out")
        self._measured_weights = weights_fingerprint(self.model)
        if local and weights is not None:
            self._stored = (file.parent, weights)

    @cached_property
    def accelerator(self) -> "Accelerator":
        from accelerate import Accelerator

        return self._accelerator or Accelerator()

    def prune(
        self,
        dataset: Any = None,
        *,
        split: str | None = None,
        work_dir: str | Path | None = None,
        shared: SharedStatistics | None = None,
    ) -> "PreTrainedModel":
        """Remove blocks until the budget is met, and store the rest block-sparse.

        Args:
            dataset: calibration images: a folder, files, a Hub name, a `datasets` object, or a `DataSource` that says
                how to read them. `taylor` uses labels where there are any, `magnitude` without refit needs no images.
            split: split of the data set; "train" by default.
            work_dir: a folder that keeps the state of the run: calibration, and what was chosen and refitted since. A
                run that was interrupted goes on from there when it is started again with the same folder, with the
                same result.
            shared: one for several runs on the same dense model, which then calibrate together where they can.

        Returns:
            The pruned transformers model, which is `self.model`.

        Raises:
            ModelError: no target Linears, or the model is pruned already.
            ConfigError: the config does not fit the model.
            DataError: the images cannot be used.
            BudgetError: no mask meets the budget.
            CheckpointError: `work_dir` holds the state of another run, or cannot be written.
        """
        if next(block_sparse_layers(self.model), None):
            raise ModelError(f"{self.name} is block-sparse already; prune the dense model it was made from")
        shared = shared or SharedStatistics()
        self._report = Pruning(self.model, self.processor, self.config, self.name, self.accelerator, shared).run(
            dataset, split, work_dir
        )
        return self.model

    def recover(
        self,
        dataset: Any,
        *,
        teacher: "str | Path | BlockPruner | None" = None,
        split: str | None = None,
        work_dir: str | Path | None = None,
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

        Returns:
            The recovered model, which is `self.model`.

        Raises:
            ModelError: the model is not pruned, the teacher is missing or another model, or the loss is not finite.
            CheckpointError: the report beside the model was made for another dense model; or `work_dir` holds the state
                of another run, or cannot be written.
            DataError: the images cannot be used.
        """
        if not next(block_sparse_layers(self.model), None):
            raise ModelError(f"{self.name} has no block-sparse layers to recover; call prune() first")
        settings, seed = self.config.recovery or RecoveryConfig(), self.config.calibration.seed
        dense = self._teacher(teacher)
        images = load_images(dataset, split=split, labels=False).fitted(self.model, self.processor)
        images = images.sample(settings.samples, seed)
        self.model.to(self.accelerator.device)
        teaching = self._in_same_order(dense.model)
        progress = None
        if work_dir is not None:
            job = recovery_job(self.model, teaching, settings, images, seed)
            progress = Progress(Path(work_dir), job, self.accelerator)
        with planned(recovery_stages(settings)):
            result = recover(
                self.model,
                teaching,
                images,
                self.processor,
                settings,
                accelerator=self.accelerator,
                seed=seed,
                progress=progress,
            )
        if self._report is not None:
            _describe_recovery(self._report, result, settings, images.public_name)
        return self.model

    def finetune(
        self,
        dataset: Any,
        settings: "FinetuneConfig | None" = None,
        *,
        teacher: "str | Path | BlockPruner | None" = None,
        split: str | None = None,
        evaluation: Any = None,
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
            ModelError: the model is not pruned, the teacher is missing or another model, or the loss is not finite.
            ConfigError: the settings do not fit the model or the accelerator.
            DataError: the images or labels cannot be used.
            BudgetError: `settings.gradual` asks for what no masks meet.
            CheckpointError: `work_dir` holds the state of another run, or cannot be written.
        """
        from .finetune import Finetuning
        from .finetune_config import FinetuneConfig
        from .finetune_report import with_finetuning

        settings = settings or FinetuneConfig()
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

    def _teacher(self, teacher: "str | Path | BlockPruner | None") -> "BlockPruner":
        if isinstance(teacher, BlockPruner):
            return teacher
        if teacher is not None:
            return BlockPruner.from_pretrained(teacher, accelerator=self.accelerator)
        if self._reload_dense is None:
            raise ModelError(f"{self.name}: name the dense model it was pruned from as teacher")
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
            raise CheckpointError(
                f"{self.name}: its report orders {len(order)} features, the dense model has {width}; "
                "name the dense model it was pruned from as teacher"
            )
        dense = copied(dense)
        permute_stream(dense, stream, torch.tensor(order))
        return dense

    def report(self) -> PruneReport:
        """What was removed, layer by layer, with the settings, timings and accuracy so far.

        A dictionary of plain values, made anew at every call, which is also what `blockprune_report.json` holds;
        `rich.print(pruner.report())` shows it as tables.

        Raises:
            ModelError: nothing was pruned yet.
        """
        return PruneReport(self._made().to_dict())

    def _made(self) -> Report:
        if self._report is None:
            raise ModelError("nothing to report: call prune() first")
        return self._report

    def evaluate(
        self,
        dataset: Any,
        *,
        against: "str | Path | BlockPruner | Predictions | Outputs | Embeddings | None" = None,
        split: str | None = None,
        batch_size: int = 32,
    ) -> Any:
        """How good the model is at its task, and the paired change against another model.

        Top-1 and top-5 accuracy where it chooses one class; mean average precision and F1 where an image has several
        labels; R2 and mean squared error where it predicts numbers (see `problem_type` of transformers' configs); how
        close its embeddings are to the other model's where it is an encoder.

        Args:
            dataset: images, named as for `prune`; labelled ones, but for an encoder.
            against: a name, folder or `BlockPruner` to compare with image by image, such as the dense model; or its
                `predictions`, where it is compared with several times.
            split: split of the data set; "validation" or "test" by default.
            batch_size: images in one pass on each process.

        Returns:
            An `Evaluation`, `MultiLabelEvaluation`, `RegressionEvaluation` or `Fidelity`, by the task.

        Raises:
            DataError: images that are missing, unlabelled, corrupt past 1 %, or with labels that do not fit the model.
            ModelError: the other model cannot be loaded, or that of an encoder is missing or another one.
        """
        if not self._classifies():
            return self._fidelity(dataset, against, split, batch_size)
        if isinstance(against, Embeddings):
            raise ModelError(f"{self.name} gives scores of classes, which do not compare with embeddings")
        images = load_images(dataset, split=split, prefer_splits=EVALUATION_SPLITS)
        options = {"accelerator": self.accelerator, "batch_size": batch_size}
        need_labels(images)
        fitted = images.fitted(self.model, self.processor)
        other: Any = against
        baseline = against if isinstance(against, (Predictions, Outputs)) else None
        with planned(evaluation_stages(against)):
            if against is not None and not isinstance(against, (Predictions, Outputs)):
                other = self._other(against)
                asked = images.fitted(other.model, other.processor)
                baseline = predict(other.model, asked, other.processor, name=BASELINE, **options)
            found = predict(self.model, fitted, self.processor, name=EVALUATION, **options)
        result = replace(summarise(found, baseline), left_out=list(images.left_out) or None)
        # The report compares with the dense model; what another pruned one is better or worse by is no part of it.
        kept = result if other is None or _is_dense(other) else replace(summarise(found), left_out=result.left_out)
        where = {"dataset": images.public_name, "split": images.split, "batch_size": batch_size}
        self._measured("evaluation", {**where, **_named(other), **kept.to_dict()})
        return result

    def _other(self, against: "str | Path | BlockPruner") -> "BlockPruner":
        return against if isinstance(against, BlockPruner) else BlockPruner.from_pretrained(against)

    def _measured(self, kind: str, values: dict[str, Any]) -> dict[str, Any]:
        """Values with time and place, which go into the report; older ones leave it where the weights changed."""
        values = measurements.stamped(values, self.model)
        if self._report is not None:
            self._forget_others()
            measurements.add(self._report.measured, kind, MEASURED[kind].from_dict(values))
        return values

    def _forget_others(self) -> None:
        """Take what was measured of other weights than the model's out of its report: somebody may have trained it."""
        current = weights_fingerprint(self.model)
        if self._report is not None and current != self._measured_weights:
            if measurements.drop(self._report.measured):
                logger.warning(f"{self.name}: its weights changed since they were measured; older results are left out")
            self._stored = None
        self._measured_weights = current

    def _classifies(self) -> bool:
        return classifies(self.model, self.processor.to_dict())

    def _fidelity(self, dataset: Any, against: Any, split: str | None, batch_size: int) -> Fidelity:
        if against is None or isinstance(against, (Predictions, Outputs)):
            raise ModelError(
                f"{self.name} is an encoder, which has no accuracy; name the dense model to compare embeddings with "
                "(against=, --against)"
            )
        options = {"split": split, "batch_size": batch_size}
        wanted = against
        with planned(evaluation_stages(against)):
            if not isinstance(against, Embeddings):
                against = self._other(against)
                wanted = against._embeddings(dataset, BASELINE, **options)
            have = self._embeddings(dataset, EVALUATION, **options)
        result = compare(have, wanted)
        if _is_dense(against):
            where = {"dataset": have.dataset, "split": have.split, "batch_size": batch_size}
            self._measured("fidelity", {**where, **_named(against), **result.to_dict()})
        return result

    def embeddings(self, dataset: Any, *, split: str | None = None, batch_size: int = 32) -> Embeddings:
        """An encoder's embeddings of images, for `evaluate` of others to compare with; arguments are its.

        Raises:
            ModelError: the model is a classifier.
            DataError: the images cannot be used.
        """
        if self._classifies():
            raise ModelError(f"{self.name} is a classifier; its answers are predictions()")
        return self._embeddings(dataset, EVALUATION, split=split, batch_size=batch_size)

    def _embeddings(self, dataset: Any, name: str, *, split: str | None, batch_size: int) -> Embeddings:
        images = load_images(dataset, split=split, prefer_splits=EVALUATION_SPLITS, labels=False)
        images = images.fitted(self.model, self.processor)
        options = {"accelerator": self.accelerator, "batch_size": batch_size, "name": name}
        return embed(self.model, images, self.processor, **options)

    def predictions(self, dataset: Any, *, split: str | None = None, batch_size: int = 32) -> "Predictions | Outputs":
        """The model's answers on labelled images, for `evaluate` of others to compare with; arguments are its."""
        images = load_images(dataset, split=split, prefer_splits=EVALUATION_SPLITS).fitted(self.model, self.processor)
        return predict(self.model, images, self.processor, accelerator=self.accelerator, batch_size=batch_size)

    def benchmark(
        self,
        *,
        against: "str | Path | BlockPruner | None" = None,
        batch_sizes: tuple[int, ...] = (1,),
        seconds: float = 10.0,
    ) -> dict[str, Any]:
        """Time the pruned and the dense model on this device, by turns; the result goes into report and card too.

        Args:
            against: the dense model: a name, folder or `BlockPruner`; by default the pruned one with zeros for what was
                removed, which takes as long.
            batch_sizes: images in one pass.
            seconds: about how long to measure each batch size.

        Returns:
            See `measure_latency`.

        Raises:
            ModelError: the model is not pruned, or the other one cannot be loaded or takes pictures of another size.
        """
        if not next(block_sparse_layers(self.model), None):
            raise ModelError(f"{self.name} has no block-sparse layers to measure; call prune() first")
        other = None if against is None else self._other(against)
        size = picture_size(self.model, self.processor) if other is None else shared_picture_size(self, other)
        self.model.to(self.accelerator.device)
        values = measure_latency(
            self.model,
            None if other is None else other.model,
            image_size=size,
            batch_sizes=batch_sizes,
            seconds=seconds,
        )
        return self._measured("latency", {**_named(other), **values}) if _is_dense(other) else values

    def save_measurements(self, directory: str | Path | None = None) -> bool:
        """Keep what was measured with the saved model: in its report and its card, both or neither.

        `evaluate` and `benchmark` measure; `save_pretrained` keeps their results too. This is for a model that is saved
        already. Results of other data sets, processors, threads, dtypes and batch sizes that the folder has stay beside
        the new ones; an older one of the same is replaced. A card that somebody edited stays as it is.

        Args:
            directory: folder with the same weights; by default where the model was loaded from or saved to.

        Returns:
            Whether there was something to keep and a folder for it: there is none for dense models, for those from the
            Hub, and for those without a report.

        Raises:
            CheckpointError: the folder's weights are not those that were measured, or it cannot be written.
        """
        if self._report is None or not measurements.any_held(self._report.measured):
            return False
        found = self._stored
        self._forget_others()
        if directory is None and found is None:
            return False
        if self._stored is None:
            raise CheckpointError(
                f"{directory or (found and found[0])}: holds other weights than the model, which was changed or never "
                "saved; use save_pretrained()"
            )
        folder = self._stored[0] if directory is None else Path(directory).expanduser()
        if self.accelerator.is_main_process:
            self._report = measurements.save(folder, self._report.measured, self._stored[1])
        self.accelerator.wait_for_everyone()
        return True

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False, repo_id: str | None = None) -> None:
        """Write the block-sparse model with everything that loads and explains it; whole or not at all.

        Args:
            directory: a folder that does not exist yet, or an older checkpoint with `overwrite`.
            overwrite: replace an older checkpoint, once the new one is complete.
            repo_id: the name in the card's example; the folder's name by default.

        Raises:
            ModelError: nothing was pruned yet.
            CheckpointError: the folder exists, or cannot be written.
        """
        report = self._made()
        if self.accelerator.is_main_process:
            with checkpoint.staged_directory(directory, overwrite=overwrite) as folder:
                self._write(folder, report, repo_id or Path(directory).expanduser().resolve().name)
            assert report.measured.weights_sha256 is not None  # _write saw to it
            self._stored = (Path(directory).expanduser(), report.measured.weights_sha256)
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path, report: Report, repo_id: str) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        stored = open_checkpoint(folder, skeleton(self.model))
        values = describe_checkpoint(stored)
        report.size_bytes, report.dense_size_bytes = values["size_bytes"], values["dense_size_bytes"]
        report.predicted = predict_checkpoint(stored)
        self._forget_others()
        report.measured.weights_sha256 = measurements.files_fingerprint(folder)
        self.config.save(folder / checkpoint.RECIPE_FILE)
        card = model_card(report, repo_id)
        report.card_sha256 = card_digest(card.text)
        checkpoint.write_json(folder / checkpoint.REPORT_FILE, report.to_dict())
        card.save(folder / checkpoint.CARD_FILE)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload block-sparse model",
    ) -> "CommitInfo | None":
        """Save to a temporary folder and upload that; see `upload_checkpoint`. Of several processes the first one does.

        Returns:
            The commit, with the pull request where one was asked for; None on the other processes.

        Raises:
            ModelError: nothing was pruned yet.
            HubError: the Hub refused, or cannot be reached.
        """
        options = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
        report = self._made()
        commit = None
        if self.accelerator.is_main_process:
            with tempfile.TemporaryDirectory() as parent:
                folder = Path(parent) / "checkpoint"
                folder.mkdir()
                self._write(folder, report, repo_id)
                commit = upload_checkpoint(folder, repo_id, commit_message=commit_message, **options)
        self.accelerator.wait_for_everyone()
        return commit


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


def _is_dense(other: Any) -> bool:
    """Whether what a model was compared with is no pruned one; of mere answers nobody knows, and they are believed."""
    return not (isinstance(other, BlockPruner) and any(block_sparse_layers(other.model)))


def _named(other: Any) -> dict[str, str]:
    """The name of what a model was compared with, where it has one and is dense."""
    return {"against": other.name} if isinstance(other, BlockPruner) and _is_dense(other) else {}
