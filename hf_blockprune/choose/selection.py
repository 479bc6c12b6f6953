"""Which blocks of a model go: from its layers' statistics to one mask for each. The model stays as it is.

Layers' traces are shared out over processes; the allocation, which is cheap, every process makes from the same traces.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import BlockPruneConfig, MoveName
from ..cost.flops import ModelFlops
from ..display.stages import stage
from ..errors import BudgetError
from ..hub.blockprune_tokens import unmerged
from ..model.layers import shape_of
from ..model.structure import TransformerLayer, find_transformer_layers
from ..runs.processes import agreed
from ..runs.timing import timed
from ..score.blocks import grid_shape
from ..score.statistics import LayerStatistics
from ..score.trace import RemovalTrace
from .allocation import Allocation, CostBudget, allocate
from .budgets import ModelBudget, block_power
from .coupling import correct, drop_unused
from .on_device import meet_devices
from .shrink_options import head_options, head_step, unit_options
from .shrinking import Shrinking, Shrunk
from .state import SelectionState
from .tracing import Tracer
from .true_loss import loss_factors, true_losses

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

SPENDING_ROUNDS = 8
SHRINKING_ROUNDS = 2


@dataclass(frozen=True)
class Selection:
    """What was chosen, and how.

    Attributes:
        allocation: the masks, with the losses that they were predicted to cost.
        loss_factors: true over predicted loss by layer, empty where it was not measured.
        shrunk: the Linears that the masks are of; smaller ones where units or heads left.
        trace_seconds: time that each layer's traces took, on the processes that made them.
        seconds: time of each stage.
    """

    allocation: Allocation
    loss_factors: dict[str, float]
    shrunk: Shrunk
    trace_seconds: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Selector:
    """Chooses the masks of one model.

    Args:
        model: the dense model, left as it was.
        targets: the Linears by name.
        statistics: theirs, as the config's method needs them.
        flops: of the dense model.
        budgets: what must be met; see `model_budgets`.
        config: how to prune.
        accelerator: the processes.
        pixels: images to measure true losses on, [images, channels, height, width]; needed where the config has
            rounds of them.
        moves: what may leave, "blocks", "units" and "heads".
        gone: blocks that left before, bool [block_rows, block_cols] by name; where there are any, they stay gone.
        state: keeps what takes long, and gives back what an interrupted run had; by default nothing is kept.
    """

    model: "PreTrainedModel"
    targets: dict[str, nn.Linear]
    statistics: dict[str, LayerStatistics]
    flops: ModelFlops
    budgets: list[ModelBudget]
    config: BlockPruneConfig
    accelerator: "Accelerator"
    pixels: Tensor | None = None
    moves: tuple[MoveName, ...] = ("blocks",)
    gone: dict[str, Tensor] = field(default_factory=dict)
    state: SelectionState = field(default_factory=SelectionState)

    @cached_property
    def layers(self) -> list[TransformerLayer]:
        """Those whose Linears are known to feed each other, where the method can tell what that means."""
        return find_transformer_layers(self.model, self.targets) if self.config.scoring.fisher else []

    def select(self, factors: dict[str, float] | None = None) -> Selection:
        """Choose the blocks to keep, and before that the features, where they may leave.

        Args:
            factors: true over predicted loss by layer, as far as that is known; where it is measured, more comes in.

        Raises:
            ModelError: a layer's inputs are too dependent.
            BudgetError: no mask meets the budgets.
        """
        seconds, factors = {}, dict(factors or {})
        if not self.moves:
            return self._untouched()
        tracer = Tracer(self.targets, self.config, self.accelerator, self.gone, self.state)
        now, traces = Shrunk(self.targets, self.statistics, self.budgets), None
        if self.blocks_leave:
            with timed(seconds, "saliency"), tracer.stage("saliency", tracer.layers(self.statistics)) as bar:
                traces = tracer.traces(self.statistics, bar)
        with timed(seconds, "shrinking"):
            shrinking = self._shrinking(tracer, now)
            now, traces = self._shrunk(tracer, shrinking, now, traces, factors)
        with timed(seconds, "allocation"):
            allocation, coupled = self._coupled(tracer, now, traces, factors)
        for number in range(_true_loss_rounds(self.config)):
            with timed(seconds, "true losses"):
                factors = self._measured(factors, now, allocation, number)
            with timed(seconds, "shrinking"):
                now, traces = self._shrunk(tracer, shrinking, now, traces, factors)
            with timed(seconds, "allocation"):
                allocation, coupled = self._coupled(tracer, now, traces, factors)
        if self.layers and self.blocks_leave and _spends(self.config):
            with timed(seconds, "allocation"):
                allocation = self._without_unused(now, allocation, coupled, factors)
        return Selection(allocation, factors, now, tracer.seconds, seconds)

    def _untouched(self) -> Selection:
        """All blocks and features, where nothing of weights may leave.

        Raises:
            BudgetError: that is too much.
        """
        now = Shrunk(self.targets, self.statistics, self.budgets)
        allocation = _all_kept(now, self.config.block_shape)
        for budget in self.budgets:
            if budget.left(allocation.masks) < -1e-9 * budget.asked:
                reached = budget.of(allocation.masks) / budget.blocks.whole
                raise BudgetError(
                    f"{budget.blocks.name}: {budget.blocks.ratio:.4f} cannot be met by tokens alone, which leave "
                    f"{reached:.4f}; raise the budget, let more tokens merge, or add to moves"
                )
        return Selection(allocation, {}, now, {}, {})

    @property
    def blocks_leave(self) -> bool:
        """Whether blocks are among what may leave."""
        return "blocks" in self.moves

    def _shrinking(self, tracer: Tracer, whole: Shrunk) -> Shrinking | None:
        """The ways to shrink that there are, None where nothing may."""
        units = "units" in self.moves and bool(self.layers)
        heads = [layer for layer in self.layers if "heads" in self.moves]
        if not units and not heads:
            return None
        least, step = self.config.min_kept_per_layer, self.config.block_shape[0]
        mlps = []
        if units:
            readers = {layer.fc2: self.statistics[layer.fc2] for layer in self.layers}
            with tracer.stage("shrinking", list(readers)) as bar:
                found = tracer.traces(readers, bar, columns=True)
            mlps = [unit_options(layer, found[layer.fc2], step, least) for layer in self.layers]
        size = head_step(self.config.block_shape if self.blocks_leave else None) if self.config.rotates else None
        attentions = [
            (layer, head_options(layer, self.targets, self.statistics, step=size, damping=self.config.damping))
            for layer in heads
        ]
        return Shrinking(whole, agreed(attentions, self.accelerator), mlps, self.config.damping)

    def _shrunk(
        self,
        tracer: Tracer,
        shrinking: Shrinking | None,
        now: Shrunk,
        traces: dict[str, RemovalTrace] | None,
        factors: dict[str, float],
    ) -> tuple[Shrunk, dict[str, RemovalTrace] | None]:
        """The layers as they should be, and the traces of their blocks; chosen again as these become known."""
        if shrinking is None:
            return now, traces
        if traces is None:
            return shrinking.choose(factors, None), None
        coupled = [name for layer in self.layers for name in layer.names()]
        with tracer.stage("shrinking", coupled, SHRINKING_ROUNDS) as bar:
            for _ in range(SHRINKING_ROUNDS):
                before, now = now, shrinking.choose(factors, traces, now)
                if now.shapes == before.shapes:
                    break
                changed = {name: now.statistics[name] for name in _resized(before, now)}
                traces = {**traces, **tracer.traces(changed, bar, now.linears)}
        return now, traces

    def _allocate(
        self,
        now: Shrunk,
        traces: dict[str, RemovalTrace],
        factors: dict[str, float],
        budgets: list[ModelBudget] | None = None,
    ) -> Allocation:
        """Under the budgets, or others."""
        traces = {name: replace(trace, loss=trace.loss * factors.get(name, 1.0)) for name, trace in traces.items()}
        return meet_devices(partial(self._once, now), traces, now.budgets if budgets is None else budgets)

    def _once(self, now: Shrunk, traces: dict[str, RemovalTrace], budgets: list[CostBudget]) -> Allocation:
        return allocate(
            traces,
            budgets,
            power=block_power(now.linears, self.flops, self.config.block_shape),
            min_kept=self.config.min_kept_per_layer,
            power_weight=self.config.power_weight if self.config.scoring.loss else 0.0,
            balance=self.config.balance,
        )

    def _coupled(
        self, tracer: Tracer, now: Shrunk, traces: dict[str, RemovalTrace] | None, factors: dict[str, float]
    ) -> tuple[Allocation, dict[str, RemovalTrace]]:
        """Allocate, then again with traces that know what the last allocation left of the neighbours.

        Without traces all blocks stay.

        Returns:
            The allocation, and the traces that it was made from.
        """
        if traces is None:
            return _all_kept(now, self.config.block_shape), {}
        layers, shape = self.layers, self.config.block_shape
        rounds = self.config.coupling_rounds if layers else 0
        names = {name for layer in layers for name in layer.names()}
        coupled = [name for name in self.targets if name in names]
        with tracer.stage("allocation", coupled, rounds) as bar:
            allocation = self._allocate(now, traces, factors)
            for _ in range(rounds):
                corrected = correct(layers, now.linears, now.statistics, allocation.masks, shape)
                traces = {**traces, **tracer.traces(corrected, bar, now.linears)}
                before, allocation = allocation, self._allocate(now, traces, factors)
                if all(torch.equal(mask, before.masks[name]) for name, mask in allocation.masks.items()):
                    break
        return allocation, traces

    def _without_unused(
        self, now: Shrunk, allocation: Allocation, traces: dict[str, RemovalTrace], factors: dict[str, float]
    ) -> Allocation:
        """Give up blocks that neighbours made useless, and spend what they cost on others.

        More to spend keeps other features alive, so how much more is found by bisection.
        """
        best = self._used_part(now, allocation)
        spare = [budget.left(best.masks) for budget in now.budgets]
        low, share, high = 0.0, 1.0, 1.0
        with stage("spending", SPENDING_ROUNDS, unit="rounds") as bar:
            for _ in bar.over(range(SPENDING_ROUNDS)):
                current = self._spent(now, traces, factors, [share * more for more in spare])
                if current is not None and min(b.left(current.masks) for b in now.budgets) >= 0:
                    low, best = share, max(best, current, key=lambda a: a.kept_cost[0])
                else:
                    high = share
                if low == high:
                    break
                share = (low + high) / 2
        return best

    def _spent(
        self, now: Shrunk, traces: dict[str, RemovalTrace], factors: dict[str, float], more: list[float]
    ) -> Allocation | None:
        """The used part of an allocation under more than each budget, or None where there is none."""
        loose = [
            b.with_ratio(min(1.0, b.blocks.ratio + extra / b.blocks.whole))
            for b, extra in zip(now.budgets, more, strict=True)
        ]
        try:
            return self._used_part(now, self._allocate(now, traces, factors, loose))
        except BudgetError:  # blocks may be too coarse for what lies in between
            return None

    def _used_part(self, now: Shrunk, allocation: Allocation) -> Allocation:
        masks = drop_unused(self.layers, allocation.masks, now.linears, self.config.block_shape)
        return replace(allocation, masks=masks, kept_cost=tuple(b.blocks.kept(masks) for b in now.budgets))

    def _measured(
        self, factors: dict[str, float], now: Shrunk, allocation: Allocation, number: int
    ) -> dict[str, float]:
        """All Linears' factors, corrected by the true losses of this allocation, group by group."""
        assert self.pixels is not None
        groups = [pair for layer in self.layers for pair in layer.pairs()]
        grouped = {name for pair in groups for name in pair}
        groups += [(name,) for name in self.targets if name not in grouped]
        # However little a layer changes, other tokens merge behind it, which has nothing to do with how much it lost.
        with unmerged(self.model):
            losses = true_losses(
                self.model,
                groups,
                allocation.masks,
                self.statistics,
                self.config.block_shape,
                self.pixels,
                accelerator=self.accelerator,
                damping=self.config.damping,
                kept=now.kept(),
                state=self.state,
                number=number,
            )
        shrunk = now.losses(factors)
        predicted = [sum(allocation.loss[name] + shrunk.get(name, 0.0) for name in group) for group in groups]
        corrections = loss_factors(losses, predicted)
        measured = {name: c for group, c in zip(groups, corrections, strict=True) for name in group}
        return factors | {name: factors.get(name, 1.0) * correction for name, correction in measured.items()}


def _resized(before: Shrunk, now: Shrunk) -> list[str]:
    """Names of the Linears of which other features stay than before."""
    shapes = {shape.layer: shape for shape in before.shapes}
    found = []
    for shape in now.shapes:
        old, layer = shapes.get(shape.layer), shape.layer
        if old is None or (old.heads, old.head_size) != (shape.heads, shape.head_size):
            found += [layer.query, layer.key, layer.value, layer.out]
        if old is None or old.units != shape.units:
            found += [layer.fc1, layer.fc2]
    return found


def _all_kept(now: Shrunk, block_shape: tuple[int, int]) -> Allocation:
    grids = {name: grid_shape(shape_of(linear), block_shape) for name, linear in now.linears.items()}
    masks = {name: torch.ones(grid, dtype=torch.bool) for name, grid in grids.items()}
    kept = tuple(b.blocks.blocks for b in now.budgets)
    return Allocation(masks, kept, dict.fromkeys(now.linears, 0.0), 0.0)


def selection_stages(config: BlockPruneConfig) -> list[str]:
    """The stages of a selection that are shown."""
    rounds, moves = _true_loss_rounds(config), set(config.allowed_moves)
    if not moves:
        return []
    shrinking = ["shrinking"] if moves - {"blocks"} else []
    if "blocks" not in moves:
        return [*shrinking, *["true losses"] * rounds]
    measured = ["true losses", *shrinking, "allocation"] * rounds
    spending = ["spending"] if config.scoring.fisher and _spends(config) else []
    return ["saliency", *shrinking, *shrinking, "allocation", *measured, *spending]


def _true_loss_rounds(config: BlockPruneConfig) -> int:
    return config.true_loss_rounds if config.scoring.fisher else 0


def _spends(config: BlockPruneConfig) -> bool:
    """Balanced rows cannot do without blocks that other rows have, used or not."""
    return config.coupling_rounds > 0 and not config.balance
