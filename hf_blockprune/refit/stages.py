"""Stages of a layer: its Linears by the tensor that they read, and what passes through them on calibration images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..hub.blockprune_merging import Groups, averaged
from ..hub.blockprune_tokens import is_merging
from ..model.layers import Layer, States, groups_of, hidden_states, linear_in, states_of
from ..score.statistics import at_least_float32
from .boundary import BoundaryBatch, StopForward
from .moments import RunningMoments
from .solve import Moments

if TYPE_CHECKING:
    from accelerate import Accelerator

DENSE_BYTES = 2 << 30  # of a dense layer's outputs that are held for all images


@dataclass
class Stage:
    """Linears of a layer that read the same tensor."""

    names: list[str]
    # Whether its output is added to the layer's input, with nothing else before it, to give the residual stream.
    after_input: bool = False
    # Whether its output is the last thing that is added to the residual stream.
    ends_layer: bool = False


@dataclass
class Seen:
    """Inputs and outputs of a layer's Linears in one forward pass, by name, and the layer's own output.

    Attributes:
        groups: of the tokens before the layer and after it, of those that stand for more than themselves.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    end: Tensor | None = None
    groups: list[Groups] = field(default_factory=list)

    def aligned(self, full: Tensor, tokens: int) -> Tensor:
        """States of all tokens, as means over what each of so many tokens stands for at that place of the layer."""
        groups = next((groups for groups in self.groups if groups.sizes.shape[1] == tokens), None)
        return full if groups is None else averaged(full, groups)


@contextmanager
def _watching(layer: nn.Module, names: list[str], seen: Seen, *, stop: bool, keep: bool = False) -> Iterator[None]:
    """Record inputs and outputs of the named Linears; with `stop`, end the pass when all have been seen.

    With `keep` they are copies of outputs alone: what comes next may write over what it reads.
    """

    def hook(name: str):
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if keep:
                seen.outputs[name] = output.clone()
            else:
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


def shared_stages(
    layer: Layer, whole: nn.Module, names: list[str], kept: list[BoundaryBatch], accelerator: "Accelerator"
) -> list[Stage]:
    """The stages of a dense layer as the first process sees them: another may have been left without images."""
    from accelerate.utils import broadcast_object_list

    shared: list[list[Stage]] = [_stages(layer, whole, names, kept[0].dense) if accelerator.is_main_process else []]
    if accelerator.num_processes > 1:
        broadcast_object_list(shared)
    return shared[0]


@torch.no_grad()
def _stages(layer: Layer, whole: nn.Module, names: list[str], states: Tensor) -> list[Stage]:
    """Linears of a dense layer by the tensor that they read, in forward order; finds those that write to the stream."""
    seen = Seen()
    with _watching(whole, names, seen, stop=False):
        out = hidden_states(layer.run(states, whole))
    stages: list[Stage] = []
    for name, tensor in seen.inputs.items():
        if stages and seen.inputs[stages[-1].names[0]] is tensor:
            stages[-1].names.append(name)
        else:
            stages.append(Stage([name]))
    writers = [s for s in stages if len(s.names) == 1 and seen.outputs[s.names[0]].shape == out.shape]
    if len(writers) == 2 and _close(sum((seen.outputs[s.names[0]] for s in writers), states), out):
        writers[0].after_input = writers[1].ends_layer = True
    elif writers:
        writers[-1].ends_layer = _is_added_last(layer, whole, writers[-1].names[0], states, out)
    return stages


def _is_added_last(layer: Layer, whole: nn.Module, name: str, states: Tensor, out: Tensor) -> bool:
    """Whether what is added to a Linear's output is added to the layer's output, no more and no less."""
    more = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype, device=out.device) * out.std()

    def add(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output + more

    handle = whole.get_submodule(name).register_forward_hook(add)
    try:
        return _close(hidden_states(layer.run(states, whole)), out + more)
    finally:
        handle.remove()


def _close(have: Tensor, want: Tensor) -> bool:
    tolerance = max(1e-4, 8 * torch.finfo(want.dtype).eps)  # in half precision sums differ by some units
    return torch.allclose(have, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


def _run(layer: Layer, module: nn.Module, stage: Stage, states: States) -> Seen:
    """What a layer's Linears see and give as far as a stage; to its end, where tokens merge within the layer."""
    seen, merging = Seen(), is_merging(module)
    with _watching(module, stage.names, seen, stop=not stage.ends_layer and not merging), _watching_end(module, seen):
        layer.run(states, module)
    if (before := groups_of(states)) is not None:
        seen.groups.append(before)
    return seen


@contextmanager
def _watching_end(module: nn.Module, seen: Seen) -> Iterator[None]:
    """Record what a layer gives, before the last one gives every patch a state again."""

    def record(module: nn.Module, inputs: object, output: object) -> None:
        states = states_of(module, output)
        seen.end = hidden_states(states)
        if (after := groups_of(states)) is not None:
            seen.groups.append(after)

    handle = module.register_forward_hook(record)
    try:
        yield
    finally:
        handle.remove()


class DenseOutputs:
    """What the Linears of a dense layer give for each batch; of one pass where memory allows, else of one a stage.

    Args:
        layer: how it is called.
        module: the dense layer.
        stages: in forward order.
        kept: the batches.
    """

    def __init__(self, layer: Layer, module: nn.Module, stages: list[Stage], kept: list[BoundaryBatch]) -> None:
        self.layer, self.module, self.kept = layer, module, kept
        names = [name for stage in stages for name in stage.names]
        width = sum(linear_in(module, name).out_features for name in names)
        states = sum(batch.dense.numel() * batch.dense.element_size() for batch in kept)
        self.once = states * (1 + width / max(kept[0].dense.shape[-1], 1)) <= DENSE_BYTES if kept else False
        self._seen = [self._whole(names, batch.dense) for batch in kept] if self.once else []

    @torch.no_grad()
    def _whole(self, names: list[str], states: Tensor) -> Seen:
        seen = Seen()
        with _watching(self.module, names, seen, stop=False, keep=True):
            seen.end = hidden_states(self.layer.run(states, self.module))
        return seen

    @torch.no_grad()
    def of(self, stage: Stage, index: int) -> Seen:
        """As far as a stage, for a batch by its number."""
        return self._seen[index] if self.once else _run(self.layer, self.module, stage, self.kept[index].dense)

    def done(self, stage: Stage) -> None:
        """Let go of a stage's outputs."""
        for seen in self._seen:
            for name in stage.names:
                del seen.outputs[name]

    @torch.no_grad()
    def ends(self) -> Iterator[Tensor]:
        """The layer's own output for each batch."""
        for index, batch in enumerate(self.kept):
            end = self._seen[index].end if self.once else None
            yield hidden_states(self.layer.run(batch.dense, self.module)) if end is None else end


class StageSums:
    """Weighted sums over tokens for the Linears of a stage, apart for fitted and held-back images.

    Args:
        stage: of a layer.
        layer: the pruned one.
        token_weights: [tokens] by name within the layer, None where all weigh the same.
        inputs: those that are summed over, by name.
        outputs: of the dense Linear, those that are aimed at, by name; None for all.
    """

    def __init__(
        self,
        stage: Stage,
        layer: Layer,
        token_weights: dict[str, Tensor | None],
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor | None],
    ) -> None:
        self.stage, self.layer, self.token_weights = stage, layer, token_weights
        self.inputs, self.outputs = inputs, outputs
        self.sums: dict[tuple[str, bool], RunningMoments] = {}
        for name in stage.names:
            linear = linear_in(layer.module, name)
            for part in (False, True):
                self.sums[name, part] = RunningMoments(len(inputs[name]), linear.out_features, linear.weight.device)

    @torch.no_grad()
    def add(self, wanted: Seen, batch: BoundaryBatch) -> None:
        """Run one batch through the pruned layer as far as the stage; `wanted` is what the dense one gives."""
        have = _run(self.layer, self.layer.module, self.stage, batch.pruned)
        for name in self.stage.names:
            tokens, chosen = have.inputs[name].shape[1], self.outputs[name]
            target = have.aligned(wanted.outputs[name], tokens)
            target = target if chosen is None else target[..., chosen.to(target.device)]
            if self.stage.after_input:
                target = target + have.aligned(batch.dense, tokens) - hidden_states(batch.pruned)
            elif self.stage.ends_layer:
                assert wanted.end is not None
                assert have.end is not None
                target = have.aligned(wanted.end, tokens) - (have.end - have.outputs[name])
            self._add(name, have.inputs[name], target, batch.held_back)

    def _add(self, name: str, x: Tensor, target: Tensor, held_back: Tensor) -> None:
        token_weight = self.token_weights[name]
        x, target = at_least_float32(x[..., self.inputs[name]]), at_least_float32(target)
        # Windows of an image follow each other in the first axis. A Linear that kept no block has no inputs here, so
        # that the number of tokens follows from its outputs.
        tokens = target[..., 0].numel() // len(held_back)
        x, target = (values.reshape(len(held_back), tokens, values.shape[-1]) for values in (x, target))
        for part in (False, True):
            chosen = held_back == part
            xs, ts = x[chosen].flatten(0, 1), target[chosen].flatten(0, 1)
            weight = xs.new_ones(len(xs)) if token_weight is None else token_weight.to(xs).repeat(int(chosen.sum()))
            self.sums[name, part].add(xs, ts, weight)

    def moments(self, name: str, accelerator: "Accelerator") -> tuple[Moments, Moments | None]:
        """(fitted, held back), added up over processes; no held-back moments where there were no such images."""
        fitted, held_back = (self.sums[name, part].over(accelerator) for part in (False, True))
        return fitted.moments(), held_back.moments() if held_back.weight > 0 else None
