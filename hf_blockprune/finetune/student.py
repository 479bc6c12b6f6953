"""The copy of a model that trains: what processes wrap, its optimizer and the average of its weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..hub.blockprune_layout import PackedWeight, block_mask
from ..model.layers import layer_lists
from ..model.tasks import Task
from ..runs.training_state import Average, decay_groups, fill, freeze_unused, moments_of, set_moments, weights_of, whole
from .config import FinetuneConfig
from .gradual import masks_of, shrink
from .images import MicroBatch
from .loss import hard_distillation, hidden_distance, label_losses, soft_distillation
from .views import DROPOUT, draws

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin


class Answer(Protocol):
    """What a classifier of transformers gives for a batch.

    Attributes:
        logits: [images, outputs].
        hidden_states: of the embeddings and after each layer, [images, ...]; None where they were not asked for.
    """

    logits: Tensor
    hidden_states: Sequence[Tensor] | None


@dataclass
class Student:
    """A model in training.

    Args:
        model: what trains, in single precision; weights change in place, and layers where blocks leave.
        teacher: the dense model, None where nothing is asked of it.
        settings: learning rates apart, what a step does: AdamW's parameters, losses and their weights, clipping.
        accelerator: device, processes and precision.
        blank: one image, [1, channels, height, width].
        task: what the models' outputs mean.
    """

    model: PreTrainedModel
    teacher: PreTrainedModel | None
    settings: FinetuneConfig
    accelerator: "Accelerator"
    blank: Tensor
    task: Task
    average: Average | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.model.train().requires_grad_(True)
        freeze_unused(self.model, self.blank)

    def wrap(self) -> None:
        """Make the model and an optimizer ready for the processes; the average begins here, if it has not."""
        settings = self.settings
        if is_sharded(self.accelerator):
            self._make_shardable()
        groups = decay_groups(self.model, _trainable(self.model), settings.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.parameters = _trainable(self.model)
        if settings.ema is not None and self.average is None:
            self.average = Average(self.parameters, settings.ema)

    def _make_shardable(self) -> None:
        """Fit model and plugin to each other.

        FSDP shards contiguous weights alone. Left to itself the plugin loads weights from the first process, where all
        hold them, and shards a vision model's embeddings twice.
        """
        plugin: FullyShardedDataParallelPlugin | None = self.accelerator.state.fsdp_plugin
        assert plugin is not None
        plugin.cpu_ram_efficient_loading = False
        if plugin.transformer_cls_names_to_wrap is None:
            layers = [layer for _, part in layer_lists(self.model) for layer in part.children()]
            plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
        for parameter in self.model.parameters():
            parameter.data = parameter.data.contiguous()

    def step(self, micro_batches: list[MicroBatch], *, number: int, images: int, lr: float) -> tuple[float, int]:
        """One step of the optimizer.

        Args:
            micro_batches: this process's part of the batch.
            number: of the step, from 0.
            images: of the batch, on all processes, those included that cannot be decoded.
            lr: learning rate of this step.

        Returns:
            The sum of the losses, and the number of images that could be decoded, on all processes.

        Raises:
            ModelError: the loss is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total, count = self._add_up_gradients(micro_batches, number, images)
        if count:
            for parameter in self.parameters.values():
                if count < images and parameter.grad is not None:
                    parameter.grad.mul_(images / count)
            if self.settings.clip is not None:
                self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.settings.clip)
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.parameters)
        return total, count

    def _add_up_gradients(self, micro_batches: list[MicroBatch], number: int, images: int) -> tuple[float, int]:
        """Gradients of the sum of the losses on all processes, over `images`."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        # Processes' gradients are averaged, and Accelerate divides by its own count of accumulations.
        scale = self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps / images
        for place, batch in enumerate(micro_batches):
            last = place == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped), self._own_draws(number, place):
                losses = self._losses(batch)
                self.accelerator.backward(losses.sum() * scale)
            sums[0] += losses.detach().double().sum()
            sums[1] += len(batch["labels"])
        reduced = self.accelerator.reduce(sums, "sum")
        assert torch.is_tensor(reduced)
        total, count = reduced.tolist()
        if not abs(total) < float("inf"):
            raise ModelError(f"step {number + 1}: the loss is not finite; lower lr, or set clip")
        return total, int(count)

    @contextmanager
    def _own_draws(self, number: int, place: int) -> Iterator[None]:
        """What dropout draws follows from the step, the process and the micro-batch."""
        device, rank = self.accelerator.device, self.accelerator.process_index
        seed = draws(self.settings.seed, number, rank * 2**16 + place, DROPOUT).integers(2**62)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(seed))
            yield

    def _losses(self, batch: MicroBatch) -> Tensor:
        """Of each image; where there are none, of a blank one, nothing: other processes wait for gradients."""
        if "pixel_values" not in batch or "targets" not in batch:
            output = self._call(self.wrapped, self.blank)
            return sum((part.sum((*range(1, part.dim()),)) * 0.0 for part in _tensors(output)), self.blank.new_zeros(1))
        pixels = batch["pixel_values"].to(self.accelerator.device)
        output = self._call(self.wrapped, pixels)
        have = output.logits.float()
        losses = torch.zeros_like(have[:, 0])
        if self.settings.label_weight:
            losses = losses + self.settings.label_weight * label_losses(self.task, have, batch["targets"].to(have))
        return losses if self.teacher is None else losses + self._distillation(self.teacher, output, pixels)

    def _distillation(self, teacher: nn.Module, output: Answer, pixels: Tensor) -> Tensor:
        """Of each image, [images].

        Args:
            teacher: the dense model.
            output: what the student gives.
            pixels: the images, [images, channels, height, width].

        Raises:
            ModelError: hidden states of both do not compare.
        """
        settings = self.settings.distillation
        with torch.no_grad(), self.accelerator.autocast():
            answer = self._call(teacher, pixels)
        have, wanted = output.logits.float(), answer.logits.float()
        losses = torch.zeros_like(have[:, 0])
        if settings.kind == "soft" and settings.weight:
            losses = losses + settings.weight * soft_distillation(self.task, have, wanted, settings.temperature)
        elif settings.kind == "hard" and settings.weight:
            losses = losses + settings.weight * hard_distillation(self.task, have, wanted)  # type: ignore[arg-type]
        if settings.hidden_weight:
            sides = [[states.float() for states in (side.hidden_states or ())[1:]] for side in (output, answer)]
            losses = losses + settings.hidden_weight * hidden_distance(*sides)
        return losses

    def _call(self, model: nn.Module, pixels: Tensor) -> Answer:
        return model(pixel_values=pixels, output_hidden_states=self.settings.distillation.hidden_weight > 0)

    def shrink(self, masks: dict[str, Tensor]) -> None:
        """Let layers keep the blocks of smaller masks; optimizer and average keep what they hold of these."""
        moments = moments_of(self.optimizer, self.parameters)
        self.model = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        del self.wrapped, self.optimizer, self.parameters
        self.accelerator.free_memory()
        for name, keep in shrink(self.model, masks).items():
            for moment in ("exp_avg", "exp_avg_sq"):
                if f"{moment}/{name}" in moments:
                    moments[f"{moment}/{name}"] = moments[f"{moment}/{name}"][keep]
            if self.average is not None:
                values = self.average.values
                values[name] = values[name][keep.to(values[name].device)]
        self.wrap()
        set_moments(self.optimizer, self.parameters, moments)

    def weights(self) -> dict[str, Tensor]:
        """Those that count, whole: the average where there is one."""
        values = weights_of(self.model)
        if self.average is not None:
            values |= {name: whole(value).cpu().clone() for name, value in self.average.values.items()}
        return values

    def tensors(self) -> dict[str, Tensor]:
        """All that going on needs, whole, by "part/name"."""
        parts = {"model": weights_of(self.model), "moment": moments_of(self.optimizer, self.parameters)}
        if self.average is not None:
            parts["average"] = {name: whole(value).cpu() for name, value in self.average.values.items()}
        return {f"{part}/{name}": value for part, named in parts.items() for name, value in named.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Become what `tensors` was called on; in place of `wrap`, on a model whose layers are as large."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "moment": {}, "average": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.model.load_state_dict(parts["model"])
        self.wrap()
        if self.average is not None:
            for name, value in parts["average"].items():
                fill(self.average.values[name], value)
        set_moments(self.optimizer, self.parameters, parts["moment"])


def stored_masks(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The masks of a model's layers in what `Student.tensors` returned, by name."""
    masks = {}
    for name, mask in masks_of(model).items():
        stored = (tensors[f"model/{name}.{part}"] for part in ("weight", "crow_indices", "col_indices"))
        masks[name] = block_mask(PackedWeight(*stored), mask.shape[1])
    return masks


def is_sharded(accelerator: "Accelerator") -> bool:
    """Whether weights are sharded over processes."""
    from accelerate.utils import DistributedType

    return accelerator.distributed_type == DistributedType.FSDP


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _tensors(output: Answer) -> list[Tensor]:
    """All that a loss may have to do with."""
    return [output.logits, *(output.hidden_states or ())]
