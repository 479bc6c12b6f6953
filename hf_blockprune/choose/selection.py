"""Which blocks of a model go: from its layers' statistics to one mask for each. The model stays as it is.

Layers' traces are shared out over processes; the allocation, which is cheap, every process makes from the same traces.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import BlockPruneConfig
from ..cost.flops import ModelFlops
from ..display.stages import stage
from ..errors import BudgetError
from ..model.structure import TransformerLayer, find_transformer_layers
from ..runs.timing import timed
from ..score.statistics import LayerStatistics
from ..score.trace import RemovalTrace
from .allocation import Allocation, CostBudget, allocate
from .budgets import ModelBudget, block_power
from .coupling import correct, drop_unused
from .on_device import meet_devices
from .state import SelectionState
from .tracing import Tracer
from .true_loss import loss_factors, true_losses

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

SPENDING_ROUNDS = 8


@dataclass(frozen=True)
class Selection:
    """What was chosen, and how.

    Attributes:
        allocation: the masks, with the losses that they were predicted to cost.
        loss_factors: true over predicted loss by layer, empty where it was not measured.
        trace_seconds: time that each layer's traces took, on the processes that made them.
        seconds: time of each stage.
    """

    allocation: Allocation
    loss_factors: dict[str, float]
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
    gone: dict[str, Tensor] = field(default_factory=dict)
    state: SelectionState = field(default_factory=SelectionState)

    @cached_property
    def layers(self) -> list[TransformerLayer]:
        """Those whose Linears are known to feed each other, where the method can tell what that means."""
        return find_transformer_layers(self.model, self.targets) if self.config.scoring.fisher else []

    def select(self, factors: dict[str, float] | None = None) -> Selection:
        """Choose the blocks to keep.

        Args:
            factors: true over predicted loss by layer, as far as that is known; where it is measured, more comes in.

        Raises:
            ModelError: a layer's inputs are too dependent.
            BudgetError: no mask meets the budgets.
        """
        seconds, factors = {}, dict(factors or {})
        tracer = Tracer(self.targets, self.config, self.accelerator, self.gone, self.state)
        with timed(seconds, "saliency"), tracer.stage("saliency", tracer.layers(self.statistics)) as bar:
            traces = tracer.traces(self.statistics, bar)
        with timed(seconds, "allocation"):
            allocation, coupled = self._coupled(tracer, traces, factors)
        for number in range(_true_loss_rounds(self.config)):
            with timed(seconds, "true losses"):
                factors = self._measured(factors, allocation, number)
            with timed(seconds, "allocation"):
                allocation, coupled = self._coupled(tracer, traces, factors)
        if self.layers and _spends(self.config):
            with timed(seconds, "allocation"):
                allocation = self._without_unused(allocation, coupled, factors)
        return Selection(allocation, factors, tracer.seconds, seconds)

    def _allocate(
        self, traces: dict[str, RemovalTrace], budgets: list[ModelBudget], factors: dict[str, float]
    ) -> Allocation:
        traces = {name: replace(trace, loss=trace.loss * factors.get(name, 1.0)) for name, trace in traces.items()}
        return meet_devices(self._once, traces, budgets)

    def _once(self, traces: dict[str, RemovalTrace], budgets: list[CostBudget]) -> Allocation:
        return allocate(
            traces,
            budgets,
            power=block_power(self.targets, self.flops, self.config.block_shape),
            min_kept=self.config.min_kept_per_layer,
            power_weight=self.config.power_weight if self.config.scoring.loss else 0.0,
            balance=self.config.balance,
        )

    def _coupled(
        self, tracer: Tracer, traces: dict[str, RemovalTrace], factors: dict[str, float]
    ) -> tuple[Allocation, dict[str, RemovalTrace]]:
        """Allocate, then again with traces that know what the last allocation left of the neighbours.

        Returns:
            The allocation, and the traces that it was made from.
        """
        layers, shape = self.layers, self.config.block_shape
        rounds = self.config.coupling_rounds if layers else 0
        names = {name for layer in layers for name in layer.names()}
        coupled = [name for name in self.targets if name in names]
        with tracer.stage("allocation", coupled, rounds) as bar:
            allocation = self._allocate(traces, self.budgets, factors)
            for _ in range(rounds):
                corrected = correct(layers, self.targets, self.statistics, allocation.masks, shape)
                traces = {**traces, **tracer.traces(corrected, bar)}
                before, allocation = allocation, self._allocate(traces, self.budgets, factors)
                if all(torch.equal(mask, before.masks[name]) for name, mask in allocation.masks.items()):
                    break
        return allocation, traces

    def _without_unused(
        self, allocation: Allocation, traces: dict[str, RemovalTrace], factors: dict[str, float]
    ) -> Allocation:
        """Give up blocks that neighbours made useless, and spend what they cost on others.

        More to spend keeps other features alive, so how much more is found by bisection.
        """
        best = self._used_part(allocation)
        spare = [budget.left(best.masks) for budget in self.budgets]
        low, share, high = 0.0, 1.0, 1.0
        with stage("spending", SPENDING_ROUNDS, unit="rounds") as bar:
            for _ in bar.over(range(SPENDING_ROUNDS)):
                current = self._spent(traces, factors, [share * more for more in spare])
                if current is not None and min(b.left(current.masks) for b in self.budgets) >= 0:
                    low, best = share, max(best, current, key=lambda a: a.kept_cost[0])
                else:
                    high = share
                if low == high:
                    break
                share = (low + high) / 2
        return best

    def _spent(
        self, traces: dict[str, RemovalTrace], factors: dict[str, float], more: list[float]
    ) -> Allocation | None:
        """The used part of an allocation under more than each budget, or None where there is none."""
        loose = [
            b.with_ratio(min(1.0, b.blocks.ratio + extra / b.blocks.whole))
            for b, extra in zip(self.budgets, more, strict=True)
        ]
        try:
            return self._used_part(self._allocate(traces, loose, factors))
        except BudgetError:  # blocks may be too coarse for what lies in between
            return None

    def _used_part(self, allocation: Allocation) -> Allocation:
        masks = drop_unused(self.layers, allocation.masks, self.targets, self.config.block_shape)
        return replace(allocation, masks=masks, kept_cost=tuple(b.blocks.kept(masks) for b in self.budgets))

    def _measured(self, factors: dict[str, float], allocation: Allocation, number: int) -> dict[str, float]:
        """All Linears' factors, corrected by the true losses of this allocation, group by group."""
        assert self.pixels is not None
        groups = [pair for layer in self.layers for pair in layer.pairs()]
        grouped = {name for pair in groups for name in pair}
        groups += [(name,) for name in self.targets if name not in grouped]
        losses = true_losses(
            self.model,
            groups,
            allocation.masks,
            self.statistics,
            self.config.block_shape,
            self.pixels,
            accelerator=self.accelerator,
            damping=self.config.damping,
            state=self.state,
            number=number,
        )
        predicted = [sum(allocation.loss[name] for name in group) for group in groups]
        corrections = loss_factors(losses, predicted)
        measured = {name: c for group, c in zip(groups, corrections, strict=True) for name in group}
        return factors | {name: factors.get(name, 1.0) * correction for name, correction in measured.items()}


def selection_stages(config: BlockPruneConfig) -> list[str]:
    """The stages of a selection that are shown."""
    measured = ["true losses", "allocation"] * _true_loss_rounds(config)
    spending = ["spending"] if config.scoring.fisher and _spends(config) else []
    return ["saliency", "allocation", *measured, *spending]


def _true_loss_rounds(config: BlockPruneConfig) -> int:
    return config.true_loss_rounds if config.scoring.fisher else 0


def _spends(config: BlockPruneConfig) -> bool:
    """Balanced rows cannot do without blocks that other rows have, used or not."""
    return config.coupling_rounds > 0 and not config.balance
