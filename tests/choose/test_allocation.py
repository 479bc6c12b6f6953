"""The global choice of blocks against exhaustive search, and its limits."""

import itertools
import math
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_blockprune import BudgetError
from hf_blockprune.choose.allocation import TOLERANCE, Allocation, CostBudget, lower_hull
from hf_blockprune.choose.allocation import allocate as allocate_budgets
from hf_blockprune.score.trace import RemovalTrace


class BlockCosts(NamedTuple):
    """What keeping each block of a layer costs: in the budget's unit, and as power."""

    budget: torch.Tensor
    power: torch.Tensor


def allocate(traces, costs, *, ratio, fixed_cost=0.0, **settings) -> Allocation:
    """With one budget."""
    budget = CostBudget({name: c.budget for name, c in costs.items()}, ratio, fixed_cost)
    return allocate_budgets(traces, [budget], power={name: c.power for name, c in costs.items()}, **settings)


POINTS = st.lists(st.tuples(st.integers(1, 5), st.integers(-20, 20)), min_size=1, max_size=9)


def make_trace(losses, grid, seed=0):
    """A trace whose queues share the layer's blocks in random order. losses: [queues, n + 1]."""
    losses = torch.as_tensor(losses, dtype=torch.float64)
    order = torch.randperm(math.prod(grid), generator=torch.Generator().manual_seed(seed))
    return RemovalTrace(order.view(losses.shape[0], losses.shape[1] - 1), losses, grid)


def convex_losses(rng, queues, steps):
    """Running sums of growing increments."""
    increments = np.sort(rng.uniform(0.1, 5, (queues, steps)), axis=1)
    return np.concatenate([np.zeros((queues, 1)), increments.cumsum(axis=1)], axis=1)


def even_costs(grid, budget=1.0, power=1.0):
    ones = torch.ones(grid, dtype=torch.float64)
    return BlockCosts(ones * budget, ones * power)


def convex_problem(seed, layers=((2, 2), (1, 3), (3, 1)), budgets=(1.0, 2.0, 3.0), powers=(1.0, 5.0, 2.0)):
    rng = np.random.default_rng(seed)
    traces, costs = {}, {}
    for i, grid in enumerate(layers):
        traces[f"layer.{i}"] = make_trace(convex_losses(rng, 1, math.prod(grid)), grid, seed + i)
        costs[f"layer.{i}"] = even_costs(grid, budgets[i], powers[i])
    return traces, costs


def removed_counts(allocation):
    return {name: int((~mask).sum()) for name, mask in allocation.masks.items()}


def best_objective(traces, costs, saved_cost, power_weight, most_removed):
    """The least loss + weighted power over every choice of removals per queue that saves the same cost.

    Without a power term saving more is allowed too: it can only add loss.
    """
    queues = [(name, queue) for name, trace in traces.items() for queue in range(len(trace.order))]
    best = math.inf
    for counts in itertools.product(*(range(traces[name].order.shape[1] + 1) for name, _ in queues)):
        objective = saved = 0.0
        by_layer = dict.fromkeys(traces, 0)
        for (name, queue), k in zip(queues, counts, strict=True):
            gone = traces[name].order[queue, :k]
            objective += float(traces[name].loss[queue, k])
            objective -= power_weight * float(costs[name].power.flatten()[gone].sum())
            saved += float(costs[name].budget.flatten()[gone].sum())
            by_layer[name] += k
        enough = saved >= saved_cost - 1e-9 if power_weight == 0 else abs(saved - saved_cost) < 1e-9
        if enough and all(by_layer[name] <= most_removed[name] for name in traces):
            best = min(best, objective)
    return best + power_weight * sum(float(c.power.sum()) for c in costs.values())


def objective_of(allocation, costs):
    kept_power = sum(float(costs[name].power[mask].sum()) for name, mask in allocation.masks.items())
    return sum(allocation.loss.values()) + allocation.power_weight * kept_power


@settings(deadline=None)
@given(points=POINTS)
def test_lower_hull_against_its_definition(points):
    """A point inside is a vertex when it lies strictly below every chord that spans it."""
    x = np.cumsum([step for step, _ in points]).astype(float)
    y = np.array([height for _, height in points], dtype=float)
    last = len(x) - 1

    def below_every_chord(i):
        return all(
            (y[i] - y[a]) * (x[b] - x[a]) < (y[b] - y[a]) * (x[i] - x[a])
            for a in range(i)
            for b in range(i + 1, last + 1)
        )

    assert lower_hull(x, y) == [i for i in range(last + 1) if i in (0, last) or below_every_chord(i)]


@pytest.mark.parametrize("power_weight", [0.0, 0.4, "auto"])
@pytest.mark.parametrize("min_kept", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_convex_losses_are_solved_exactly(power_weight, min_kept, seed):
    traces, costs = convex_problem(seed)
    total = sum(float(c.budget.sum()) for c in costs.values())
    fixed = 5000.0  # so much that no block oversteps the tolerance
    most_removed = {name: t.order.numel() - math.ceil(min_kept * t.order.numel()) for name, t in traces.items()}
    for needed in (1, 3, 6, 7) if min_kept else (1, 5, 8, 11, 19):
        ratio = 1 - needed / (total + fixed)
        result = allocate(traces, costs, ratio=ratio, fixed_cost=fixed, min_kept=min_kept, power_weight=power_weight)
        saved = total - result.kept_cost[0]
        assert needed - 1e-6 <= saved < needed + 3
        best = best_objective(traces, costs, saved, result.power_weight, most_removed)
        assert objective_of(result, costs) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("min_kept", [0.0, 0.5])
@pytest.mark.parametrize("removed", [1, 3, 6])
def test_queues_of_one_layer_are_solved_together(min_kept, removed):
    """They are cheap to remove, and share the minimum of their layer."""
    rng = np.random.default_rng(removed)
    traces = {
        "several": make_trace(convex_losses(rng, 2, 3) / 100, (2, 3)),
        "one": make_trace(convex_losses(rng, 1, 6), (3, 2)),
    }
    costs = {"several": even_costs((2, 3)), "one": even_costs((3, 2))}
    result = allocate(traces, costs, ratio=1 - removed / 12, min_kept=min_kept, power_weight=0)
    assert sum(removed_counts(result).values()) == removed
    most_removed = dict.fromkeys(traces, 6 - math.ceil(6 * min_kept))
    assert sum(result.loss.values()) == pytest.approx(best_objective(traces, costs, removed, 0.0, most_removed))


@settings(deadline=None, max_examples=40)
@given(
    grids=st.lists(st.tuples(st.integers(20, 40), st.integers(20, 40)), min_size=1, max_size=3),
    ratio=st.floats(0.3, 1.0),
    fixed_share=st.floats(0.0, 0.2),
    seed=st.integers(0, 1000),
    convex=st.booleans(),
)
def test_result_is_consistent_and_never_above_the_budget(grids, ratio, fixed_share, seed, convex):
    """Any non-decreasing losses and any block costs; the budget is met to within the last block."""
    rng = np.random.default_rng(seed)
    traces, costs = {}, {}
    for i, grid in enumerate(grids):
        steps = math.prod(grid)
        losses = convex_losses(rng, 1, steps)
        if not convex:
            losses = np.concatenate([[0], rng.uniform(0, 1, steps).cumsum()])[None]
        traces[str(i)] = make_trace(losses, grid, seed + i)
        costs[str(i)] = BlockCosts(*(torch.from_numpy(rng.uniform(0.5, 2, grid)) for _ in range(2)))
    blocks = sum(float(c.budget.sum()) for c in costs.values())
    fixed = fixed_share * blocks
    total = blocks + fixed
    largest = max(float(c.budget.max()) for c in costs.values())
    assume(largest < TOLERANCE * ratio * total)
    result = allocate(traces, costs, ratio=ratio, fixed_cost=fixed)
    kept = sum(float(costs[name].budget[mask].sum()) for name, mask in result.masks.items())
    assert kept == pytest.approx(result.kept_cost[0])
    assert kept + fixed <= ratio * total * (1 + 1e-8)
    assert kept + fixed >= ratio * total - largest - 1e-6
    assert kept + fixed >= ratio * total * (1 - TOLERANCE) - 1e-6
    for name, count in removed_counts(result).items():
        assert set((~result.masks[name]).flatten().nonzero().flatten().tolist()) == set(
            traces[name].order[0, :count].tolist()
        )
        assert result.loss[name] == float(traces[name].loss[0, count])


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_nested_as_the_budget_shrinks(seed):
    traces, costs = convex_problem(seed, layers=((8, 9), (12, 5), (7, 7)))
    previous = None
    for ratio in np.linspace(1.0, 0.87, 25):
        masks = allocate(traces, costs, ratio=float(ratio), fixed_cost=2000.0, min_kept=0.05).masks
        if previous is not None:
            assert all((masks[name] <= previous[name]).all() for name in masks)
            assert any((masks[name] < previous[name]).any() for name in masks)
        previous = masks


@settings(deadline=None, max_examples=30)
@given(min_kept=st.integers(0, 45).map(lambda percent: percent / 100), seed=st.integers(0, 100))
def test_every_layer_keeps_its_minimum(min_kept, seed):
    """Layer 0 is so cheap to remove that nothing but the minimum would hold it back."""
    traces, costs = convex_problem(seed, layers=((5, 4), (5, 5), (3, 7)), budgets=(1.0, 1.0, 1.0))
    traces["layer.0"] = make_trace(np.linspace(0, 1e-6, 21)[None], (5, 4))
    result = allocate(traces, costs, ratio=0.5, min_kept=min_kept, power_weight=0)
    for name, mask in result.masks.items():
        assert mask.sum() >= min_kept * mask.numel() - 1e-6, name
    assert result.masks["layer.0"].sum() == math.ceil(min_kept * 20 - 1e-6)


def two_equal_layers(power_of_hungry):
    losses = convex_losses(np.random.default_rng(0), 1, 100)
    traces = {name: make_trace(losses, (10, 10)) for name in ("frugal", "hungry")}
    costs = {"frugal": even_costs((10, 10)), "hungry": even_costs((10, 10), power=power_of_hungry)}
    return traces, costs


def test_power_weight_takes_blocks_from_power_hungry_layers():
    traces, costs = two_equal_layers(power_of_hungry=4.0)
    removed = [
        removed_counts(allocate(traces, costs, ratio=0.5, power_weight=weight))["hungry"]
        for weight in (0, 0.1, 0.5, 1.0, 10.0)
    ]
    assert removed[0] == pytest.approx(50, abs=1)
    assert removed == sorted(removed)
    assert removed[1] > removed[0] + 1
    assert removed[-1] == 100


def test_without_power_weight_power_has_no_influence():
    masks = [allocate(*two_equal_layers(power), ratio=0.5, power_weight=0).masks for power in (1.0, 100.0, 0.001)]
    for other in masks[1:]:
        assert all(torch.equal(other[name], masks[0][name]) for name in other)


def test_auto_power_weighs_as_much_as_the_loss_of_what_would_leave_without_it():
    traces, costs = two_equal_layers(power_of_hungry=4.0)
    plain = allocate(traces, costs, ratio=0.5, power_weight=0)
    saved = sum(float(costs[name].power[~mask].sum()) for name, mask in plain.masks.items())
    weight = allocate(traces, costs, ratio=0.5).power_weight
    assert weight * saved == pytest.approx(sum(plain.loss.values()))
    assert removed_counts(allocate(traces, costs, ratio=0.5))["hungry"] > removed_counts(plain)["hungry"]
    assert allocate(traces, costs, ratio=0.5, power_weight=weight).kept_cost == (100,)


def test_auto_power_weight_without_power_is_zero():
    traces, _ = two_equal_layers(1.0)
    costs = dict.fromkeys(traces, even_costs((10, 10), power=0.0))
    assert allocate(traces, costs, ratio=0.5).power_weight == 0


@pytest.mark.parametrize("power_weight", [0, "auto", 1e6])
def test_ratio_one_removes_nothing(power_weight):
    traces, costs = convex_problem(0)
    result = allocate(traces, costs, ratio=1.0, fixed_cost=3.0, power_weight=power_weight)
    assert all(mask.all() for mask in result.masks.values())
    assert set(result.loss.values()) == {0.0}
    assert result.kept_cost[0] == sum(float(c.budget.sum()) for c in costs.values())


def test_free_removal_is_not_taken_beyond_the_budget():
    traces = {"free": make_trace(np.zeros((1, 11)), (2, 5))}
    assert removed_counts(allocate(traces, {"free": even_costs((2, 5))}, ratio=0.8)) == {"free": 2}


def test_same_input_same_masks():
    """Ties included: every removal costs the same."""
    traces = {str(i): make_trace(np.linspace(0, 1, 26)[None], (5, 5), seed=i) for i in range(4)}
    costs = dict.fromkeys(traces, even_costs((5, 5)))
    first, second = (allocate(traces, costs, ratio=0.43, power_weight=0.5) for _ in range(2))
    assert all(torch.equal(first.masks[name], second.masks[name]) for name in traces)
    assert (first.loss, first.kept_cost[0]) == (second.loss, second.kept_cost[0])


def reachable_share(error):
    return float(re.search(r"the least that can remain is ([\d.]+)", str(error.value)).group(1))


def test_budget_below_the_fixed_cost_is_refused():
    traces, costs = two_equal_layers(1.0)
    with pytest.raises(BudgetError, match=r"0\.4000 cannot be met.*0\.5000 lies outside the target layers") as error:
        allocate(traces, costs, ratio=0.4, fixed_cost=200.0)
    assert reachable_share(error) == 0.5


def test_budget_below_the_minimum_of_the_layers_is_refused():
    traces, costs = two_equal_layers(1.0)
    with pytest.raises(BudgetError, match="raise the budget, lower min_kept_per_layer") as error:
        allocate(traces, costs, ratio=0.2, min_kept=0.3)
    assert reachable_share(error) == 0.3
    reached = allocate(traces, costs, ratio=reachable_share(error), min_kept=0.3)
    assert reached.kept_cost[0] == 60


def test_blocks_too_coarse_for_the_budget_are_refused():
    traces = {"coarse": make_trace([[0, 1, 2]], (1, 2))}
    with pytest.raises(BudgetError, match=r"too large to come within 0\.5%.*reached 0\.5000.*smaller block_shape"):
        allocate(traces, {"coarse": even_costs((1, 2))}, ratio=0.6)


def two_budgets(traces, needed, prices, fixed=5000.0):
    """Budgets that ask for so much to be saved, each with its own price of a block by layer."""
    budgets = []
    for need, price in zip(needed, prices, strict=True):
        costs = {n: torch.full(t.grid, p, dtype=torch.float64) for (n, t), p in zip(traces.items(), price, strict=True)}
        whole = sum(float(c.sum()) for c in costs.values()) + fixed
        budgets.append(CostBudget(costs, 1 - need / whole, fixed, f"price {price[0]}"))
    return budgets


PRICES = ((1.0, 2.0, 3.0), (3.0, 1.0, 2.0))


@pytest.mark.parametrize("needed", [(6, 6), (10, 4), (4, 10), (9, 12), (12, 9), (0, 5), (1, 18)])
@pytest.mark.parametrize("seed", range(4))
def test_two_budgets_are_met_and_no_choice_that_saves_as_much_loses_less(needed, seed):
    traces, _ = convex_problem(seed)
    budgets = two_budgets(traces, needed, PRICES)
    result = allocate_budgets(traces, budgets)
    saved = [b.blocks - kept for b, kept in zip(budgets, result.kept_cost, strict=True)]
    assert all(got >= need - 1e-6 for got, need in zip(saved, needed, strict=True))
    best = math.inf
    for counts in itertools.product(*(range(t.order.numel() + 1) for t in traces.values())):
        if all(np.dot(counts, price) >= got - 1e-9 for price, got in zip(PRICES, saved, strict=True)):
            best = min(best, sum(float(t.loss[0, k]) for t, k in zip(traces.values(), counts, strict=True)))
    assert sum(result.loss.values()) == pytest.approx(best, rel=1e-12)


def test_neither_of_two_budgets_is_overdone():
    """With many small blocks, two budgets that pull apart are both met closely."""
    rng = np.random.default_rng(0)
    traces = {str(i): make_trace(convex_losses(rng, 1, 400), (20, 20), i) for i in range(3)}
    budgets = two_budgets(traces, (900, 900), PRICES, fixed=0.0)
    result = allocate_budgets(traces, budgets)
    for budget, kept in zip(budgets, result.kept_cost, strict=True):
        assert 900 - 1e-6 <= budget.blocks - kept <= 900 + 6


@pytest.mark.parametrize("binding", [0, 1])
def test_a_budget_that_does_not_bind_changes_nothing(binding):
    traces, _ = convex_problem(3)
    budgets = two_budgets(traces, (8, 8), PRICES)
    alone = allocate_budgets(traces, [budgets[binding]])
    loose = CostBudget(budgets[1 - binding].costs, 1.0, 5000.0)
    both = allocate_budgets(traces, [budgets[0], loose] if binding == 0 else [loose, budgets[1]])
    assert all(torch.equal(both.masks[name], alone.masks[name]) for name in traces)


def test_second_budget_out_of_reach_is_named():
    traces, _ = convex_problem(0)
    easy, hard = two_budgets(traces, (3, 3), PRICES, fixed=10.0)
    hard = CostBudget(hard.costs, 0.1, 10.0, "params budget")
    with pytest.raises(BudgetError, match=r"params budget: 0\.1000 cannot be met"):
        allocate_budgets(traces, [easy, hard])


@pytest.mark.parametrize("removed", [2, 5, 9])
def test_balanced_layers_keep_as_many_blocks_in_every_block_row(removed):
    """And the loss is the least of all balanced choices."""
    rng = np.random.default_rng(removed)
    traces, costs = {}, {}
    for name, (rows, cols) in {"wide": (2, 6), "square": (3, 3), "tall": (4, 2)}.items():
        order = torch.stack([row * cols + torch.from_numpy(rng.permutation(cols)) for row in range(rows)])
        traces[name] = RemovalTrace(order, torch.from_numpy(convex_losses(rng, rows, cols)), (rows, cols))
        costs[name] = even_costs((rows, cols))
    result = allocate(traces, costs, ratio=1 - removed / 1029, fixed_cost=1000.0, power_weight=0, balance=True)
    assert all(len(mask.sum(dim=1).unique()) == 1 for mask in result.masks.values())
    gone = removed_counts(result)
    assert removed <= sum(gone.values()) < removed + 4
    best = math.inf
    for steps in itertools.product(*(range(t.grid[1] + 1) for t in traces.values())):
        if sum(k * t.grid[0] for k, t in zip(steps, traces.values(), strict=True)) >= sum(gone.values()):
            best = min(best, sum(float(t.loss[:, k].sum()) for k, t in zip(steps, traces.values(), strict=True)))
    assert sum(result.loss.values()) == pytest.approx(best, rel=1e-12)


def test_balance_without_a_trace_for_each_block_row_is_refused():
    with pytest.raises(ValueError, match="a queue for each block row"):
        allocate({"one": make_trace([[0, 1, 2]], (2, 1))}, {"one": even_costs((2, 1))}, ratio=0.5, balance=True)
