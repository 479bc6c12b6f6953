"""How far attentions and MLPs shrink under a budget, and what their Linears are then."""

import copy

import numpy as np
import pytest
import torch

from hf_blockprune.budget import Budget
from hf_blockprune.choose.budgets import model_budget
from hf_blockprune.choose.shrink_options import can_cut_heads, head_options, head_step, unit_options
from hf_blockprune.choose.shrinking import Shrinking, Shrunk, shrink
from hf_blockprune.choose.true_loss import true_losses
from hf_blockprune.config import BlockPruneConfig
from hf_blockprune.cost.flops import count_flops
from hf_blockprune.errors import BudgetError
from hf_blockprune.model.shrunk import LayerShape
from hf_blockprune.model.structure import find_transformer_layers
from hf_blockprune.model.targets import find_targets
from hf_blockprune.score.shrink import Columns, column_trace
from tests.conftest import tiny_model
from tests.reorder.test_rotation import rotated, seen_statistics

SHAPE, DAMPING, STEP = (8, 8), 1e-2, 8


def setting(ratio, metric="flops", family="vit", device=None):
    """(shrinking, whole layers, model) of a tiny model under one budget."""
    model = tiny_model(family)
    targets = find_targets(model, BlockPruneConfig(block_shape=SHAPE))
    layers = find_transformer_layers(model, targets)
    statistics = rotated(layers, targets, seen_statistics(model, targets)[0])
    budget = model_budget(Budget(metric, ratio, device=device), model, targets, count_flops(model), SHAPE)
    whole = Shrunk(targets, statistics, [budget])
    mlps = [
        unit_options(layer, column_trace(targets[layer.fc2].weight, statistics[layer.fc2], DAMPING, STEP), STEP, 0.05)
        for layer in layers
    ]
    attentions = [(layer, head_options(layer, targets, statistics, step=STEP, damping=DAMPING)) for layer in layers]
    return Shrinking(whole, attentions, mlps, DAMPING), whole, model


def remaining(shrunk, budget):
    """Cost of the dense model with the shrunk layers, in shares."""
    part = shrunk.budgets[0].blocks
    return (part.blocks + part.fixed) / budget.blocks.whole


@pytest.mark.parametrize("ratio", [0.9, 0.75, 0.6])
@pytest.mark.parametrize("metric", ["flops", "params", "density"])
def test_the_budget_is_met_and_no_other_option_of_one_part_does_better(metric, ratio):
    shrinking, whole, _ = setting(ratio, metric)
    budget = whole.budgets[0]
    found = shrinking.choose({}, None)
    assert remaining(found, budget) <= ratio * (1 + 1e-9)
    choices = shrinking._choices({}, whole)
    losses, saved = [], []
    for choice in choices:
        shape = next(s for s in found.shapes if s.layer == choice.layer)
        size = (len(shape.units),) if len(choice.linears) == 2 else (len(shape.heads), shape.head_size)
        index = next(i for i, option in enumerate(choice.options) if option.size == size)
        losses.append(choice.loss[index])
        saved.append(choice.saved[index, 0])
    spare = sum(saved) - budget.blocks.needed
    for choice, loss, gone in zip(choices, losses, saved, strict=True):
        able = gone - choice.saved[:, 0] <= spare * (1 - 1e-9)
        assert (choice.loss[able] >= loss * (1 - 1e-9)).all()


def test_options_save_what_the_shrunk_budget_says():
    shrinking, whole, _ = setting(0.6)
    found = shrinking.choose({}, None)
    choices, total = shrinking._choices({}, whole), 0.0
    for choice in choices:
        shape = next(s for s in found.shapes if s.layer == choice.layer)
        size = (len(shape.units),) if len(choice.linears) == 2 else (len(shape.heads), shape.head_size)
        total += next(s[0] for o, s in zip(choice.options, choice.saved, strict=True) if o.size == size)
    before = whole.budgets[0].blocks
    after = found.budgets[0].blocks
    assert before.blocks + before.fixed - total == pytest.approx(after.blocks + after.fixed)
    assert after.whole == before.whole


def test_a_part_whose_loss_is_larger_in_truth_keeps_more():
    shrinking, whole, _ = setting(0.7)
    layer = shrinking.mlps[0].layer
    plain = shrinking.choose({}, None)
    careful = shrinking.choose({layer.fc1: 1e6}, None)
    units = [next(s for s in found.shapes if s.layer == layer).units for found in (plain, careful)]
    assert len(units[1]) == whole.linears[layer.fc1].out_features > len(units[0])


def test_a_budget_out_of_reach_is_refused():
    shrinking, _, _ = setting(0.05)
    with pytest.raises(BudgetError, match="units and heads alone"):
        shrinking.choose({}, None)


def test_shrunk_linears_adapt_and_keep_their_mean_output():
    _, whole, model = setting(1.0)
    layer = find_transformer_layers(model, whole.linears)[0]
    size = whole.linears[layer.query].out_features // layer.heads
    shape = LayerShape(layer, (0, 2), 8, size, tuple(range(0, 96, 2)), 96)
    found = shrink(whole, [shape], {}, DAMPING)
    for name, (outputs, inputs) in shape.kept().items():
        linear, dense, s = found.linears[name], whole.linears[name], whole.statistics[name]
        if outputs is not None:
            assert torch.equal(linear.weight, dense.weight[outputs])
            assert torch.equal(linear.bias, dense.bias[outputs])
            assert torch.equal(found.statistics[name].output_weight, s.output_weight[outputs])
        if inputs is not None:
            gone = torch.tensor(sorted(set(range(dense.in_features)) - set(inputs.tolist())))
            wanted = Columns(dense.weight, s, DAMPING).without(gone)[0][:, inputs]
            torch.testing.assert_close(linear.weight.double(), wanted, rtol=1e-5, atol=1e-6)
            mean = found.statistics[name].mean
            have = linear.weight.double() @ mean + linear.bias.double()
            torch.testing.assert_close(have, dense.weight.double() @ s.mean + dense.bias.double(), rtol=1e-4, atol=1e-5)
    assert found.linears[layer.fc1].weight.shape == (48, 48)
    assert all(torch.equal(whole.linears[n].weight, model.get_submodule(n).weight) for n in whole.linears)


def test_whole_heads_cost_no_products_and_lost_features_do():
    _, whole, model = setting(1.0)
    layer = find_transformer_layers(model, whole.linears)[0]
    for option in head_options(layer, whole.linears, whole.statistics, step=4, damping=DAMPING):
        heads, size = option.size
        assert len(option.heads) == heads
        assert (option.loss[layer.query] > 0) == (size < 16)
        assert (option.loss[layer.value] > 0) == ((heads, size) != (3, 16))


def test_losses_grow_as_more_leaves():
    _, whole, model = setting(1.0)
    for layer in find_transformer_layers(model, whole.linears):
        options = head_options(layer, whole.linears, whole.statistics, step=4, damping=DAMPING)
        by_heads = {}
        for option in options:
            by_heads.setdefault(option.heads, []).append(sum(option.loss.values()))
        for losses in by_heads.values():
            assert (np.diff(losses) >= -1e-12).all()


def test_heads_that_are_not_rotated_leave_as_a_whole():
    _, whole, model = setting(1.0)
    layer = find_transformer_layers(model, whole.linears)[0]
    options = head_options(layer, whole.linears, whole.statistics, step=None, damping=DAMPING)
    assert [option.size for option in options] == [(3, 16), (2, 16), (1, 16)]


def test_heads_with_a_position_bias_stay():
    _, whole, model = setting(1.0, family="beit")
    layer = find_transformer_layers(model, whole.linears)[0]
    options = head_options(layer, whole.linears, whole.statistics, step=8, damping=DAMPING)
    assert {option.size[0] for option in options} == {3}
    assert can_cut_heads(model, layer)


@pytest.mark.parametrize(("shape", "step"), [(None, 8), ((16, 16), 16), ((32, 64), 16), ((8, 8), 8), ((64, 1), 16)])
def test_sizes_of_heads_fit_kernels_and_blocks(shape, step):
    assert head_step(shape) == step


def test_units_stay_in_whole_rows_of_blocks():
    _, whole, model = setting(1.0)
    layer = find_transformer_layers(model, whole.linears)[0]
    trace = column_trace(whole.linears[layer.fc2].weight, whole.statistics[layer.fc2], DAMPING, 32)
    options = unit_options(layer, trace, 32, 0.5)
    assert [option.size for option in options.options] == [(96,), (64,)]
    kept = options.units(options.options[1])
    assert list(kept) == sorted(kept)
    assert set(kept) == set(range(96)) - set(trace.order.flatten()[:32].tolist())


def test_device_budgets_price_smaller_layers(tmp_path):
    shrinking, whole, _ = setting(0.8, "latency", device="systolic-16")
    found = shrinking.choose({}, None)
    device = found.budgets[0].device
    masks = {n: torch.ones(found.budgets[0].blocks.costs[n].shape, dtype=torch.bool) for n in found.linears}
    assert device.dense == whole.budgets[0].device.dense
    assert device.of(masks) <= 0.8 * device.dense * (1 + 1e-6)


def test_true_losses_are_those_of_the_smaller_model(accelerator):
    """Each pair of shrunk Linears measured alone, against a model that holds the smaller Linears."""
    shrinking, whole, model = setting(0.6)
    found = shrinking.choose({}, None)
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    masks = {n: torch.ones(found.budgets[0].blocks.costs[n].shape, dtype=torch.bool) for n in found.linears}
    pairs = [pair for shape in found.shapes for pair in shape.layer.pairs()]
    options = {"accelerator": accelerator, "damping": DAMPING, "kept": found.kept()}
    have = true_losses(model, pairs, masks, whole.statistics, SHAPE, pixels, **options)
    with torch.no_grad():
        dense = model(pixel_values=pixels).logits.double().log_softmax(-1)
    for pair, loss in zip(pairs, have, strict=True):
        changed = copy.deepcopy(model)
        for name in pair:
            put(changed, name, found)
        with torch.no_grad():
            logits = changed(pixel_values=pixels).logits.double().log_softmax(-1)
        wanted = float((dense.exp() * (dense - logits)).sum(-1).mean())
        assert loss == pytest.approx(wanted, rel=1e-3, abs=1e-7), pair


def put(model, name, found):
    """The smaller Linear in the place of the dense one, with zeros for what left."""
    linear, small = model.get_submodule(name), found.linears[name]
    outputs, inputs = found.kept().get(name, (None, None))
    outputs = torch.arange(linear.out_features) if outputs is None else outputs
    inputs = torch.arange(linear.in_features) if inputs is None else inputs
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[outputs[:, None], inputs] = small.weight
        bias = linear.bias.clone().zero_()
        bias[outputs] = small.bias
        linear.bias.copy_(bias)
