"""Dead hidden units leave the shapes, and nothing else changes."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForImageClassification

from hf_blockprune import BlockPruneConfig, BlockPruner, RecoveryConfig, sparsify
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.choose.budgets import model_budgets
from hf_blockprune.choose.coupling import drop_unused
from hf_blockprune.choose.selection import Selector
from hf_blockprune.cost.flops import count_flops
from hf_blockprune.errors import BlockSparseFormatError
from hf_blockprune.hub.blockprune_config import FORMAT_VERSION
from hf_blockprune.hub.blockprune_linear import BlockSparseLinear
from hf_blockprune.model.structure import find_transformer_layers
from hf_blockprune.model.targets import find_targets
from hf_blockprune.recover.recovery import recover
from hf_blockprune.reorder.changes import Changes
from hf_blockprune.reorder.cutting import cut_hidden_units
from hf_blockprune.reorder.reordering import Reordering
from hf_blockprune.reorder.state import ReorderingState
from hf_blockprune.score.blocks import expand_mask, grid_shape
from tests.conftest import tiny_model
from tests.reorder.test_hidden import statistics_of

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SHAPES = [(8, 8), (16, 4), (4, 16), (48, 1), (12, 8), (40, 8)]


def logits(model):
    with torch.no_grad():
        return model(pixel_values=PIXELS).logits


def parts(model, shape):
    targets = find_targets(model, BlockPruneConfig(block_shape=shape))
    return targets, find_transformer_layers(model, targets)


def masks_with_dead_units(targets, layers, shape, seed, dead=0.5):
    """Random masks in which `dead` of fc1's block rows and of fc2's block columns are empty."""
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: torch.rand(grid_shape(tuple(linear.weight.shape), shape), generator=generator) < 0.7
        for name, linear in targets.items()
    }
    for layer in layers:
        unit = torch.rand(96 // 8, generator=generator) < dead
        units = unit.repeat_interleave(8)
        rows, cols = shape
        masks[layer.fc1] &= ~torch.stack([part.all() for part in units.split(rows)])[:, None]
        masks[layer.fc2] &= ~torch.stack([part.all() for part in units.split(cols)])
    return masks


def cut_model(family, shape, seed=0, dead=0.5):
    """(model with masks, the same one cut, units cut)."""
    model = tiny_model(family)
    targets, layers = parts(model, shape)
    whole = sparsify(model, masks_with_dead_units(targets, layers, shape, seed, dead), shape)
    small = copy.deepcopy(whole)
    return whole, small, cut_hidden_units(small, layers)


@given(st.sampled_from(SHAPES), st.integers(0, 2**16), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
@settings(max_examples=40, deadline=None)
def test_predictions_stay(shape, seed, dead):
    whole, small, counts = cut_model("vit", shape, seed, dead)
    torch.testing.assert_close(logits(small), logits(whole), atol=1e-5, rtol=1e-5)
    for name, count in counts.items():
        fc1, fc2 = small.get_submodule(name), small.get_submodule(name.replace("fc1", "fc2"))
        assert fc1.out_features == fc2.in_features == 96 - count > 0
        assert fc1.nnz_blocks == whole.get_submodule(name).nnz_blocks


def test_all_dead_groups_go():
    whole, small, counts = cut_model("vit", (8, 8))
    for name, count in counts.items():
        made = whole.get_submodule(name).mask().any(dim=1)
        read = whole.get_submodule(name.replace("fc1", "fc2")).mask().any(dim=0)
        assert count == 8 * int((~made & ~read).sum()) > 0
        assert small.get_submodule(name).mask().any(dim=1).sum() == made.sum()


def test_an_mlp_that_is_all_dead_keeps_one_group():
    model = tiny_model()
    targets, layers = parts(model, (8, 8))
    masks = {n: torch.ones(grid_shape(tuple(t.weight.shape), (8, 8)), dtype=torch.bool) for n, t in targets.items()}
    masks[layers[0].fc1][:] = False
    masks[layers[0].fc2][:] = False
    whole = sparsify(model, masks, (8, 8))
    small = copy.deepcopy(whole)
    assert cut_hidden_units(small, layers) == {layers[0].fc1: 88, layers[1].fc1: 0}
    torch.testing.assert_close(logits(small), logits(whole))


def test_save_load_inspect_dequantize(family, tmp_path):
    whole, small, counts = cut_model(family, (8, 8))
    small.save_pretrained(tmp_path / "small")
    stored = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == FORMAT_VERSION
    assert len(stored["cut"]) == 2 * sum(count > 0 for count in counts.values())
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(loaded), logits(whole), atol=1e-5, rtol=1e-5)

    whole.save_pretrained(tmp_path / "whole")
    small_info, info = inspect_checkpoint(tmp_path / "small"), inspect_checkpoint(tmp_path / "whole")
    assert small_info["flops_ratio"] == pytest.approx(info["flops_ratio"])
    assert small_info["density"] == info["density"]
    assert small_info["size_bytes"] < info["size_bytes"]
    for layer in small_info["layers"]:
        with safe_open(tmp_path / "small" / "model.safetensors", framework="pt") as file:
            assert layer["stored_shape"][0] == file.get_slice(f"{layer['name']}.bias").get_shape()[0]

    dense = loaded.dequantize()
    torch.testing.assert_close(logits(dense), logits(whole), atol=1e-5, rtol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(again), logits(whole), atol=1e-5, rtol=1e-5)


def test_a_cut_model_is_saved_again_as_it_is(tmp_path):
    _, small, _ = cut_model("vit", (8, 8))
    small.save_pretrained(tmp_path / "once")
    AutoModelForImageClassification.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice")]
    assert files[0] == files[1]


def test_a_cut_model_recovers(found, processor, accelerator):
    _, small, _ = cut_model("vit", (8, 8))
    shapes = {name: tuple(value.shape) for name, value in small.state_dict().items()}
    result = recover(
        small,
        tiny_model(),
        found,
        processor,
        RecoveryConfig(samples=24, batch_size=8, epochs=2),
        accelerator=accelerator,
    )
    assert result.divergence[result.kept] < result.divergence["pruned"]
    assert {name: tuple(value.shape) for name, value in small.state_dict().items()} == shapes


def test_rows_with_blocks_are_not_cut():
    layer = BlockSparseLinear.from_dense(nn.Linear(8, 8), torch.eye(2, dtype=torch.bool), (4, 4))
    with pytest.raises(BlockSparseFormatError, match="cut"):
        layer.cut(rows=torch.tensor([True, False]))


@given(st.sampled_from(SHAPES), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_unused_blocks_do_nothing_that_a_bias_cannot(shape, seed):
    """With constant inputs folded into biases, the model without unused blocks predicts as the one with them."""
    model = tiny_model(seed=seed % 5)
    targets, layers = parts(model, shape)
    masks = masks_with_dead_units(targets, layers, shape, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for name in (layer.query, layer.key, layer.value, layer.fc1):
            masks[name] &= (torch.rand(len(masks[name]), generator=generator) < 0.6)[:, None]
        for name in (layer.out, layer.fc2):
            masks[name] &= torch.rand(masks[name].shape[1], generator=generator) < 0.6
    used = drop_unused(layers, masks, targets, shape)
    folded = copy.deepcopy(model)
    for layer in layers:
        for producer, consumer, act in (
            (layer.fc1, layer.fc2, torch.nn.functional.gelu),
            (layer.value, layer.out, None),
        ):
            linear = folded.get_submodule(consumer)
            entries = expand_mask(masks[consumer] & ~used[consumer], tuple(linear.weight.shape), shape)
            constant = folded.get_submodule(producer).bias
            constant = act(constant) if act else constant
            linear.bias.data += (linear.weight * entries) @ constant
    before, after = sparsify(model, masks, shape), sparsify(folded, used, shape)
    torch.testing.assert_close(logits(after), logits(before), atol=1e-4, rtol=1e-4)
    again = drop_unused(layers, used, targets, shape)
    assert all(torch.equal(again[name], mask) for name, mask in used.items())


@pytest.mark.parametrize("ratio", [0.45, 0.6, 0.8])
def test_no_chosen_block_is_unused_and_the_budget_is_spent(accelerator, ratio):
    """Half of the units are worth little, so that their blocks go on one side at least."""
    model = tiny_model()
    targets, layers = parts(model, (8, 8))
    statistics = statistics_of(targets)
    for layer in layers:
        targets[layer.fc2].weight.data[:, ::2] *= 0.05
    config = BlockPruneConfig(
        block_shape=(8, 8), budget={"metric": "flops", "ratio": ratio}, min_kept_per_layer=0, true_loss_rounds=0
    )
    flops = count_flops(model)
    budgets = model_budgets(config, model, targets, flops)
    reordering = Reordering(model, layers, targets, config, accelerator, Changes(), ReorderingState())
    statistics = reordering.run(statistics, 0.5).statistics
    allocation = Selector(model, targets, statistics, flops, budgets, config, accelerator).select().allocation
    used = drop_unused(layers, allocation.masks, targets, (8, 8))
    assert all(torch.equal(used[name], mask) for name, mask in allocation.masks.items())
    budget = budgets[0].blocks
    spare = budget.blocks - budget.needed - allocation.kept_cost[0]
    assert 0 <= spare < 0.02 * budget.blocks
    kept = sum(float(budget.costs[name][mask].sum()) for name, mask in allocation.masks.items())
    assert kept == pytest.approx(allocation.kept_cost[0])


@pytest.mark.parametrize("method", ["magnitude", "obs"])
def test_prune_cuts_what_is_dead(processor, images, tmp_path, method):
    config = BlockPruneConfig(
        block_shape=(8, 8),
        method=method,
        budget={"metric": "flops", "ratio": 0.4},
        min_kept_per_layer=0.02,
        calibration={"samples": 24},
    )
    model = tiny_model()
    for layer in model.vit.layers:
        layer.mlp.fc1.weight.data[:32] *= 1e-3
        layer.mlp.fc2.weight.data[:, :32] *= 1e-3
    pruner = BlockPruner(model, processor, config)
    pruner.prune(images)
    report = {layer["name"]: layer for layer in pruner.report()["layers"]}
    for layer in model.vit.layers:
        assert layer.mlp.fc1.out_features <= 64
    assert report["vit.layers.0.mlp.fc1"]["cut_units"] == 96 - model.vit.layers[0].mlp.fc1.out_features
    pruner.save_pretrained(tmp_path / "out")
    stored = inspect_checkpoint(tmp_path / "out")
    assert stored["flops_ratio"] == pytest.approx(pruner.report()["flops_ratio"])
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(pruner.model))
