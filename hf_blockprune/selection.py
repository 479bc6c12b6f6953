"""Which blocks of a model go: from its layers' statistics to one mask for each.

Layers' traces are shared out over processes; the allocation, which is cheap, every process makes from the same traces.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .allocation import Allocation, CostBudget, allocate
from .block_costs import ModelBudget, block_power, model_budget
from .config import BlockPruneConfig
from .coupling import correct, drop_unused
from .devices import meet_devices
from .display import Stage, stage
from .errors import BudgetError, ModelError
from .hardware.flops import ModelFlops
from .layer_statistics import LayerStatistics
from .methods import TraceSettings
from .permutation import Move, apply_moves, block_saliency_kept, packing_moves, sorting_moves
from .residual import choose_order, permute_statistics, permute_stream
from .saliency import RemovalTrace, gone_first
from .selection_state import SelectionState
from .structure import TransformerLayer, find_residual_stream, find_transformer_layers
from .true_loss import loss_factors, true_losses

if TYPE_CHECKING:
    from accelerate import Accelerator

SPENDING_ROUNDS = 8


@dataclass
class Selection:
    """Chooses the masks of one model.

    Args:
        model: the dense model; features change places in it where the config permutes.
        targets: the Linears by name.
        statistics: theirs, as the config's method needs them.
        flops: of the dense model.
        config: how to prune.
        accelerator: the processes.
        pixels: images to measure true losses on, [images, channels, height, width]; needed where the config has
            rounds of them.
        gone: blocks that left before, bool [block_rows, block_cols] by name; where there are any, they stay gone.
        state: keeps what takes long, and gives back what an interrupted run had; by default nothing is kept.

    Attributes:
        seconds: time of each stage.
        permutation: how well saliency is packed into blocks before and after, and the residual stream's new order; or
            None.
        trace_seconds: time that each layer's traces took, on the process that made them.
        loss_factors: true over predicted loss by layer, 1 where it was not measured.
    """

    model: nn.Module
    targets: dict[str, nn.Linear]
    statistics: dict[str, LayerStatistics]
    flops: ModelFlops
    config: BlockPruneConfig
    accelerator: "Accelerator"
    pixels: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    permutation: dict[str, Any] | None = None
    trace_seconds: dict[str, float] = field(default_factory=dict)
    loss_factors: dict[str, float] = field(default_factory=dict)
    gone: dict[str, Tensor] = field(default_factory=dict)
    state: SelectionState = field(default_factory=SelectionState)
    _times_traced: int = field(default=0, init=False)
    _times_measured: int = field(default=0, init=False)

    @cached_property
    def budgets(self) -> list[ModelBudget]:
        """What must be met."""
        wanted = [b for b in (self.config.budget, self.config.second_budget) if b is not None]
        shape = self.config.block_shape
        return [model_budget(budget, self.model, self.targets, self.flops, shape) for budget in wanted]

    def run(self) -> Allocation:
        """Permute where the config says so, and choose the blocks to keep.

        Raises:
            ModelError: a layer's inputs are too dependent.
            BudgetError: no mask meets the budget.
        """
        layers = find_transformer_layers(self.model, self.targets) if self.config.scoring.fisher else []
        if self.config.permutes and layers:
            with timed(self.seconds, "permutation"), stage("permutation", len(layers), unit="layers") as bar:
                self._permute(layers, bar)
        with timed(self.seconds, "saliency"), self._stage("saliency", self._with(self.statistics)) as bar:
            traces = self._traces(self.statistics, bar)
        with timed(self.seconds, "allocation"):
            allocation, coupled = self._coupled(layers, traces)
        for _ in range(self.config.true_loss_rounds if self.config.scoring.fisher else 0):
            with timed(self.seconds, "true losses"):
                self._measure(layers, allocation)
            with timed(self.seconds, "allocation"):
                allocation, coupled = self._coupled(layers, traces)
        # Balanced rows cannot do without blocks that other rows have, used or not.
        if layers and self.config.coupling_rounds and not self.config.balance:
            with timed(self.seconds, "allocation"):
                allocation = self._without_unused(layers, allocation, coupled)
        return allocation

    def _stage(self, name: str, layers: list[str], rounds: int = 1) -> AbstractContextManager[Stage]:
        """Show a stage that takes the traces of layers, in so many rounds at most."""
        mine = self._mine(layers)
        work = rounds * sum(self._work(name) for name in mine)
        return stage(name, rounds * len(mine) or None, unit="layers", work=work)

    def _work(self, name: str) -> float:
        """How long a layer's trace takes beside others, by what it has to compute."""
        linear = self.targets[name]
        return float(linear.out_features * linear.in_features**self.config.scoring.in_features_power)

    def _permute(self, layers: list[TransformerLayer], bar: Stage) -> None:
        budget = self.budgets[0].blocks
        share = max(0.0, 1 - budget.needed / budget.blocks)
        names = {name for layer in layers for name in layer.names()}
        coupled = {name: linear for name, linear in self.targets.items() if name in names}
        shape = self.config.block_shape
        before = block_saliency_kept(coupled, self.statistics, shape, share)
        moves = self._moves("sorting", lambda: sorting_moves(layers, self.targets, self.statistics))
        self.statistics = apply_moves(moves, self.targets, self.statistics)
        order = self._permute_stream(coupled)
        moves = self._moves("packing", lambda: self._packed(layers, bar))
        self.statistics = apply_moves(moves, self.targets, self.statistics)
        after = block_saliency_kept(coupled, self.statistics, shape, share)
        self.permutation = {
            "block_share": share,
            "saliency_kept_before": before,
            "saliency_kept_after": after,
            "residual_order": order,
        }

    def _packed(self, layers: list[TransformerLayer], bar: Stage) -> list[Move]:
        shape = self.config.block_shape
        each = [packing_moves([layer], self.targets, self.statistics, shape) for layer in bar.over(layers)]
        return [move for moves in each for move in moves]

    def _moves(self, which: str, choose: Callable[[], list[Move]]) -> list[Move]:
        return self.state.moves(which, lambda: self._first_process_says(choose()))

    def _permute_stream(self, linears: dict[str, nn.Linear]) -> list[int] | None:
        """The new order of the residual stream; None where it stays, or was not found."""
        stream = find_residual_stream(self.model) if self.config.permutes_stream else None
        if stream is None:
            return None
        shape = self.config.block_shape
        order = self.state.order(
            "stream", lambda: self._first_process_says(choose_order(stream, linears, self.statistics, shape))
        )
        permute_stream(self.model, stream, order)
        self.statistics = permute_statistics(stream, self.statistics, order)
        return order.tolist()

    def _first_process_says(self, value: Any) -> Any:
        """The same object on every process: rounding may let ties fall differently."""
        from accelerate.utils import broadcast_object_list

        shared = [value]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(shared)
        return shared[0]

    def _with(self, statistics: dict[str, LayerStatistics]) -> list[str]:
        """The layers with statistics, or all where the method needs none."""
        return [name for name in self.targets if name in statistics] or list(self.targets)

    def _mine(self, names: list[str]) -> list[str]:
        """This process's share of layers."""
        return names[self.accelerator.process_index :: self.accelerator.num_processes]

    def _traces(self, statistics: dict[str, LayerStatistics], bar: Stage) -> dict[str, RemovalTrace]:
        """Traces of the layers that `_with` names; each made by one process."""
        from accelerate.utils import gather_object

        names, made = self._with(statistics), []
        number, self._times_traced = self._times_traced, self._times_traced + 1
        kept = {name: self.state.trace(number, name, self.targets[name].weight.device) for name in names}
        for name in [name for name in self._mine(names) if kept[name] is not None]:
            bar.advance(work=self._work(name), measured=False)
        for name in self._mine([name for name in names if kept[name] is None]):
            start = perf_counter()
            trace = self._trace(name, statistics.get(name))
            made.append((name, (trace, perf_counter() - start)))
            self.state.keep_trace(number, name, *made[-1][1])
            bar.advance(work=self._work(name))
        every: dict[str, Any] = kept | dict(gather_object(made) if self.accelerator.num_processes > 1 else made)
        for name in names:
            self.trace_seconds[name] = self.trace_seconds.get(name, 0.0) + every[name][1]
        return {name: every[name][0] for name in names}

    def _trace(self, name: str, statistics: LayerStatistics | None) -> RemovalTrace:
        weight, config = self.targets[name].weight.detach(), self.config
        settings = TraceSettings(config.damping, config.memory_mb << 20)
        try:
            trace = config.scoring.trace(weight, statistics, config.block_shape, settings)
            return gone_first(trace, self.gone[name]) if name in self.gone else trace
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise ModelError(
                f"{name}: its inputs are too dependent for {config.method} ({error}); raise damping or use more "
                "calibration images"
            ) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ModelError(f"{name}: too little memory for even one block row at a time ({error})") from error

    def _allocate(self, traces: dict[str, RemovalTrace], budgets: list[ModelBudget]) -> Allocation:
        factors = self.loss_factors
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
        self, layers: list[TransformerLayer], traces: dict[str, RemovalTrace]
    ) -> tuple[Allocation, dict[str, RemovalTrace]]:
        """Allocate, then again with traces that know what the last allocation left of the neighbours.

        Returns:
            The allocation, and the traces that it was made from.
        """
        rounds = self.config.coupling_rounds if layers else 0
        names = {name for layer in layers for name in layer.names()}
        coupled = [name for name in self.targets if name in names]
        with self._stage("allocation", coupled, rounds) as bar:
            allocation = self._allocate(traces, self.budgets)
            for _ in range(rounds):
                corrected = correct(layers, self.targets, self.statistics, allocation.masks, self.config.block_shape)
                traces = {**traces, **self._traces(corrected, bar)}
                before, allocation = allocation, self._allocate(traces, self.budgets)
                if all(torch.equal(mask, before.masks[name]) for name, mask in allocation.masks.items()):
                    break
        return allocation, traces

    def _without_unused(
        self, layers: list[TransformerLayer], allocation: Allocation, traces: dict[str, RemovalTrace]
    ) -> Allocation:
        """Give up blocks that neighbours made useless, and spend what they cost on others.

        More to spend keeps other features alive, so how much more is found by bisection.
        """
        best = self._used_part(layers, allocation)
        spare = [budget.left(best.masks) for budget in self.budgets]
        low, share, high = 0.0, 1.0, 1.0
        with stage("spending", SPENDING_ROUNDS, unit="rounds") as bar:
            for _ in bar.over(range(SPENDING_ROUNDS)):
                current = self._spent(layers, traces, [share * more for more in spare])
                if current is not None and min(b.left(current.masks) for b in self.budgets) >= 0:
                    low, best = share, max(best, current, key=lambda a: a.kept_cost[0])
                else:
                    high = share
                if low == high:
                    break
                share = (low + high) / 2
        return best

    def _spent(
        self, layers: list[TransformerLayer], traces: dict[str, RemovalTrace], more: list[float]
    ) -> Allocation | None:
        """The used part of an allocation under more than each budget, or None where there is none."""
        loose = [
            b.with_ratio(min(1.0, b.blocks.ratio + extra / b.blocks.whole))
            for b, extra in zip(self.budgets, more, strict=True)
        ]
        try:
            return self._used_part(layers, self._allocate(traces, loose))
        except BudgetError:  # blocks may be too coarse for what lies in between
            return None

    def account(self, allocation: Allocation) -> list[dict[str, Any]]:
        """What each budget asked for, and what remains of the dense model's cost, in its unit: the promise."""
        return [budget.account(allocation.masks) for budget in self.budgets]

    def _used_part(self, layers: list[TransformerLayer], allocation: Allocation) -> Allocation:
        masks = drop_unused(layers, allocation.masks, self.targets, self.config.block_shape)
        return replace(allocation, masks=masks, kept_cost=tuple(b.blocks.kept(masks) for b in self.budgets))

    def _measure(self, layers: list[TransformerLayer], allocation: Allocation) -> None:
        """Correct the factors of all Linears by the true losses of this allocation, group by group."""
        assert self.pixels is not None
        groups = [pair for layer in layers for pair in layer.pairs()]
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
            number=self._times_measured,
        )
        self._times_measured += 1
        predicted = [sum(allocation.loss[name] for name in group) for group in groups]
        for group, factor in zip(groups, loss_factors(losses, predicted), strict=True):
            for name in group:
                self.loss_factors[name] = self.loss_factors.get(name, 1.0) * factor


def selection_stages(config: BlockPruneConfig) -> list[str]:
    """The stages of a selection that are shown."""
    fisher = config.scoring.fisher
    measured = ["true losses", "allocation"] * (config.true_loss_rounds if fisher else 0)
    return [
        *(["permutation"] if config.permutes else []),
        "saliency",
        "allocation",
        *measured,
        *(["spending"] if fisher and config.coupling_rounds and not config.balance else []),
    ]


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add up how long a stage took."""
    start = perf_counter()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + perf_counter() - start, 3)
