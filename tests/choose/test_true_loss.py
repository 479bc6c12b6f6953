"""What pruning one group of Linears really costs, and the factors that correct predicted losses by it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_blockprune import BlockPruneConfig, BlockPruner
from hf_blockprune.calibration.collect import collect
from hf_blockprune.choose.budgets import model_budgets
from hf_blockprune.choose.selection import Selector
from hf_blockprune.choose.true_loss import LARGEST_FACTOR, loss_factors, true_losses
from hf_blockprune.cost.flops import count_flops
from hf_blockprune.data.batches import load_pixels
from hf_blockprune.score.blocks import expand_mask
from tests.conftest import tiny_model
from tests.refit.test_layerwise import linears_of, random_masks

SHAPE, DAMPING = (8, 8), 0.01


@pytest.fixture(scope="module")
def statistics(found, processor, accelerator):
    model = tiny_model().double()
    return collect(model, found, processor, linears_of(model), accelerator=accelerator, fisher=True)[0]


@pytest.fixture(scope="module")
def pixels(found, processor, accelerator):
    return load_pixels(found, processor, accelerator=accelerator, model_config=tiny_model().config)[0]


def best_survivors(weight, keep, covariance):
    """Each row by itself: the kept weights that least disturb the centred output."""
    result = torch.zeros_like(weight)
    for row, on in enumerate(keep):
        right = covariance[on] @ weight[row]
        result[row, on] = torch.linalg.solve(covariance[on][:, on], right)
    return result


def test_a_group_is_pruned_alone_with_adapted_weights(statistics, pixels, accelerator):
    model, masks = tiny_model().double(), random_masks(tiny_model())
    names = list(masks)
    groups = [names[:2], [names[5]], names[8:10]]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured = true_losses(model, groups, masks, statistics, SHAPE, pixels, accelerator=accelerator, damping=DAMPING)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        wanted = model(pixel_values=pixels.double()).logits.softmax(-1)
        for group, loss in zip(groups, measured, strict=True):
            other = tiny_model().double()
            for name in group:
                linear, s = other.get_submodule(name), statistics[name]
                damped = s.safe_covariance + torch.diag(DAMPING * s.safe_covariance.diagonal())
                keep = expand_mask(masks[name], tuple(linear.weight.shape), SHAPE)
                pruned = best_survivors(linear.weight, keep, damped)
                linear.bias += (linear.weight - pruned) @ s.mean
                linear.weight.copy_(pruned)
            have = other(pixel_values=pixels.double()).logits.softmax(-1)
            by_hand = (wanted * (wanted / have).log()).sum(-1).mean()
            assert loss == pytest.approx(float(by_hand), rel=1e-6)
            assert loss > 0


def test_what_keeps_every_block_costs_nothing(statistics, pixels, accelerator):
    model = tiny_model()
    masks = random_masks(model, share=1.1)
    groups = [[name] for name in masks]
    losses = true_losses(model, groups, masks, statistics, SHAPE, pixels, accelerator=accelerator, damping=DAMPING)
    assert max(abs(loss) for loss in losses) < 1e-9


@pytest.mark.parametrize(
    ("losses", "predicted", "factors"),
    [
        ([2.0, 6.0, 4.0], [1.0, 1.0, 1.0], [2.0, 6.0, 4.0]),
        ([2.0, 0.0, 4.0], [1.0, 0.0, 1.0], [2.0, 4.0, 4.0]),  # nothing was removed: as the median
        ([1.0, 1e6, 1.0], [1.0, 1.0, 1.0], [1.0, LARGEST_FACTOR, 1.0]),
        ([1.0, -1e-9, 1.0], [1.0, 1.0, 1.0], [1.0, 1 / LARGEST_FACTOR, 1.0]),  # no loss but for rounding
        ([0.0, 0.0], [0.0, 0.0], [1.0, 1.0]),
        ([5e-324, 1.0], [2.0, 1.0], [1 / LARGEST_FACTOR, 1.0]),  # a ratio that underflows
        ([1.0, 1.0], [5e-324, 1.0], [1.0, 1.0]),
    ],
)
def test_factors(losses, predicted, factors):
    assert loss_factors(losses, predicted) == pytest.approx(factors)


@given(st.lists(st.tuples(st.floats(-1, 1e6), st.floats(0, 1e6)), min_size=1, max_size=20))
def test_factors_are_positive_and_within_reach_of_each_other(pairs):
    factors = loss_factors(*zip(*pairs, strict=True))
    assert min(factors) > 0
    assert max(factors) <= LARGEST_FACTOR**2 * min(factors) * (1 + 1e-9)


def selector_of(statistics, pixels, accelerator, **changes):
    model = tiny_model().double()
    config = BlockPruneConfig(block_shape=SHAPE, budget={"metric": "flops", "ratio": 0.6}, permute=False, **changes)
    flops = count_flops(model)
    budgets = model_budgets(config, model, linears_of(model), flops)
    return Selector(model, linears_of(model), statistics, flops, budgets, config, accelerator, pixels)


def test_layers_that_cost_more_than_predicted_keep_more(statistics, pixels, accelerator):
    selector = selector_of(statistics, pixels, accelerator, true_loss_rounds=0)
    before = selector.select().allocation.masks
    dear = [name for name in before if "layers.1.mlp" in name]
    after = selector.select(dict.fromkeys(dear, 100.0)).allocation.masks
    assert len(dear) == 2
    assert sum(int(after[n].sum()) for n in dear) > sum(int(before[n].sum()) for n in dear)


def test_a_round_measures_every_linear_with_those_it_depends_on(statistics, pixels, accelerator):
    selector = selector_of(statistics, pixels, accelerator)
    first = selector_of(statistics, pixels, accelerator, true_loss_rounds=0).select().allocation
    selection = selector.select()
    allocation, factors = selection.allocation, selection.loss_factors
    assert set(factors) == set(linears_of(tiny_model()))
    for name in factors:
        if name.endswith("fc1"):
            pair = (name, name.replace("fc1", "fc2"))
            assert factors[pair[0]] == factors[pair[1]]
            measured = true_losses(
                selector.model,
                [pair],
                first.masks,
                statistics,
                SHAPE,
                pixels,
                accelerator=accelerator,
                damping=selector.config.damping,
            )
            assert factors[name] == pytest.approx(measured[0] / sum(first.loss[n] for n in pair))
    assert any(not torch.equal(mask, first.masks[name]) for name, mask in allocation.masks.items())


def test_the_report_gives_each_layers_factor(images, processor):
    config = BlockPruneConfig(
        block_shape=SHAPE, budget={"metric": "flops", "ratio": 0.5}, calibration={"samples": 20}, refit=False
    )
    pruner = BlockPruner(tiny_model(), processor, config)
    pruner.prune(images)
    assert all(layer["loss_factor"] > 0 for layer in pruner.report()["layers"])
    assert "true losses" in pruner.report()["seconds"]
