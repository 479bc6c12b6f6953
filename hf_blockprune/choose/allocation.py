"""Which blocks go: one global problem over all layers.

minimise   sum_q  loss_q(k_q) + power_weight * power of the blocks that remain
subject to cost of the blocks that remain <= budget, for one or two budgets, and a minimum of kept blocks in every layer

Each queue's loss is replaced by its lower convex hull over the cost it saves, and hull segments are taken in the order
of loss per cost saved until the budget is met: for convex losses that is the exact Lagrangian solution, the
equal-slope rule. The last segment is taken in part, so the budget is met to within one step. With two budgets the cost
is a mixture of both; the mixture at which both are met with the least loss is found by bisection, which is the search
for two multipliers with their sum fixed.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..errors import BudgetError
from ..score.trace import RemovalTrace

TOLERANCE = 0.005  # how far the reached budget may lie from the asked one
BISECTIONS = 30


@dataclass(frozen=True)
class CostBudget:
    """A budget, and what keeping each block costs in its unit.

    Attributes:
        costs: float64 [block_rows, block_cols] by layer.
        ratio: share of the model's whole cost, `fixed` included, that may remain.
        fixed: cost of everything that is not a block of these layers.
        name: in error messages.
        dense: cost of the dense model, where these layers are smaller than its; else the sum of the two.
    """

    costs: dict[str, Tensor]
    ratio: float
    fixed: float = 0.0
    name: str = "budget"
    dense: float | None = None

    @property
    def blocks(self) -> float:
        """Cost of all blocks."""
        return sum(float(c.sum()) for c in self.costs.values())

    @property
    def whole(self) -> float:
        """Cost of the dense model."""
        return self.blocks + self.fixed if self.dense is None else self.dense

    @property
    def needed(self) -> float:
        """What has to be saved."""
        return self.blocks + self.fixed - self.ratio * self.whole

    def left_without(self, saved: float) -> float:
        """Share of the dense model's cost that remains once so much is saved."""
        return (self.blocks + self.fixed - saved) / self.whole

    @property
    def block_share(self) -> float:
        """Share of the blocks' cost that may remain."""
        return max(0.0, 1 - self.needed / self.blocks)

    def kept(self, masks: dict[str, Tensor]) -> float:
        """Cost of the blocks that masks keep, bool [block_rows, block_cols] by layer; layers without one count not."""
        return sum(float(self.costs[name][mask].sum()) for name, mask in masks.items())


@dataclass(frozen=True)
class Allocation:
    """The chosen masks.

    Attributes:
        masks: bool [block_rows, block_cols] by layer, True where a block is kept.
        kept_cost: cost of the kept blocks, in each budget's unit.
        loss: predicted loss by layer, in the unit of the traces.
        power_weight: the weight that was used ("auto" resolved).
    """

    masks: dict[str, Tensor]
    kept_cost: tuple[float, ...]
    loss: dict[str, float]
    power_weight: float


@dataclass
class _Queue:
    """One removal order of a layer as arrays over k = 0 ... max steps.

    Attributes:
        order: [steps, blocks a step], flat indices.
        saved: [budgets, steps + 1].
        loss: [steps + 1].
        power: saved, [steps + 1].
        penalised: loss less the weighted power saved, [steps + 1].
        removed: steps taken.
    """

    layer: str
    order: np.ndarray
    saved: np.ndarray
    loss: np.ndarray
    power: np.ndarray
    penalised: np.ndarray
    removed: int = field(default=0)

    def weigh(self, power_weight: float) -> None:
        """Let power count so much beside loss."""
        self.penalised = self.loss - power_weight * self.power


def allocate(
    traces: dict[str, RemovalTrace],
    budgets: list[CostBudget],
    *,
    power: dict[str, Tensor] | None = None,
    min_kept: float = 0.0,
    power_weight: float | str = "auto",
    balance: bool = False,
) -> Allocation:
    """Choose the blocks to keep.

    Args:
        traces: removal traces by layer.
        budgets: one or two, all of which are met.
        power: energy in mJ of keeping each block, float64 [block_rows, block_cols] by layer; none without.
        min_kept: share of its blocks that every layer keeps.
        power_weight: weight of the power term, or "auto".
        balance: keep as many blocks in every block row of a layer; the traces must have a queue for each block row.

    Raises:
        BudgetError: no mask meets the budgets, or blocks are too large to come within 0.5 % of one.
    """
    power = power or {name: torch.zeros(trace.grid, dtype=torch.float64) for name, trace in traces.items()}
    traces = {name: _balanced(trace) for name, trace in traces.items()} if balance else traces
    spare = {name: _removable(trace, min_kept) for name, trace in traces.items()}
    queues = [
        queue
        for name, trace in traces.items()
        for queue in _queues(name, trace, [b.costs[name] for b in budgets], power[name], spare[name])
    ]
    needed = np.array([b.needed for b in budgets])
    beta = _auto_power_weight(queues, spare, needed) if power_weight == "auto" else float(power_weight)
    for queue in queues:
        queue.weigh(beta)
    saved = _search(queues, spare, needed)
    _check_reached(budgets, saved, max(queue.order.shape[1] for queue in queues))
    masks = {name: torch.ones(trace.grid, dtype=torch.bool) for name, trace in traces.items()}
    loss = dict.fromkeys(traces, 0.0)
    for queue in queues:
        masks[queue.layer].view(-1)[torch.from_numpy(queue.order[: queue.removed].ravel())] = False
        loss[queue.layer] += float(queue.loss[queue.removed])
    kept = tuple(b.blocks - float(gone) for b, gone in zip(budgets, saved, strict=True))
    return Allocation(masks, kept, loss, beta)


def _auto_power_weight(queues: list[_Queue], spare: dict[str, int], needed: np.ndarray) -> float:
    """The weight at which what leaves for the loss's sake alone saves as much weighted power as it adds loss."""
    _search(queues, spare, needed)
    saved = sum(float(queue.power[queue.removed]) for queue in queues)
    return sum(float(queue.loss[queue.removed]) for queue in queues) / saved if saved else 0.0


def _balanced(trace: RemovalTrace) -> RemovalTrace:
    """One queue for the whole layer, in which each step takes one block from every block row."""
    if len(trace.order) != trace.grid[0]:
        raise ValueError("balance needs a trace with a queue for each block row")
    return RemovalTrace(trace.order.t()[None], trace.loss.sum(0, keepdim=True), trace.grid)


def _removable(trace: RemovalTrace, min_kept: float) -> int:
    blocks = trace.grid[0] * trace.grid[1]
    return blocks - int(np.ceil(min_kept * blocks - 1e-9))


def _queues(name: str, trace: RemovalTrace, costs: list[Tensor], power: Tensor, spare: int) -> list[_Queue]:
    queues = []
    orders = trace.order.reshape(*trace.order.shape[:2], -1).numpy()  # [queues, steps, blocks a step]
    for order, loss in zip(orders, trace.loss.numpy(), strict=True):
        steps = min(len(order), spare // order.shape[1])
        order, loss = order[:steps], loss[: steps + 1]
        saved = np.stack([_running_sum(cost.flatten().numpy()[order]) for cost in costs])
        queues.append(_Queue(name, order, saved, loss, _running_sum(power.flatten().numpy()[order]), loss))
    return queues


def _running_sum(values: np.ndarray) -> np.ndarray:
    """Of [steps, blocks a step] over steps, from 0."""
    return np.concatenate([[0.0], np.cumsum(values.sum(axis=1))])


def _search(queues: list[_Queue], spare: dict[str, int], needed: np.ndarray) -> np.ndarray:
    """Remove until every need is met; what was saved in each budget's unit."""
    if len(needed) == 1:
        return _remove(queues, spare, needed, np.ones(1))
    mixtures = np.array([[1.0, 0.0], [0.0, 1.0]])
    # In units of what is needed, so that the mixture does not depend on the budgets' units.
    scale = 1 / np.maximum(needed, 1e-300)
    for mixture in mixtures:
        saved = _remove(queues, spare, needed, mixture * scale, stop_at=mixture)
        if (saved >= needed - _slack(needed)).all():
            return saved  # the other budget does not bind
    low, high = 0.0, 1.0  # share of the second cost
    best = (np.inf, 0.5)
    for _ in range(BISECTIONS):
        share = (low + high) / 2
        first = _remove(queues, spare, needed, np.array([1 - share, share]) * scale, stop_at=mixtures[0])
        low, high = (low, share) if first[1] >= needed[1] else (share, high)
        _remove(queues, spare, needed, np.array([1 - share, share]) * scale)
        best = min(best, (sum(float(q.penalised[q.removed]) for q in queues), share))
    return _remove(queues, spare, needed, np.array([1 - best[1], best[1]]) * scale)


def _slack(needed: np.ndarray) -> np.ndarray:
    return 1e-9 * np.abs(needed)


def lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Indices of the lower convex hull of points with increasing x, first and last included.

    Example:
        >>> lower_hull(np.array([0.0, 1.0, 2.0]), np.array([0.0, 5.0, 2.0]))
        [0, 2]
    """
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1 and _above(x, y, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _above(x: np.ndarray, y: np.ndarray, a: int, b: int, c: int) -> bool:
    """Whether point b lies on or above the line from a to c."""
    return (y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a])


def _remove(
    queues: list[_Queue],
    spare: dict[str, int],
    needed: np.ndarray,
    mixture: np.ndarray,
    stop_at: np.ndarray | None = None,
) -> np.ndarray:
    """Take hull segments, cheapest loss per saved cost first, until the needs are met.

    Args:
        queues: their `removed` is set anew.
        spare: blocks that each layer can lose.
        needed: to save, in each budget's unit.
        mixture: weight of each budget's unit in the cost that slopes are measured by.
        stop_at: nonzero for the budgets whose needs count; all of them by default.

    Returns:
        What was saved in each budget's unit.
    """
    counted = np.ones(len(needed), dtype=bool) if stop_at is None else stop_at > 0
    goal = np.where(counted, needed - _slack(needed), -np.inf)
    spare, saved = dict(spare), np.zeros(len(needed))
    for queue in queues:
        queue.removed = 0
    for _, index, start, end in _segments(queues, mixture):
        if (saved >= goal).all():
            break
        queue = queues[index]
        if queue.removed != start:  # an earlier segment was cut short by the layer's minimum
            continue
        width = queue.order.shape[1]
        end = min(end, start + spare[queue.layer] // width)
        then = saved[:, None] + queue.saved[:, start : end + 1] - queue.saved[:, start, None]
        reached = (then >= goal[:, None]).all(0)
        end = start + int(reached.argmax()) if reached.any() else end
        queue.removed = end
        spare[queue.layer] -= (end - start) * width
        saved += queue.saved[:, end] - queue.saved[:, start]
    return saved


def _segments(queues: list[_Queue], mixture: np.ndarray) -> list[tuple[float, int, int, int]]:
    """(slope, queue, first and last step) of all hull segments, least slope first."""
    segments = []
    for index, queue in enumerate(queues):
        saved = mixture @ queue.saved
        for start, end in pairwise(lower_hull(saved, queue.penalised)):
            segments.append(
                ((queue.penalised[end] - queue.penalised[start]) / (saved[end] - saved[start]), index, start, end)
            )
    return sorted(segments)


def _check_reached(budgets: list[CostBudget], saved: np.ndarray, width: int) -> None:
    """`width` is the number of blocks that leave in one step."""
    spared = []
    for budget, gone in zip(budgets, saved, strict=True):
        whole = budget.whole
        reached = budget.left_without(float(gone))
        if reached > budget.ratio * (1 + 1e-9):
            raise BudgetError(
                f"{budget.name}: {budget.ratio:.4f} cannot be met, the least that can remain is {reached:.4f} "
                f"({budget.fixed / whole:.4f} lies outside the target layers); raise the budget, lower "
                "min_kept_per_layer, or take layers out of ignore"
            )
        step = width * max(float(c.max()) for c in budget.costs.values()) / whole if width > 1 else 0.0
        too_far = gone > 0 and budget.ratio - reached > max(TOLERANCE * budget.ratio, step)
        spared.append((too_far, budget, reached))
    if all(too_far for too_far, _, _ in spared):  # one of two budgets need not bind
        _, budget, reached = spared[0]
        raise BudgetError(
            f"{budget.name}: blocks are too large to come within {TOLERANCE:.1%} of {budget.ratio:.4f} (reached "
            f"{reached:.4f}); choose a smaller block_shape"
        )
