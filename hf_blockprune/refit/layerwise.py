"""Repairing a pruned model layer by layer, with the inputs that the pruned network really sees.

Within a layer, Linears that read the same tensor form a stage (q, k, v | proj | fc1 | fc2), and stages are refitted in
forward order. Sums over tokens are made by all processes, each on its images; candidate solutions are shared out.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.batches import ImageSet
from ..display import stages as display
from ..errors import ModelError
from ..model.copying import copied
from ..model.layers import Layer, layer_chain
from ..model.modes import evaluating
from ..runs.resume import RunState
from ..score.blocks import expand_mask
from ..types import ImageProcessor
from .boundary import BoundaryBatch, StopForward, advance, first_inputs
from .solve import RIDGES, Moments, Refit, refit

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


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


@dataclass
class _Stage:
    """Linears of a layer that read the same tensor."""

    names: list[str]
    # Whether its output is added to the layer's input, with nothing else before it, to give the residual stream.
    after_input: bool = False
    # Whether its output is the last thing that is added to the residual stream.
    ends_layer: bool = False


@dataclass
class _Seen:
    """Inputs and outputs of a layer's Linears in one forward pass."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    end: Tensor | None = None  # the layer's own output


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
    run_state: RunState | None = None,
) -> dict[str, LayerRefit]:
    """Refit every masked Linear in forward order, in place; removed blocks end as zeros.

    Stages that write to the residual stream aim at the dense model's stream (unless `residual_targets` is false), which
    cancels the error accumulated so far; the others at the dense output of their own Linear. So does the first writer
    of a layer with windows, whose outputs lie in another order than the stream.

    Args:
        model: the dense model.
        masks: bool [block_rows, block_cols] by module name.
        block_shape: (rows, cols).
        images: calibration images.
        processor: the model's image processor.
        accelerator: device and processes.
        batch_size: images in one pass on each process.
        token_weights: weight of each token position by module name, [tokens]; all tokens weigh the same without.
        residual_targets: whether errors of the residual stream are made good.
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
    with display.stage("refit", len(layers), unit="layers") as bar, evaluating(model):
        kept = first_inputs(model, layers, images, processor, accelerator=accelerator, batch_size=batch_size)
        for index, layer in enumerate(layers):
            dense = copied(layer.module)
            part = _part(index)
            refits = _restore(layer.module, run_state, part)
            resumed = refits is not None
            if refits is None:
                here = {n.removeprefix(f"{layer.name}."): n for n in masks if n.startswith(f"{layer.name}.")}
                job = _LayerJob(layer, dense, here, masks, block_shape, token_weights or {}, residual_targets)
                refits = job.run(kept, accelerator)
                if run_state is not None:
                    named: dict[str, Tensor] = dict(layer.module.named_parameters())
                    values = {n: asdict(r) for n, r in refits.items()}
                    run_state.write(part, named, values, done=f"refit, layer {index + 1} of {len(layers)}")
            done |= refits
            advance(layer, dense, kept)
            bar.advance(measured=not resumed)
    return done


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
    dense: nn.Module
    names: dict[str, str]
    masks: dict[str, Tensor]
    block_shape: tuple[int, int]
    token_weights: dict[str, Tensor]
    residual_targets: bool

    def run(self, kept: list[BoundaryBatch], accelerator: "Accelerator") -> dict[str, LayerRefit]:
        """Refit stage by stage; how it went, by name in the model."""
        done: dict[str, LayerRefit] = {}
        stages = _shared_stages(self.layer, list(self.names), kept, accelerator) if self.names else []
        for stage in stages:
            start = perf_counter()
            if not self.residual_targets:
                stage.after_input = stage.ends_layer = False
            linears = {name: self._linear(name) for name in stage.names}
            weights = {name: self.token_weights.get(self.names[name]) for name in stage.names}
            inputs = {name: linear.inputs for name, linear in linears.items()}
            sums = _StageSums(stage, self.layer, weights, inputs)
            for batch in kept:
                sums.add(self.dense, batch)
            for name, linear in linears.items():
                result = linear.refit(*sums.moments(name, accelerator), accelerator)
                done[linear.name] = LayerRefit(result.ridge, result.error, perf_counter() - start)
                start = perf_counter()
        return done

    def _linear(self, name: str) -> "_Linear":
        module, mask = self.layer.module.get_submodule(name), self.masks[self.names[name]]
        inputs = _inputs_used(module, mask, self.block_shape)
        return _Linear(self.names[name], module, mask, self.block_shape, inputs)


def _inputs_used(linear: Any, mask: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """Indices of the inputs that some kept block reads."""
    entries = expand_mask(mask.any(dim=0, keepdim=True), (1, linear.in_features), (1, block_shape[1]))
    return entries[0].nonzero().squeeze(1).to(linear.weight.device)


@dataclass
class _Linear:
    """A Linear to solve for, its mask, and the inputs that its moments hold."""

    name: str
    module: Any
    mask: Tensor
    block_shape: tuple[int, int]
    inputs: Tensor

    def refit(self, fitted: Moments, held_back: Moments | None, accelerator: "Accelerator") -> Refit:
        """Solve on all processes, each with some of the ridges, and write the best solution into the module."""
        from accelerate.utils import broadcast, gather_object

        ranks, rank = accelerator.num_processes, accelerator.process_index
        ridges = RIDGES[rank::ranks] if held_back is not None else RIDGES
        result = self._solve(fitted, held_back, ridges) if ridges else None
        mine = (math.inf, 0.0) if result is None else (result.error, result.ridge)
        every = gather_object([mine]) if ranks > 1 else [mine]
        error, ridge = best = min(every)
        if math.isinf(error):
            raise ModelError(f"{self.name}: its inputs are too dependent to refit; use more calibration images")
        solution: list[Any] = [
            self.module.weight.detach().clone(),
            self.module.weight.new_zeros(self.module.out_features),
        ]
        if result is not None:
            solution = [result.weight, result.bias]
        if ranks > 1:
            solution = [broadcast(part.contiguous(), from_process=every.index(best)) for part in solution]
        weight, bias = solution
        self._write(weight, bias)
        return Refit(weight, bias, ridge, error)

    def _solve(self, fitted: Moments, held_back: Moments | None, ridges: tuple[float, ...]) -> Refit | None:
        weight, columns = self.module.weight.detach(), self.mask.any(dim=0)
        mask = self.mask[:, columns].to(weight.device)
        try:
            found = refit(weight[:, self.inputs], mask, self.block_shape, fitted, held_back, ridges)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            return None
        whole = torch.zeros_like(weight)
        whole[:, self.inputs] = found.weight
        return Refit(whole, found.bias, found.ridge, found.error)

    def _write(self, weight: Tensor, bias: Tensor) -> None:
        self.module.weight.data.copy_(weight)
        if self.module.bias is None:
            self.module.bias = nn.Parameter(torch.empty_like(bias))
        self.module.bias.data.copy_(bias)


@contextmanager
def _watching(layer: nn.Module, names: list[str], seen: _Seen, *, stop: bool) -> Iterator[None]:
    """Record inputs and outputs of the named Linears; with `stop`, end the pass when all have been seen."""

    def hook(name: str):
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.inputs[name], seen.outputs[name] = inputs[0], output
            if stop and len(seen.outputs) == len(names):
                raise StopForward

        return record

    handles = [layer.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _shared_stages(
    layer: Layer, names: list[str], kept: list[BoundaryBatch], accelerator: "Accelerator"
) -> list[_Stage]:
    """The stages as the first process sees them: another may have been left without images."""
    from accelerate.utils import broadcast_object_list

    shared: list[Any] = [_stages(layer, names, kept[0].dense) if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(shared)
    return shared[0]


@torch.no_grad()
def _stages(layer: Layer, names: list[str], states: Tensor) -> list[_Stage]:
    """Linears of a dense layer by the tensor that they read, in forward order; finds those that write to the stream."""
    seen = _Seen()
    with _watching(layer.module, names, seen, stop=False):
        out = layer.run(states)
    stages: list[_Stage] = []
    for name, tensor in seen.inputs.items():
        if stages and seen.inputs[stages[-1].names[0]] is tensor:
            stages[-1].names.append(name)
        else:
            stages.append(_Stage([name]))
    writers = [s for s in stages if len(s.names) == 1 and seen.outputs[s.names[0]].shape == out.shape]
    if len(writers) == 2 and _close(sum((seen.outputs[s.names[0]] for s in writers), states), out):
        writers[0].after_input = writers[1].ends_layer = True
    elif writers:
        writers[-1].ends_layer = _is_added_last(layer, writers[-1].names[0], states, out)
    return stages


def _is_added_last(layer: Layer, name: str, states: Tensor, out: Tensor) -> bool:
    """Whether what is added to a Linear's output is added to the layer's output, no more and no less."""
    more = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype, device=out.device) * out.std()

    def add(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output + more

    handle = layer.module.get_submodule(name).register_forward_hook(add)
    try:
        return _close(layer.run(states), out + more)
    finally:
        handle.remove()


def _close(have: Tensor, want: Tensor) -> bool:
    tolerance = max(1e-4, 8 * torch.finfo(want.dtype).eps)  # in half precision sums differ by some units
    return torch.allclose(have, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


class _StageSums:
    """Weighted sums over tokens for the Linears of a stage, apart for fitted and held-back images."""

    def __init__(
        self, stage: _Stage, layer: Layer, token_weights: dict[str, Tensor | None], inputs: dict[str, Tensor]
    ) -> None:
        self.stage, self.layer, self.token_weights, self.inputs = stage, layer, token_weights, inputs
        self.sums: dict[tuple[str, bool], list[Tensor]] = {}
        for name in stage.names:
            linear: Any = layer.module.get_submodule(name)
            out, into, device = linear.out_features, len(inputs[name]), linear.weight.device
            for part in (False, True):
                shapes = [(), (into,), (out,), (into, into), (out, into), (out,)]
                self.sums[name, part] = [torch.zeros(s, dtype=torch.float64, device=device) for s in shapes]

    @torch.no_grad()
    def add(self, dense: nn.Module, batch: BoundaryBatch) -> None:
        """Run one batch through the dense and the pruned layer as far as the stage."""
        wanted = self._seen(dense, batch.dense)
        have = self._seen(self.layer.module, batch.pruned)
        for name in self.stage.names:
            target = wanted.outputs[name]
            if self.stage.after_input:
                target = target + batch.dense - batch.pruned
            elif self.stage.ends_layer:
                assert wanted.end is not None
                assert have.end is not None
                target = wanted.end - (have.end - have.outputs[name])
            self._add(name, have.inputs[name], target, batch.held_back)

    def _seen(self, module: nn.Module, states: Tensor) -> _Seen:
        seen = _Seen()
        with _watching(module, self.stage.names, seen, stop=not self.stage.ends_layer):
            seen.end = self.layer.run(states, module)
        return seen

    def _add(self, name: str, x: Tensor, target: Tensor, held_back: Tensor) -> None:
        token_weight = self.token_weights[name]
        # Double precision: what single precision rounds off a large mean would be larger than a small variance, and
        # the solution would depend on the order of the images.
        x, target = x[..., self.inputs[name]].double(), target.double()
        # Windows of an image follow each other in the first axis. A Linear that kept no block has no inputs here, so
        # that the number of tokens follows from its outputs.
        tokens = target[..., 0].numel() // len(held_back)
        x, target = (values.reshape(len(held_back), tokens, values.shape[-1]) for values in (x, target))
        for part in (False, True):
            chosen = held_back == part
            xs, ts = x[chosen].flatten(0, 1), target[chosen].flatten(0, 1)
            weight = xs.new_ones(len(xs)) if token_weight is None else token_weight.to(xs).repeat(int(chosen.sum()))
            weighted = xs * weight[:, None]
            sums = self.sums[name, part]
            sums[0] += weight.sum()
            sums[1] += weighted.sum(0)
            sums[2] += (ts * weight[:, None]).sum(0)
            sums[3] += weighted.t() @ xs
            sums[4] += ts.t() @ weighted
            sums[5] += (ts.square() * weight[:, None]).sum(0)

    def moments(self, name: str, accelerator: "Accelerator") -> tuple[Moments, Moments | None]:
        """(fitted, held back), added up over processes; no held-back moments where there were no such images."""
        return _finish(self._shared(name, False, accelerator)), self._held_back(name, accelerator)

    def _held_back(self, name: str, accelerator: "Accelerator") -> Moments | None:
        sums = self._shared(name, True, accelerator)
        return _finish(sums) if sums[0] > 0 else None

    def _shared(self, name: str, part: bool, accelerator: "Accelerator") -> list[Any]:
        return [accelerator.reduce(value, "sum") for value in self.sums[name, part]]


def _finish(sums: list[Any]) -> Moments:
    weight, x, t, xx, tx, tt = sums
    x, t = x / weight, t / weight
    spread = (tt / weight - t.square()).sum()
    return Moments(x, t, xx / weight - torch.outer(x, x), tx / weight - torch.outer(t, x), float(spread))
