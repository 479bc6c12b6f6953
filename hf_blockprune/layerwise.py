"""Repairing a pruned model layer by layer, with the inputs that the pruned network really sees.

The hidden states of all calibration images at one layer's boundary are kept for the dense and for the pruned model;
both move on together, so no part of the network is run again from its beginning. Within a layer, Linears that read the
same tensor form a stage (q, k, v | proj | fc1 | fc2), and stages are refitted in forward order.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .data import ImageSet, batches
from .errors import ModelError
from .reconstruction import Moments, refit

if TYPE_CHECKING:
    from accelerate import Accelerator

HELD_BACK_EVERY = 8  # every eighth image chooses the ridge, the others are fitted


class _Reached(Exception):
    """Ends a forward pass once everything that was wanted has been seen."""


@dataclass
class _Stage:
    """Linears of a layer that read the same tensor."""

    names: list[str]
    # Whether the stage's output is added to the residual stream.
    residual: bool = False


@dataclass
class _Seen:
    """Inputs and outputs of a layer's Linears in one forward pass."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Batch:
    """One batch at the boundary of a layer."""

    dense: Tensor
    pruned: Tensor
    held_back: Tensor  # bool [images]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def refit_layers(
    model: nn.Module,
    masks: dict[str, Tensor],
    block_shape: tuple[int, int],
    images: ImageSet,
    processor: Any,
    *,
    accelerator: "Accelerator",
    batch_size: int = 16,
    token_weights: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """Refit every masked Linear in forward order, in place; removed blocks end as zeros.

    Stages that write to the residual stream aim at the dense model's stream, which cancels the error accumulated so
    far; the others at the dense output of their own Linear.

    Args:
        model: the dense model.
        masks: bool [block_rows, block_cols] by module name.
        block_shape: (rows, cols).
        images: calibration images.
        processor: the model's image processor.
        accelerator: device and processes.
        batch_size: images in one pass on each process.
        token_weights: weight of each token position by module name, [tokens]; all tokens weigh the same without.

    Returns:
        The ridge chosen for each Linear.

    Raises:
        ModelError: the masked Linears do not lie in one list of layers, or a system cannot be solved.
    """
    prefix, layers = _layer_list(model, masks)
    training = model.training
    model.eval()
    kept = _first_inputs(model, layers[0], images, processor, accelerator=accelerator, batch_size=batch_size)
    ridges: dict[str, float] = {}
    for index in logging.tqdm(range(len(layers)), desc="Refit", disable=not accelerator.is_main_process):
        layer, dense = layers[index], copy.deepcopy(layers[index])
        here = {n.removeprefix(f"{prefix}.{index}."): n for n in masks if n.startswith(f"{prefix}.{index}.")}
        stages = _shared_stages(dense, list(here), kept, accelerator) if here else []
        for position, stage in enumerate(stages):
            weights = {name: (token_weights or {}).get(here[name]) for name in stage.names}
            sums = _StageSums(stage, stages[:position], layer, weights)
            for batch in kept:
                sums.add(dense, batch)
            for name in stage.names:
                fitted, held_back = sums.moments(name, accelerator)
                mask = masks[here[name]]
                ridges[here[name]] = _refit_linear(
                    here[name], layer.get_submodule(name), mask, block_shape, fitted, held_back
                )
        _advance(dense, layer, kept)
    model.train(training)
    return ridges


def _refit_linear(
    name: str, linear: Any, mask: Tensor, block_shape: tuple[int, int], fitted: Moments, held_back: Moments | None
) -> float:
    try:
        result = refit(linear.weight.detach(), mask.to(linear.weight.device), block_shape, fitted, held_back)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise ModelError(
            f"{name}: its inputs are too dependent to refit ({error}); use more calibration images"
        ) from error
    linear.weight.data.copy_(result.weight)
    if linear.bias is None:
        linear.bias = nn.Parameter(torch.empty_like(result.bias))
    linear.bias.data.copy_(result.bias)
    return result.ridge


def _layer_list(model: nn.Module, masks: dict[str, Tensor]) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(target.startswith(f"{name}.") for target in masks):
            return name, module
    raise ModelError(f"{type(model).__name__}: the pruned Linears lie in several lists of layers; refit needs one")


@contextmanager
def _watching(layer: nn.Module, names: list[str], seen: _Seen, *, stop: bool) -> Iterator[None]:
    """Record inputs and outputs of the named Linears; with `stop`, end the pass when all have been seen."""

    def hook(name: str):
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.inputs[name], seen.outputs[name] = inputs[0], output
            if stop and len(seen.outputs) == len(names):
                raise _Reached

        return record

    handles = [layer.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _first_inputs(
    model: nn.Module, first: nn.Module, images: ImageSet, processor: Any, *, accelerator: "Accelerator", batch_size: int
) -> list[_Batch]:
    kept: list[_Batch] = []
    index: Tensor

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(_Batch(args[0], args[0], index % HELD_BACK_EVERY == HELD_BACK_EVERY - 1, args[1:], kwargs))
        raise _Reached

    handle = first.register_forward_pre_hook(record, with_kwargs=True)
    try:
        stream = batches(images, processor, batch_size=batch_size, accelerator=accelerator, model_config=model.config)
        for batch in stream:
            if "pixel_values" in batch:
                index = batch["index"]
                try:
                    model(pixel_values=batch["pixel_values"])
                except _Reached:
                    continue
    finally:
        handle.remove()
    return kept


def _shared_stages(dense: nn.Module, names: list[str], kept: list[_Batch], accelerator: "Accelerator") -> list[_Stage]:
    """The stages as the first process sees them: another may have been left without images."""
    from accelerate.utils import broadcast_object_list

    shared: list[Any] = [_stages(dense, names, kept[0]) if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(shared)
    return shared[0]


@torch.no_grad()
def _stages(dense: nn.Module, names: list[str], batch: _Batch) -> list[_Stage]:
    """Linears grouped by the tensor that they read, in forward order; finds those that write to the residual stream."""
    seen = _Seen()
    with _watching(dense, names, seen, stop=False):
        out = dense(batch.dense, *batch.args, **batch.kwargs)
    stages: list[_Stage] = []
    for name, tensor in seen.inputs.items():
        if stages and seen.inputs[stages[-1].names[0]] is tensor:
            stages[-1].names.append(name)
        else:
            stages.append(_Stage([name]))
    writers = [s for s in stages if len(s.names) == 1 and seen.outputs[s.names[0]].shape == out.shape]
    total = batch.dense + sum(seen.outputs[s.names[0]] for s in writers)
    if writers and torch.allclose(total, out, rtol=1e-4, atol=1e-4 * float(out.abs().max())):
        for stage in writers:
            stage.residual = True
    return stages


class _StageSums:
    """Weighted sums over tokens for the Linears of a stage, apart for fitted and held-back images."""

    def __init__(
        self, stage: _Stage, earlier: list[_Stage], layer: nn.Module, token_weights: dict[str, Tensor | None]
    ) -> None:
        self.stage, self.layer, self.token_weights = stage, layer, token_weights
        self.earlier = [s.names[0] for s in earlier if s.residual]
        self.sums: dict[tuple[str, bool], list[Tensor]] = {}
        for name in stage.names:
            linear: Any = layer.get_submodule(name)
            (out, into), device = linear.weight.shape, linear.weight.device
            for part in (False, True):
                shapes = [(), (into,), (out,), (into, into), (out, into)]
                self.sums[name, part] = [torch.zeros(s, dtype=torch.float64, device=device) for s in shapes]

    @torch.no_grad()
    def add(self, dense: nn.Module, batch: _Batch) -> None:
        """Run one batch through the dense and the pruned layer as far as the stage."""
        watched = [*self.earlier, *self.stage.names]
        wanted, have = _Seen(), _Seen()
        with _watching(dense, watched, wanted, stop=True):
            dense(batch.dense, *batch.args, **batch.kwargs)
        with _watching(self.layer, watched, have, stop=True):
            self.layer(batch.pruned, *batch.args, **batch.kwargs)
        for name in self.stage.names:
            target = wanted.outputs[name]
            if self.stage.residual:
                target = target + batch.dense - batch.pruned
                for other in self.earlier:
                    target = target + wanted.outputs[other] - have.outputs[other]
            self._add(name, have.inputs[name], target, batch.held_back)

    def _add(self, name: str, x: Tensor, target: Tensor, held_back: Tensor) -> None:
        token_weight = self.token_weights[name]
        # Double precision: what single precision rounds off a large mean would be larger than a small variance, and
        # the solution would depend on the order of the images.
        x, target = x.double(), target.double()
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

    def moments(self, name: str, accelerator: "Accelerator") -> tuple[Moments, Moments | None]:
        """(fitted, held back), added up over processes; no held-back moments where there were no such images."""
        return _finish(self._shared(name, False, accelerator)), self._held_back(name, accelerator)

    def _held_back(self, name: str, accelerator: "Accelerator") -> Moments | None:
        sums = self._shared(name, True, accelerator)
        return _finish(sums) if sums[0] > 0 else None

    def _shared(self, name: str, part: bool, accelerator: "Accelerator") -> list[Any]:
        return [accelerator.reduce(value, "sum") for value in self.sums[name, part]]


def _finish(sums: list[Any]) -> Moments:
    weight, x, t, xx, tx = sums
    x, t = x / weight, t / weight
    return Moments(x, t, xx / weight - torch.outer(x, x), tx / weight - torch.outer(t, x))


@torch.no_grad()
def _advance(dense: nn.Module, pruned: nn.Module, kept: list[_Batch]) -> None:
    for batch in kept:
        batch.dense = dense(batch.dense, *batch.args, **batch.kwargs)
        batch.pruned = pruned(batch.pruned, *batch.args, **batch.kwargs)
