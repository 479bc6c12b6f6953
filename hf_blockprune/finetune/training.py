"""Training a pruned model on images: labels, a dense model's answers, or both; masks stay, or shrink on a schedule.

Packed weights hold kept blocks alone, so there is nothing to mask: what was removed is not there to be trained.

Every random draw follows from the seed, the epoch and an image's position, learning rates follow from the step, and a
step's gradient is the mean over all of its images, however many processes share them. So a run that was interrupted
goes on as if it had not been, and any number of processes takes the same steps, but for rounding.
"""

from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import BlockPruneConfig
from ..data.batches import MAX_CORRUPT_SHARE, ImageSet
from ..data.model_input import picture_size
from ..display.stages import Stage, stage
from ..errors import ConfigError, DataError, ModelError
from ..evaluate.accuracy import predict, summarise
from ..hub.blockprune_layers import is_pruned
from ..hub.blockprune_quantizer import block_sparse_layers, choose_storage, pack_weights
from ..hub.blockprune_skeleton import channels_of
from ..model.copying import copied
from ..model.tasks import Regression, missing, task_of
from ..runs.resume import RunState, weights_fingerprint
from ..runs.training_state import weights_of
from ..types import ImageProcessor
from ..version import __version__
from .config import FinetuneConfig
from .gradual import GradualPruning, make_sparse, shrink
from .images import MicroBatch, TrainingImages
from .schedule import LearningRates, PruningSteps
from .student import Student, is_sharded, stored_masks

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE, BEST = "state", "best"  # parts of a run's folder
Module = TypeVar("Module", bound=nn.Module)


@dataclass
class History:
    """What training came to, and where it is; all of it plain values.

    Attributes:
        epoch, step_in_epoch: the epoch that is under way, and its steps that are done.
        step: steps done in all.
        losses: mean loss of each epoch that is done.
        evaluations: {epoch, top1 and top5 or what else measures the task, num_images} of each evaluation.
        best_epoch: after which the kept weights were taken; None where nothing was evaluated, and the last are kept.
        pruning: {step, kept} of each choice of blocks, kept being the share of the dense model's cost.
        loss_sum, seen, missing: of the epoch under way: sum of the losses, images, and those that cannot be decoded.
        skipped: files that cannot be decoded.
        seconds: spent on training, in all runs that it took.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    pruning: list[dict[str, float]] = field(default_factory=list)
    loss_sum: float = 0.0
    seen: int = 0
    missing: int = 0
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Finetuning:
    """One training of a model, which holds the result at the end, and is what is evaluated in between.

    Args:
        model: a transformers image classifier with block-sparse layers, or a dense one where `settings.gradual` is set.
        processor: its image processor.
        images: what to learn from.
        settings: see `FinetuneConfig`.
        accelerator: device, processes and precision.
        teacher: the dense model, where `settings.distillation` asks for one; left as it is.
        evaluation: labelled images, other ones, that choose which epoch's weights to keep; None keeps the last.
        work_dir: a folder that keeps the state of the run. One that was interrupted goes on from there when it is
            started again with the same folder.

    Attributes:
        history: what it came to.
        gradual: what chooses blocks, None where masks stay.

    Raises:
        ModelError: the model is not pruned, or the teacher is missing or another model.
        ConfigError: the settings do not fit the model or the accelerator.
        DataError: the images or labels cannot be used.
    """

    model: PreTrainedModel
    processor: ImageProcessor
    images: ImageSet
    settings: FinetuneConfig
    accelerator: "Accelerator"
    teacher: PreTrainedModel | None = None
    evaluation: ImageSet | None = None
    work_dir: str | Path | None = None
    history: History = field(default_factory=History, init=False)
    gradual: GradualPruning | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.settings.distillation.needs_teacher:
            self.teacher = None
        self._check()
        pack_weights(self.model)  # kept blocks alone are trained, kept and taken out
        settings, device = self.settings, self.accelerator.device
        size = picture_size(self.model, self.processor)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.data = TrainingImages(self.images, self.processor, settings, self.model.config, size, rank, world)
        steps, warmup = settings.epochs * self.data.steps, round(settings.warmup * self.data.steps)
        self.rates = LearningRates(settings.lr, settings.min_lr, settings.warmup_lr, warmup, steps)
        self.run_state = self._open_run_state()
        self.dtype = next(self.model.parameters()).dtype
        _single(self.model.to(device))
        if settings.gradual is not None:
            make_sparse(self.model, settings.gradual)
        self.pruning = self._plan_pruning(steps)
        teacher = None if self.teacher is None else _single(copied(self.teacher).to(device)).eval()
        blank = torch.zeros(1, channels_of(self.model.config, self.model), *size, device=device)
        # A copy trains, which processes may wrap or shard.
        self.student = Student(copied(self.model), teacher, settings, self.accelerator, blank, self.data.task)
        self.best: dict[str, Tensor] | None = None

    def _check(self) -> None:
        """Refuse what cannot work, before anything is changed."""
        settings, classes = self.settings, self.model.config.num_labels
        if settings.gradual is None and not is_pruned(self.model):
            raise ModelError(
                "the model has no block-sparse layers: prune it first, or set gradual to prune it as it trains"
            )
        if settings.gradual is not None and is_sharded(self.accelerator):
            raise ConfigError("gradual: shards of weights do not shrink; launch without FSDP, or prune first")
        if self.accelerator.mixed_precision != settings.precision:
            raise ConfigError(
                f"precision: {settings.precision!r} is not that of the accelerator, "
                f"{self.accelerator.mixed_precision!r}; give both the same"
            )
        if settings.precision != "no" and not self.accelerator.native_amp:
            raise ConfigError(
                f"precision: {settings.precision!r} does not work on this device ({self.accelerator.device.type}); use "
                "bf16 or 'no'"
            )
        if settings.label_weight and self.images.label_column is None:
            raise DataError(
                f"{self.images.name}: has no labels; set label_weight to 0 to learn from the dense model alone"
            )
        if settings.distillation.needs_teacher and self.teacher is None:
            raise ModelError("distillation: name the dense model as teacher, or set distillation.kind to none")
        if isinstance(task_of(self.model.config), Regression):
            self._check_regression()
        if self.teacher is not None and self.teacher.config.num_labels != classes:
            raise ModelError(
                f"the teacher has {self.teacher.config.num_labels} classes, the model {classes}; name the dense model "
                "that it was pruned from"
            )

    def _check_regression(self) -> None:
        distillation = self.settings.distillation
        if distillation.kind == "hard":
            raise ConfigError("distillation.kind: a model that predicts numbers has no likeliest class; use soft")
        if distillation.temperature != 1:
            raise ConfigError("distillation.temperature: a model that predicts numbers has none; leave it out")

    def _open_run_state(self) -> RunState | None:
        if self.work_dir is None:
            return None
        job = {
            "weights": weights_fingerprint(self.model),
            "teacher": None if self.teacher is None else weights_fingerprint(self.teacher),
            "settings": self.settings.result_settings(),
            "images": self.images.identity,
            "evaluation": None if self.evaluation is None else self.evaluation.identity,
            "version": __version__,
        }
        return RunState(Path(self.work_dir), job, self.accelerator)

    def _plan_pruning(self, steps: int) -> PruningSteps | None:
        settings, seed = self.settings.gradual, self.settings.seed
        if settings is None:
            return None
        self.gradual = GradualPruning(self.model, self.processor, self.images, settings, seed, self.accelerator)
        begin, goal = self.gradual.begin_and_goal()
        first, last = round(settings.start * steps), max(1, round(settings.end * steps))
        return PruningSteps(begin, goal, first, last, settings.every)

    def run(self) -> History:
        """Train to the end, from where an interrupted run was.

        Raises:
            ModelError: the loss is not finite.
            DataError: the images or labels cannot be used.
            BudgetError: `settings.gradual` asks for what no masks meet.
            CheckpointError: `work_dir` holds the state of another run, or cannot be written.
        """
        self._restore()
        with stage("training", self.settings.epochs * self.data.steps, initial=self.history.step) as bar:
            while self.history.epoch < self.settings.epochs:
                self._train_epoch(bar)
                done = self.history.epoch
                due = done % self.settings.evaluate_every == 0 or done == self.settings.epochs
                if self.evaluation is not None and due:
                    self._evaluate()
                self._save()
        self.model.load_state_dict(self.student.weights() if self.best is None else self.best)
        self.model.requires_grad_(True)
        if self.dtype != torch.float32:
            self.model.to(self.dtype)  # pyright: ignore[reportArgumentType]  # it is annotated as a function
        choose_storage(self.model)
        return self.history

    def pruning_config(self, config: BlockPruneConfig) -> BlockPruneConfig:
        """What the model is pruned by: the schedule's last choice, or `config` with the block shape that it has."""
        shape = next(module.block_shape for _, module in block_sparse_layers(self.model))
        if self.settings.gradual is None:
            return config.replace(block_shape=shape)
        return self.settings.gradual.pruning(shape, self.settings.gradual.budget)

    def _train_epoch(self, bar: Stage) -> None:
        history = self.history
        start, before = perf_counter(), history.seconds
        for micro_batches in self.data.epoch(history.epoch, history.step_in_epoch):
            figures = self._step(micro_batches)
            bar.advance(epoch=history.epoch + 1, loss=figures["loss"], lr=figures["lr"])
            history.seconds = before + perf_counter() - start
            in_epoch = history.step_in_epoch < self.data.steps
            if in_epoch and self.settings.save_every and history.step % self.settings.save_every == 0:
                self._save()
        self._check_corrupt()
        history.losses.append(history.loss_sum / max(1, history.seen))
        history.epoch, history.step_in_epoch = history.epoch + 1, 0
        history.loss_sum, history.seen, history.missing = 0.0, 0, 0

    def _step(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        """Learn from a batch.

        Returns:
            Its loss and learning rate.
        """
        history, size = self.history, self.settings.batch_size
        for batch in micro_batches:
            self._check_batch(batch)
        images = min(size, self.data.count - history.step_in_epoch * size)
        lr = self.rates.at(history.step)
        total, count = self.student.step(micro_batches, number=history.step, images=images, lr=lr)
        history.step, history.step_in_epoch = history.step + 1, history.step_in_epoch + 1
        history.loss_sum += total
        history.seen += count
        history.missing += images - count
        logged = {"loss": total / max(1, count), "lr": lr}
        self.accelerator.log(logged, step=history.step)
        share = None if self.pruning is None else self.pruning.kept_after(history.step)
        if share is not None:
            self._prune(share)
        return logged

    def _check_batch(self, batch: MicroBatch) -> None:
        self.history.skipped += [file for file in batch["corrupt"] if file not in self.history.skipped]
        if self.settings.label_weight and missing(batch["labels"]).any():
            raise DataError(f"{self.images.name}: some images have no label; remove them, or set label_weight to 0")

    def _prune(self, share: float) -> None:
        assert self.gradual is not None
        self.model.load_state_dict(weights_of(self.student.model))
        masks = self.gradual.choose(share)
        shrink(self.model, masks)
        self.student.shrink(masks)
        account = self.gradual.account()
        self.history.pruning.append({"step": self.history.step, "kept": account["reached"] / account["dense"]})

    def _evaluate(self) -> None:
        """Measure how good it is, and keep the weights where it is the highest so far; not before pruning is done."""
        assert self.evaluation is not None
        history, weights = self.history, self.student.weights()
        self.model.load_state_dict(weights)
        options = {"accelerator": self.accelerator, "batch_size": self.settings.micro_batch}
        found = summarise(predict(self.model, self.evaluation, self.processor, **options))
        values = {"epoch": history.epoch, **found.scores, "num_images": found.num_images}
        best = next((e[found.main] for e in history.evaluations if e["epoch"] == history.best_epoch), float("-inf"))
        history.evaluations.append(values)
        self.accelerator.log(found.scores, step=history.step)
        pruned = self.pruning is None or history.step >= self.pruning.last
        if pruned and found.scores[found.main] > best:
            history.best_epoch, self.best = history.epoch, weights
            if self.run_state is not None:
                self.run_state.write(BEST, weights, {"epoch": history.epoch}, done=self._where())

    def _check_corrupt(self) -> None:
        history, all_images = self.history, self.history.seen + self.history.missing
        self._gather_skipped()
        if history.missing > MAX_CORRUPT_SHARE * all_images:
            raise DataError(
                f"{self.images.name}: {history.missing} of {all_images} images cannot be decoded, more than "
                f"{MAX_CORRUPT_SHARE:.0%}: {', '.join(history.skipped[:5])}; mend or remove them"
            )

    def _gather_skipped(self) -> None:
        from accelerate.utils import gather_object

        self.history.skipped = sorted(set(gather_object(self.history.skipped)))

    def _save(self) -> None:
        """Keep all that going on needs."""
        if self.run_state is None:
            return
        self._gather_skipped()
        scaler = self.accelerator.scaler
        values = {"history": vars(self.history), "scaler": None if scaler is None else scaler.state_dict()}
        self.run_state.write(STATE, self.student.tensors(), values, done=self._where())
        self.accelerator.wait_for_everyone()

    def _where(self) -> str:
        """How far the run is, for the user."""
        steps = self.settings.epochs * self.data.steps
        return f"training, step {self.history.step} of {steps} ({self.history.epoch} of {self.settings.epochs} epochs)"

    def _restore(self) -> None:
        stored = None if self.run_state is None else self.run_state.read(STATE)
        if self.run_state is None or stored is None:
            self.student.wrap()
            return
        tensors, values = stored
        if self.pruning is not None:
            masks = stored_masks(self.model, tensors)
            shrink(self.model, masks)
            shrink(self.student.model, masks)
        self.student.restore(tensors)
        self.history = History(**values["history"])
        if self.accelerator.scaler is not None and values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        if self.history.best_epoch is not None and (best := self.run_state.read(BEST)) is not None:
            self.best = best[0]


def _single(model: Module) -> Module:
    """In single precision and without gradients; transformers refuses to cast what it takes for quantised."""
    nn.Module.float(model)
    model.requires_grad_(False)
    return model
