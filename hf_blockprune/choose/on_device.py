"""Budgets on devices, where a layer's cost is not the sum of its blocks' costs.

Blocks are allocated by what one more of them costs, the true cost of the masks is looked at, and the budget that they
are allocated under is moved until the true one is met. Layers that a device would multiply densely all the same get
their blocks back: they cost nothing there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..errors import BudgetError
from ..score.trace import RemovalTrace
from .allocation import Allocation, CostBudget
from .budgets import ModelBudget

ROUNDS = 12
CLOSE = 0.003  # share of the budget that may be left
MARGIN = 0.0005
Allocate = Callable[[dict[str, RemovalTrace], list[CostBudget]], Allocation]


def meet_devices(
    allocate: Allocate,
    traces: dict[str, RemovalTrace],
    budgets: list[ModelBudget],
) -> Allocation:
    """An allocation whose masks meet every budget by its device's own account.

    Args:
        allocate: chooses blocks by costs that add up.
        traces: by layer.
        budgets: what must be met.

    Raises:
        BudgetError: no masks meet the budgets.
    """
    blocks = [budget.blocks for budget in budgets]
    if not any(budget.device for budget in budgets):
        return allocate(traces, blocks)
    best, kept_dense = _search(allocate, traces, blocks, budgets), set()
    while True:
        dense = {
            name
            for name, mask in best.masks.items()
            if not mask.all() and all(b.device is not None and b.device.runs_dense(name, best.masks) for b in budgets)
        }
        best = _whole(
            replace(best, masks={n: mask for n, mask in best.masks.items() if n not in dense}), traces, blocks
        )
        kept_dense |= dense
        some = {name: trace for name, trace in traces.items() if name not in kept_dense}
        if not dense or not some:
            return best
        try:  # the others may now be pruned less, or have to be pruned more
            found = _search(allocate, some, _without(blocks, kept_dense), budgets)
        except BudgetError:
            return best
        best = _whole(found, traces, blocks)


def _without(budgets: list[CostBudget], kept_dense: set[str]) -> list[CostBudget]:
    """The budgets with the blocks of some layers among what is not to be saved."""
    result = []
    for budget in budgets:
        costs = {name: cost for name, cost in budget.costs.items() if name not in kept_dense}
        moved = sum(float(budget.costs[name].sum()) for name in kept_dense)
        result.append(replace(budget, costs=costs, fixed=budget.fixed + moved))
    return result


def _search(
    allocate: Allocate,
    traces: dict[str, RemovalTrace],
    under: list[CostBudget],
    budgets: list[ModelBudget],
) -> Allocation:
    """Move the ratios that blocks are allocated under until the devices' own costs are met closely.

    Raises:
        BudgetError: no masks were found that meet them.
    """
    best, reason = None, None
    brackets = [_Bracket(budget.ratio) for budget in under]
    for number in range(ROUNDS):
        try:
            found = allocate(traces, [replace(b, ratio=k.ratio) for b, k in zip(under, brackets, strict=True)])
        except BudgetError as error:
            reason = error
            for bracket in brackets:
                bracket.too_low()
            continue
        left = [
            0.0 if b.device is None else b.blocks.ratio - b.device.of(found.masks) / b.device.dense for b in budgets
        ]
        if min(left) >= 0:
            best = found
            if all(share <= CLOSE * budget.blocks.ratio for share, budget in zip(left, budgets, strict=True)):
                break
        for share, bracket, budget in zip(left, brackets, budgets, strict=True):
            if budget.device is not None:
                bracket.move(share, number)
    if best is None:
        raise (
            _impossible(traces, budgets)
            or reason
            or BudgetError(
                f"{budgets[0].blocks.name}: no masks were found that meet it on the device; raise the budget"
            )
        )
    return best


@dataclass
class _Bracket:
    """A ratio between one that met a device's budget and one that did not."""

    ratio: float
    low: float = 0.0
    high: float = 1.0
    met: bool = False

    def too_low(self) -> None:
        """No masks exist for this ratio."""
        self.low = self.ratio
        self.ratio = (self.low + self.high) / 2

    def move(self, left: float, number: int) -> None:
        """To where the budget would be used up if costs were sums; further the longer that has not met it."""
        if left >= 0:
            self.low, self.met = self.ratio, True
            wanted = self.ratio + left
        else:
            self.high = self.ratio
            # Some more, or nothing changes where less than a block is missing.
            wanted = self.ratio + (left - MARGIN) * (1.0 if self.met else 1.5**number)
        inside = self.low < wanted < self.high
        self.ratio = wanted if inside else (self.low + self.high) / 2


def _impossible(traces: dict[str, RemovalTrace], budgets: list[ModelBudget]) -> BudgetError | None:
    """What to say of a device on which even no blocks at all cost too much; None where that is not so."""
    nothing = {name: torch.zeros(trace.grid, dtype=torch.bool) for name, trace in traces.items()}
    for budget in budgets:
        device, blocks = budget.device, budget.blocks
        if device is not None and (least := device.of(nothing) / device.dense) > 0.9 * blocks.ratio:
            return BudgetError(
                f"{blocks.name}: {blocks.ratio:.4f} cannot be met on {device.profile.name}: with no block left in the "
                f"layers to prune, {least:.4f} would remain, for everything else and for calls; raise the budget, or "
                f"budget.batch (now {device.batch}), which calls weigh less in"
            )
    return None


def _whole(allocation: Allocation, traces: dict[str, RemovalTrace], budgets: list[CostBudget]) -> Allocation:
    """With layers that were left out of it, all of their blocks kept."""
    full = {name: torch.ones(trace.grid, dtype=torch.bool) for name, trace in traces.items()}
    masks = {name: allocation.masks.get(name, mask) for name, mask in full.items()}
    kept = tuple(b.kept(masks) for b in budgets)
    loss = {name: allocation.loss[name] if name in allocation.masks else 0.0 for name in traces}
    return replace(allocation, masks=masks, kept_cost=kept, loss=loss)
