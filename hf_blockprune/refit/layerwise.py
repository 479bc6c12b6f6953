"""Repairing a pruned model layer by layer, with the inputs that the pruned network really sees.

Within a layer, Linears that read the same tensor form a stage (q, k, v | proj | fc1 | fc2), and stages are refitted in
forward order. Sums over tokens are made by all processes, each on its images; candidate solutions are shared out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from ..data.batches import ImageSet
from ..display import stages as display
from ..hub.blockprune_tokens import forget_schedule
from ..model.copying import copied
from ..model.layers import Layer, layer_chain, linear_in
from ..model.modes import evaluating
from ..runs.resume import RunState
from ..types import ImageProcessor
from .boundary import BoundaryBatch, advance, first_inputs
from .stages import DenseOutputs, Stage, StageSums, shared_stages
from .surviving import SurvivingWeights, inputs_used

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


class _Settings(NamedTuple):
    """Arguments of `refit_layers` that hold for every layer."""

    masks: dict[str, Tensor]
    block_shape: tuple[int, int]
    token_weights: dict[str, Tensor]
    kept_outputs: Mapping[str, Tensor]
    residual_targets: bool


@dataclass(frozen=True)
class LayerRefit:
    """What the refit of one Linear came to.

    Attributes:
        ridge: the chosen one.
        error: E|W xhat + b - t|^2 / E|t - E[t]|^2 on held-back images, all in all: 0 is perfect, 1 a constant.
        seconds: time of its sums and its solution.
    """

    ridge: float
    error: float
    seconds: float


def refit_layers(
    model: "PreTrainedModel",
    masks: dict[str, Tensor],
    block_shape: tuple[int, int],
    images: ImageSet,
    processor: ImageProcessor,
    *,
    accelerator: "Accelerator",
    batch_size: int = 16,
    token_weights: dict[str, Tensor] | None = None,
    residual_targets: bool = True,
    dense: "PreTrainedModel | None" = None,
    kept_outputs: Mapping[str, Tensor] | None = None,
    run_state: RunState | None = None,
) -> dict[str, LayerRefit]:
    """Refit every masked Linear in forward order, in place; removed blocks end as zeros.

    Stages that write to the residual stream aim at the dense model's stream, which cancels the error accumulated so
    far; the others at the dense output of their own Linear. So does the first writer of a layer with windows, whose
    outputs lie in another order than the stream.

    Args:
        model: the dense model; or one that is smaller, or whose tokens merge: they aim at means of its.
        masks: bool [block_rows, block_cols] by module name.
        block_shape: (rows, cols).
        images, processor: calibration images, and the model's image processor.
        accelerator: device and processes.
        batch_size: images in one pass on each process.
        token_weights: weight of each token position by module name, [tokens]; all tokens weigh the same without.
        residual_targets: whether errors of the residual stream are made good.
        dense: the dense model, where `model` is smaller.
        kept_outputs: outputs of the dense Linear that are left, int64, of each Linear that has fewer, by module name.
        run_state: keeps each layer that is done, and gives back those of an interrupted run.

    Returns:
        How it went, by module name.

    Raises:
        ModelError: the masked Linears do not lie in one list of layers, or a system cannot be solved.
    """
    layers = layer_chain(model, masks)
    if (every := _restore_all(layers, run_state)) is not None:
        return every
    done: dict[str, LayerRefit] = {}
    settings = _Settings(masks, block_shape, token_weights or {}, kept_outputs or {}, residual_targets)
    with display.stage("refit", len(layers), unit="layers") as bar, evaluating(model):
        kept = first_inputs(model, layers, images, processor, accelerator=accelerator, batch_size=batch_size)
        for index, layer in enumerate(layers):
            whole = _whole(layer, dense)
            resumed = (refits := _restore(layer.module, run_state, _part(index))) is not None
            names = _inside(layer, () if resumed else masks)
            stages = shared_stages(layer, whole, list(names), kept, accelerator) if names else []
            outputs = DenseOutputs(layer, whole, stages, kept)
            if refits is None:
                refits = _LayerJob(layer, outputs, names, settings).run(stages, kept, accelerator)
                _keep(layer.module, refits, run_state, index, len(layers))
            done |= refits
            advance(layer, outputs.ends(), kept)
            bar.advance(measured=not resumed)
    return done


def _whole(layer: Layer, dense: "PreTrainedModel | None") -> nn.Module:
    """A layer of the dense model, in which no tokens merge."""
    whole = copied(layer.module) if dense is None else dense.get_submodule(layer.name)
    forget_schedule(whole)
    return whole


def _inside(layer: Layer, names: Iterable[str]) -> dict[str, str]:
    """Those names of modules that lie in a layer, by the names that they have there."""
    return {name.removeprefix(f"{layer.name}."): name for name in names if name.startswith(f"{layer.name}.")}


def _keep(layer: nn.Module, refits: dict[str, LayerRefit], run_state: RunState | None, index: int, layers: int) -> None:
    """Keep what `_restore` gives back of the layer of that number."""
    if run_state is not None:
        named: dict[str, Tensor] = dict(layer.named_parameters())
        values = {name: asdict(refit) for name, refit in refits.items()}
        run_state.write(_part(index), named, values, done=f"refit, layer {index + 1} of {layers}")


def _part(index: int) -> str:
    return f"layer-{index}"


def _restore_all(layers: list[Layer], run_state: RunState | None) -> dict[str, LayerRefit] | None:
    """The refit of a run that was interrupted after it, without a pass of the images; None where a layer is missing."""
    if run_state is None or not run_state.resumed.issuperset(map(_part, range(len(layers)))):
        return None
    done: dict[str, LayerRefit] = {}
    for index, layer in enumerate(layers):
        done |= _restore(layer.module, run_state, _part(index)) or {}
    return done


def _restore(layer: nn.Module, run_state: RunState | None, part: str) -> dict[str, LayerRefit] | None:
    """Give a layer the weights that an interrupted run left of it."""
    stored = run_state.read(part) if run_state is not None else None
    if stored is None:
        return None
    tensors, values = stored
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        owner = layer.get_submodule(module)
        before = next(owner.parameters())
        setattr(owner, parameter, nn.Parameter(tensor.to(before), requires_grad=before.requires_grad))
    return {name: LayerRefit(**value) for name, value in values.items()}


@dataclass
class _LayerJob:
    """The refit of one layer's Linears; `names` gives their names in the model by those in the layer."""

    layer: Layer
    dense: DenseOutputs
    names: dict[str, str]
    settings: _Settings

    def run(self, stages: list[Stage], kept: list[BoundaryBatch], accelerator: "Accelerator") -> dict[str, LayerRefit]:
        """Refit stage by stage; how it went, by name in the model."""
        done: dict[str, LayerRefit] = {}
        for stage in stages:
            start = perf_counter()
            if not self.settings.residual_targets:
                stage.after_input = stage.ends_layer = False
            linears = {name: self._linear(name) for name in stage.names}
            weights = {name: self.settings.token_weights.get(self.names[name]) for name in stage.names}
            inputs = {name: linear.inputs for name, linear in linears.items()}
            outputs = {name: self.settings.kept_outputs.get(self.names[name]) for name in stage.names}
            sums = StageSums(stage, self.layer, weights, inputs, outputs)
            for number, batch in enumerate(kept):
                sums.add(self.dense.of(stage, number), batch)
            self.dense.done(stage)
            for name, linear in linears.items():
                result = linear.refit(*sums.moments(name, accelerator), accelerator)
                done[linear.name] = LayerRefit(result.ridge, result.error, perf_counter() - start)
                start = perf_counter()
        return done

    def _linear(self, name: str) -> SurvivingWeights:
        module, mask = linear_in(self.layer.module, name), self.settings.masks[self.names[name]]
        inputs = inputs_used(module, mask, self.settings.block_shape)
        return SurvivingWeights(self.names[name], module, mask, self.settings.block_shape, inputs)
