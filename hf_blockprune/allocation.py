"""Which blocks go: one global problem over all layers.

minimise   sum_u  loss_u(k_u) + power_weight * power of the blocks that remain
subject to cost of the blocks that remain <= budget, and a minimum of kept blocks in every layer

Each unit's loss is replaced by its lower convex hull over the cost it saves, and hull segments are taken in the order
of loss per cost saved until the budget is met: for convex losses that is the exact Lagrangian solution, the
equal-slope rule. The last segment is taken in part, so the budget is met to within one block.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .errors import BudgetError
from .saliency import RemovalTrace

TOLERANCE = 0.005  # how far the reached budget may lie from the asked one


@dataclass(frozen=True)
class BlockCosts:
    """What keeping each block of a layer costs.

    Attributes:
        budget: float64 [block_rows, block_cols], in the budget's unit (FLOPs, or 1 a block).
        power: float64 [block_rows, block_cols], energy in mJ.
    """

    budget: Tensor
    power: Tensor


@dataclass(frozen=True)
class Allocation:
    """The chosen masks.

    Attributes:
        masks: bool [block_rows, block_cols] by layer, True where a block is kept.
        kept_cost: cost of the kept blocks, in the budget's unit.
        loss: predicted loss by layer, in the unit of the traces.
        power_weight: the weight that was used ("auto" resolved).
    """

    masks: dict[str, Tensor]
    kept_cost: float
    loss: dict[str, float]
    power_weight: float


@dataclass
class _Unit:
    """One removal order of a layer as arrays over k = 0 ... max removals."""

    layer: str
    order: np.ndarray
    saved: np.ndarray
    loss: np.ndarray
    penalised: np.ndarray
    removed: int = 0


def allocate(
    traces: dict[str, RemovalTrace],
    costs: dict[str, BlockCosts],
    *,
    ratio: float,
    fixed_cost: float = 0.0,
    min_kept: float = 0.0,
    power_weight: float | str = "auto",
) -> Allocation:
    """Choose the blocks to keep.

    Args:
        traces: removal traces by layer.
        costs: block costs by layer.
        ratio: share of the model's whole cost, `fixed_cost` included, that may remain.
        fixed_cost: cost of everything that is not a block of these layers, in the budget's unit.
        min_kept: share of its blocks that every layer keeps.
        power_weight: weight of the power term, or "auto".

    Raises:
        BudgetError: no mask meets the budget, or blocks are too large to come within 0.5 % of it.
    """
    total = sum(float(c.budget.sum()) for c in costs.values())
    beta = _auto_power_weight(traces, costs) if power_weight == "auto" else float(power_weight)
    spare = {name: _removable(trace, min_kept) for name, trace in traces.items()}
    units = [u for name, trace in traces.items() for u in _units(name, trace, costs[name], spare[name], beta)]
    saved = _remove(units, spare, needed=(1 - ratio) * (total + fixed_cost))
    _check_reached(total + fixed_cost - saved, ratio, total, fixed_cost)
    masks = {name: torch.ones(trace.grid, dtype=torch.bool) for name, trace in traces.items()}
    loss = dict.fromkeys(traces, 0.0)
    for unit in units:
        masks[unit.layer].view(-1)[torch.from_numpy(unit.order[: unit.removed])] = False
        loss[unit.layer] += float(unit.loss[unit.removed])
    return Allocation(masks, total - saved, loss, beta)


def _auto_power_weight(traces: dict[str, RemovalTrace], costs: dict[str, BlockCosts]) -> float:
    """The weight at which removing everything saves as much weighted power as it adds loss."""
    power = sum(float(c.power.sum()) for c in costs.values())
    return sum(float(t.loss[:, -1].sum()) for t in traces.values()) / power if power else 0.0


def _removable(trace: RemovalTrace, min_kept: float) -> int:
    blocks = trace.grid[0] * trace.grid[1]
    return blocks - int(np.ceil(min_kept * blocks - 1e-9))


def _units(name: str, trace: RemovalTrace, costs: BlockCosts, spare: int, beta: float) -> list[_Unit]:
    units = []
    for order, loss in zip(trace.order.numpy(), trace.loss.numpy(), strict=True):
        steps = min(len(order), spare)
        order, loss = order[:steps], loss[: steps + 1]
        saved = _running_sum(costs.budget.flatten().numpy()[order])
        power_saved = _running_sum(costs.power.flatten().numpy()[order])
        units.append(_Unit(name, order, saved, loss, loss - beta * power_saved))
    return units


def _running_sum(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values)])


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


def _remove(units: list[_Unit], spare: dict[str, int], *, needed: float) -> float:
    """Take hull segments, cheapest loss per saved cost first, until `needed` cost is saved; returns what was saved."""
    segments = []
    for index, unit in enumerate(units):
        hull = lower_hull(unit.saved, unit.penalised)
        for start, end in pairwise(hull):
            slope = (unit.penalised[end] - unit.penalised[start]) / (unit.saved[end] - unit.saved[start])
            segments.append((slope, index, start, end))
    segments.sort()
    saved = 0.0
    slack = 1e-9 * abs(needed)
    for _, index, start, end in segments:
        if saved >= needed - slack:
            break
        unit = units[index]
        if unit.removed != start:  # an earlier segment was cut short by the layer's minimum
            continue
        end = min(end, start + spare[unit.layer])
        gains = unit.saved[start : end + 1] - unit.saved[start]
        end = start + min(int(np.searchsorted(gains, needed - saved - slack)), end - start)
        unit.removed = end
        spare[unit.layer] -= end - start
        saved += float(unit.saved[end] - unit.saved[start])
    return saved


def _check_reached(kept: float, ratio: float, total: float, fixed: float) -> None:
    reached = kept / (total + fixed)
    if reached > ratio * (1 + 1e-9):
        raise BudgetError(
            f"budget: {ratio:.4f} cannot be met, the least that can remain is {reached:.4f} "
            f"({fixed / (total + fixed):.4f} lies outside the target layers); raise the budget, lower "
            "min_kept_per_layer, or take layers out of ignore"
        )
    if ratio - reached > TOLERANCE * ratio:
        raise BudgetError(
            f"budget: blocks are too large to come within {TOLERANCE:.1%} of {ratio:.4f} (reached {reached:.4f}); "
            "choose a smaller block_shape"
        )
