"""Training what survived pruning to behave like the dense model: no labels, calibration images alone, masks fixed.

First each layer by itself learns the dense layer's output from the inputs that the pruned network sees (block-wise
reconstruction as in BRECQ, arXiv 2102.05426), then the whole model learns the dense one's predictions and hidden states
(distillation). Every eighth image is held back: each step starts from, and the model ends at, what did best on those.

A thousand images are few for the millions of weights that are left: training them all makes the model good at those
images and worse at others. So biases, norms and one factor for each row and column of a pruned weight learn fast, and
the weights themselves slowly.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from ..config import RecoveryConfig
from ..data.batches import ImageSet, load_pixels
from ..display.stages import Stage, stage
from ..errors import ModelError
from ..hub.blockprune_layers import block_sparse_layers, is_pruned
from ..model.layers import Layer, States, full_states, hidden_states, layer_chain, states_of
from ..model.outputs import answers, output_of, task_for
from ..model.tasks import Regression, SingleLabel, Task
from ..refit.boundary import at_boundary, held_back, learn_calls
from ..runs.resume import RunState
from ..runs.timing import timed
from ..types import ImageProcessor
from .state import Place, RecoveryState
from .states import IMAGES_AT_ONCE, advanced, of_images
from .student import dense_copy, single_precision, write_back
from .views import views

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

WARM_UP = 0.05  # share of the steps
# Above rounding and far below true gradients: where the loss does not depend on a parameter, as on a key's bias, Adam
# would otherwise walk at full speed wherever rounding leads.
EPSILON = 1e-6
FISHER_IMAGES = 128


@dataclass(frozen=True)
class Recovery:
    """What recovery came to.

    Attributes:
        num_images: images learned from.
        num_held_back: images that chose the step to keep.
        divergence: KL(dense || pruned) of the predictions in nats, the mean over held-back images, after each step;
            "pruned" is where it began. Of a regression and of an encoder, half the squared error over the variance of
            the dense model's answers.
        kept: the step whose weights the model holds.
        seconds: time by step.
    """

    num_images: int
    num_held_back: int
    divergence: dict[str, float]
    kept: str
    seconds: dict[str, float]


def recover(
    model: "PreTrainedModel",
    teacher: "PreTrainedModel",
    images: ImageSet,
    processor: ImageProcessor,
    settings: RecoveryConfig,
    *,
    accelerator: "Accelerator",
    seed: int = 0,
    run_state: RunState | None = None,
) -> Recovery:
    """Train a block-sparse model to behave like the dense one; weights change at the end, all at once.

    Every process holds all images and learns from its share of each batch, so that any number of them takes the same
    steps, but for rounding.

    Args:
        model: a transformers classifier or encoder of images with block-sparse layers.
        teacher: the dense model that it was made from; left as it is.
        images: what to learn from.
        processor: the model's image processor.
        settings: how.
        accelerator: device and processes.
        seed: of the order of images and of their views.
        run_state: keeps the state now and then, and gives back that of an interrupted run.

    Raises:
        ModelError: the two models do not fit together, or the loss is not finite.
        DataError: too few images, or too many that are corrupt.
        CheckpointError: `run_state` has the state of another run, or cannot be written.
    """
    pixels, index = load_pixels(images, processor, accelerator=accelerator, model_config=model.config)
    run = _Run(model, teacher, pixels, held_back(index), settings, accelerator, seed, run_state)
    steps = {"reconstruction": run.reconstruct, "distillation": run.distil}
    best, divergence, kept, seconds = run.begin()
    for name, epochs in _epochs(settings).items():
        if name in divergence:
            continue
        seconds[name] = run.state.begin(name)
        with timed(seconds, name):
            steps[name](epochs)
        divergence[name] = run.divergence()
        if divergence[name] < divergence[kept]:
            best, kept = copy.deepcopy(run.student.state_dict()), name
        else:
            run.student.load_state_dict(best)
        run.state.finish(best, {"divergence": divergence, "kept": kept, "seconds": seconds}, f"the end of {name}")
    write_back(run.student, model)
    return Recovery(len(run.learned), len(run.judged), divergence, kept, seconds)


def recovery_stages(settings: RecoveryConfig) -> list[str]:
    """The stages of a recovery that are shown."""
    return list(_epochs(settings))


def _epochs(settings: RecoveryConfig) -> dict[str, int]:
    """Passes over the images by step, of the steps that there are."""
    steps = {"reconstruction": settings.reconstruction_epochs, "distillation": settings.epochs}
    return {name: epochs for name, epochs in steps.items() if epochs}


@dataclass
class _Call:
    """What a model gave for some images: answers, the output of each layer, and what the answers mean."""

    answers: Tensor
    hidden: list[Tensor]
    task: Task


def _call(model: "PreTrainedModel", layers: list[Layer], pixels: Tensor) -> _Call:
    hidden: list[Tensor] = []

    def record(module: nn.Module, inputs: object, output: object) -> None:
        hidden.append(full_states(states_of(module, output)))

    handles = [layer.module.register_forward_hook(record) for layer in layers]
    try:
        output = model(pixel_values=pixels)
        return _Call(output_of(model, output), hidden, task_for(model, output))
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Run:
    """One recovery: the models, the images and the way through them."""

    model: "PreTrainedModel"
    teacher: "PreTrainedModel"
    pixels: Tensor
    held_back: Tensor
    settings: RecoveryConfig
    accelerator: "Accelerator"
    seed: int
    run_state: RunState | None = None
    student: "PreTrainedModel" = field(init=False)
    task: Task = field(init=False)

    def __post_init__(self) -> None:
        self.device, self.generator = self.accelerator.device, torch.Generator().manual_seed(self.seed)
        self.learned, self.judged = (part.nonzero().squeeze(1) for part in (~self.held_back, self.held_back))
        if not len(self.judged):  # a handful of images: they must do for both
            self.judged = self.learned
        self.student = dense_copy(self.model).to(self.device)
        names = [name for name, _ in block_sparse_layers(self.model)]
        self.layers, of_teacher = (layer_chain(m, names) for m in (self.student, self.teacher))
        if is_pruned(self.teacher) or [u.name for u in self.layers] != [u.name for u in of_teacher]:
            raise ModelError("the teacher is not the dense model that this one was pruned from; name that one")
        self.teacher = single_precision(self.teacher).to(self.device).eval().requires_grad_(False)
        self.teacher_layers = layer_chain(self.teacher, names)
        learn_calls(self.student, self.layers, self._some(self.learned[:1]))
        self.student.requires_grad_(True)
        self.task = self._task()
        embeddings = getattr(getattr(self.student, "base_model", None), "embeddings", None)
        if embeddings is not None:  # they were not pruned, and would learn single images by heart
            embeddings.requires_grad_(False)
        self.token_weights = self._token_weights()
        self.state = RecoveryState(self.run_state, self.student, self.generator)

    def begin(self) -> tuple[dict[str, Tensor], dict[str, float], str, dict[str, float]]:
        """(best weights, divergence by step, the step of these weights, seconds by step) where the run goes on."""
        finished = self.state.finished()
        if finished is None:
            return copy.deepcopy(self.student.state_dict()), {"pruned": self.divergence()}, "pruned", {}
        best, values = finished
        self.student.load_state_dict(best)
        return best, values["divergence"], values["kept"], values["seconds"]

    def _some(self, chosen: Tensor) -> Tensor:
        return self.pixels[chosen].to(self.device).float()

    @torch.no_grad()
    def _task(self) -> Task:
        task = _call(self.teacher, [], self._some(self.learned[:1])).task
        if not isinstance(task, Regression):
            return task
        chosen = self.learned[:FISHER_IMAGES].split(IMAGES_AT_ONCE)
        return task.scaled(torch.cat([answers(self.teacher, self._some(part)) for part in chosen]))

    def _token_weights(self) -> list[Tensor]:
        """Weight of each token after each layer, [tokens] with mean 1: its squared gradient in the dense model.

        The gradient is that of the log-probability of a label drawn from the model's own prediction (true Fisher).
        """
        sums = [torch.zeros((), device=self.device) for _ in self.teacher_layers]
        for chosen in self.learned[:FISHER_IMAGES].split(IMAGES_AT_ONCE):
            seen = _call(self.teacher, self.teacher_layers, self._some(chosen).requires_grad_())
            if not seen.answers.isfinite().all():
                raise ModelError("the teacher's predictions are not finite; check its weights and the images")
            drawn = self._drawn(seen.answers.detach()).to(self.device)
            loss = self.task.losses(seen.answers, drawn).sum()
            grads = torch.autograd.grad(loss, seen.hidden, materialize_grads=True)  # a backbone reads some layers
            sums = [total + grad.square().sum((0, 2)) for total, grad in zip(sums, grads, strict=True)]
        share = self.settings.token_weights
        return [share * total / total.mean().clamp(min=1e-30) + 1 - share for total in sums]

    def _drawn(self, outputs: Tensor) -> Tensor:
        """A label for each image; drawn on the CPU, so that every device draws the same."""
        if isinstance(self.task, SingleLabel):
            return torch.multinomial(outputs.softmax(-1).cpu(), 1, generator=self.generator).squeeze(1)
        seed = int(torch.randint(2**31, (), generator=self.generator))
        return self.task.sample(outputs.cpu(), torch.arange(len(outputs)), seed)

    @torch.no_grad()
    def divergence(self) -> float:
        """KL(teacher || student) in nats, the mean over the images that judge."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        mine = self.judged[self.accelerator.process_index :: self.accelerator.num_processes]
        for chosen in mine.split(IMAGES_AT_ONCE):
            pixels = self._some(chosen)
            wanted, have = (answers(model, pixels) for model in (self.teacher, self.student))
            total += self.task.divergence(wanted, have).sum()
        return float(self._sum(total)) / len(self.judged)

    def reconstruct(self, epochs: int) -> None:
        """Let each layer learn the dense layer's output from the inputs that the pruned model sees."""
        pairs = list(zip(self.layers, self.teacher_layers, self.token_weights, strict=True))
        with stage("reconstruction", len(pairs) * self._num_steps(epochs)) as bar:
            inputs: States = self._boundary(self.student, self.layers[0])
            targets = self._boundary(self.teacher, self.teacher_layers[0])
            for number, (layer, dense, token_weight) in enumerate(pairs):
                targets = hidden_states(advanced(layer, targets, dense.module))
                learn = self._layer_loss(layer, inputs, targets, token_weight)
                # Also of a layer that is done: later draws follow these.
                order = list(self._order(len(targets), epochs))
                if self.state.passed(place := Place("reconstruction", number)):
                    bar.advance(len(order), measured=False)
                else:
                    self._descend(learn, layer.module, order, f"reconstruction of {layer.name}", place, bar)
                inputs = advanced(layer, inputs)

    def _layer_loss(
        self, layer: Layer, inputs: States, targets: Tensor, token_weight: Tensor
    ) -> Callable[[Tensor, slice], Tensor]:
        """Weighted mean squared error of a layer's outputs, over their variance."""
        spread = targets.var()

        def loss(chosen: Tensor, share: slice) -> Tensor:
            mine = chosen[share]
            error = full_states(layer.run(of_images(inputs, mine))) - targets[mine]
            return (error.square().mean((0, 2)) * token_weight).mean() / spread

        return loss

    @torch.no_grad()
    def _boundary(self, model: "PreTrainedModel", layer: Layer) -> Tensor:
        parts = [at_boundary(model, layer.module, self._some(chosen)) for chosen in self.learned.split(IMAGES_AT_ONCE)]
        return torch.cat(parts)

    def distil(self, epochs: int) -> None:
        """Let the whole model learn the dense one's predictions and hidden states, on random views of the images."""

        def loss(chosen: Tensor, share: slice) -> Tensor:
            pixels = views(self.pixels[self.learned[chosen]].float(), self.generator)[share].to(self.device)
            with torch.no_grad():
                wanted = _call(self.teacher, self.teacher_layers, pixels)
            have = _call(self.student, self.layers, pixels)
            hidden = [
                ((a - b).square().mean((0, 2)) * weight).mean() / b.var()
                for a, b, weight in zip(have.hidden, wanted.hidden, self.token_weights, strict=True)
            ]
            mean_hidden = torch.stack(hidden).mean()
            answered = self.task.divergence(wanted.answers, have.answers).mean()
            return answered + self.settings.hidden_weight * mean_hidden

        order = list(self._order(len(self.learned), epochs))
        with stage("distillation", len(order)) as bar:
            self._descend(loss, self.student, order, "distillation", Place("distillation"), bar)

    def _num_steps(self, epochs: int) -> int:
        """Of `_order`, over the images that are learned from."""
        return epochs * (len(self.learned) // min(self.settings.batch_size, len(self.learned)))

    def _order(self, count: int, epochs: int) -> Iterator[Tensor]:
        """Batches of positions; what is left of an epoch after its last whole batch is left out."""
        size = min(self.settings.batch_size, count)
        for _ in range(epochs):
            yield from torch.randperm(count, generator=self.generator)[: count // size * size].split(size)

    def _descend(
        self,
        loss: Callable[[Tensor, slice], Tensor],
        module: nn.Module,
        order: list[Tensor],
        where: str,
        place: Place,
        bar: Stage,
    ) -> None:
        """Adam over the module's parameters, each process with its share of every batch."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        optimizer = torch.optim.Adam(self._groups(module), eps=EPSILON)
        done = self.state.restore(place, optimizer, parameters)
        if done:
            bar.advance(done, measured=False)
        schedule = _schedule(optimizer, len(order), done)
        for number, chosen in enumerate(order[done:], done + 1):
            share = slice(rank, None, ranks)
            optimizer.zero_grad()
            value = torch.zeros((), device=self.device)
            if mine := len(chosen[share]):
                value = loss(chosen, share) * (mine / len(chosen))
                value.backward()
            self._add_up(list(parameters.values()))
            summed = float(self._sum(value.detach()))
            if not math.isfinite(summed):
                raise ModelError(
                    f"{where}, step {number}: the loss is not finite; lower recovery.lr and "
                    "recovery.weight_lr. The pruned model is as it was"
                )
            optimizer.step()
            bar.advance(loss=summed, lr=optimizer.param_groups[0]["lr"])
            schedule.step()
            said = f"{where}, step {number} of {len(order)}"
            self.state.save_if_due(place, number, said, optimizer, parameters)

    def _groups(self, module: nn.Module) -> list[dict[str, object]]:
        """Matrices, and all that is one number a feature, with a learning rate for each."""
        few, weights = [], []
        for parameter in module.parameters():
            if parameter.requires_grad:
                (weights if min(parameter.shape, default=1) > 1 and parameter.dim() > 1 else few).append(parameter)
        return [{"params": few, "lr": self.settings.lr}, {"params": weights, "lr": self.settings.weight_lr}]

    def _add_up(self, parameters: list[nn.Parameter]) -> None:
        """Sum gradients over processes; one without images, or a parameter without use, counts as zero."""
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._sum(grad)

    def _sum(self, value: Tensor) -> Tensor:
        """Over processes."""
        return cast(Tensor, self.accelerator.reduce(value, "sum"))


def _schedule(optimizer: Optimizer, steps: int, done: int) -> LambdaLR:
    """Learning rates that rise and fall over so many steps, of which some are done."""
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * steps), steps)
    # What it makes of a `last_epoch` that it is given differs between versions of torch.
    schedule.last_epoch = done
    for group, rate, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * factor(done)
    return schedule
