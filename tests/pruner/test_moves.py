"""Hidden units and heads leave under one budget with blocks: what the pruned model is, and that it comes back."""

import copy
import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, Data2VecVisionConfig, Data2VecVisionForImageClassification

from hf_blockprune import BlockPruneConfig, BlockPruner
from hf_blockprune.cost.flops import count_flops
from hf_blockprune.errors import BudgetError, ConfigError
from hf_blockprune.hub.blockprune_heads import cut_heads
from hf_blockprune.hub.blockprune_layers import block_sparse_layers
from hf_blockprune.pruner import pruning
from tests.conftest import ALL_FAMILIES, tiny_model, tiny_settings, write_images

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ALL, DENSE = ("blocks", "units", "heads"), ("units", "heads")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("moves") / "images", 24)


def config(moves, ratio=0.7, **changes):
    settings = {"block_shape": (8, 8), "budget": {"metric": "flops", "ratio": ratio}, "moves": moves}
    calibration = {"samples": 24, "batch_size": 8}
    return BlockPruneConfig(**{**settings, "calibration": calibration, "min_kept_per_layer": 0.0, **changes})


def pruned(images, processor, family="vit", moves=ALL, model=None, **changes):
    pruner = BlockPruner(model or tiny_model(family), processor, config(moves, **changes), name="tiny")
    pruner.prune(str(images))
    return pruner


@pytest.fixture(scope="module")
def smaller(images, processor):
    """A model of a family from which units and heads left; to look at."""
    return functools.cache(lambda family: pruned(images, processor, family, DENSE))


def logits(model):
    with torch.no_grad():
        return model(pixel_values=PIXELS).logits


def counted(model):
    """FLOPs of one image as torch counts them while it runs, every block-sparse layer as a Linear of its own size."""
    for name, layer in list(block_sparse_layers(model)):
        model.set_submodule(name, layer.to_dense())
    model.set_attn_implementation("eager")  # torch does not count fused attention on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=PIXELS[:1])
    return counter.get_total_flops()


@pytest.mark.parametrize("moves", [ALL, DENSE])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_shrinks_meets_its_budget_and_comes_back(family, moves, smaller, images, processor, tmp_path):
    pruner = smaller(family) if moves == DENSE else pruned(images, processor, family, moves)
    report = pruner.report()
    assert report["flops_ratio"] <= 0.7 + 1e-9
    assert any(layer.dense_shape for _, layer in block_sparse_layers(pruner.model))
    wanted = logits(pruner.model)
    assert wanted.isfinite().all()
    pruner.save_pretrained(tmp_path / "out")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-5, atol=1e-5)
    assert cut_heads(loaded) == cut_heads(pruner.model)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_reported_flops_are_those_of_the_smaller_model(family, smaller):
    """Without blocks, torch counts just what the report says."""
    pruner = smaller(family)
    dense = count_flops(tiny_model(family))
    report = pruner.report()
    assert counted(copy.deepcopy(pruner.model)) / dense.total == pytest.approx(report["flops_ratio"], rel=1e-6)
    assert report["budgets"][0]["reached"] == pytest.approx(report["flops_ratio"] * dense.total, rel=1e-6)


def test_heads_leave_on_their_own(images, processor):
    pruner = pruned(images, processor, moves=("heads",), ratio=0.8)
    assert cut_heads(pruner.model)
    for name, layer in block_sparse_layers(pruner.model):
        assert layer.density == 1
        assert (layer.dense_shape is None) == ("fc" in name or layer.dense_shape is None)


def test_units_leave_on_their_own(images, processor):
    pruner = pruned(images, processor, moves=("units",), ratio=0.8)
    assert not cut_heads(pruner.model)
    cut = [layer for _, layer in block_sparse_layers(pruner.model) if layer.dense_shape]
    assert cut
    for layer in cut:
        assert min(layer.out_features, layer.in_features) % 8 == 0


def test_blocks_alone_leave_every_shape_that_has_blocks(images, processor):
    """The published setting: nothing rotates, no head leaves."""
    pruner = pruned(images, processor, moves=("blocks",))
    assert not cut_heads(pruner.model)
    assert not pruner.report()["permutation"]["rotated_heads"]


def test_position_biases_of_heads_keep_their_heads(smaller):
    for family in ("beit", "swin"):
        for cut in cut_heads(smaller(family).model):
            assert cut.heads == cut.dense_heads


def test_a_dense_form_has_the_architectures_shapes(images, processor):
    pruner = pruned(images, processor, moves=ALL, ratio=0.6)
    wanted = logits(pruner.model)
    dense = pruner.model.dequantize()
    assert not list(block_sparse_layers(dense))
    for name, parameter in tiny_model("vit").named_parameters():
        assert dense.get_parameter(name).shape == parameter.shape
    torch.testing.assert_close(logits(dense), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moves", [(), ("rows",), ("units", "units"), "units"])
def test_unknown_moves_are_refused(moves):
    with pytest.raises(ConfigError, match="moves"):
        config(moves)


@pytest.mark.parametrize("changes", [{"method": "taylor"}, {"refit": False}])
def test_moves_that_lack_statistics_or_a_refit_are_refused(changes):
    with pytest.raises(ConfigError, match="moves: units"):
        config(("blocks", "units"), **changes)


def test_defaults_follow_from_the_method():
    assert set(BlockPruneConfig().allowed_moves) == set(ALL)
    assert BlockPruneConfig().rotates
    for changes in ({"method": "taylor"}, {"refit": False}, {"balance": True}):
        assert BlockPruneConfig(**changes).allowed_moves == ("blocks",)
    assert not BlockPruneConfig(moves=("blocks",)).rotates


def test_attention_that_cannot_be_cut_is_told_of_or_left_alone(images, processor):
    made = Data2VecVisionConfig(**tiny_settings(), use_relative_position_bias=True)
    with pytest.raises(ConfigError, match=r"Data2VecVision.*leave 'heads' out"):
        pruned(images, processor, model=Data2VecVisionForImageClassification(made).eval(), moves=("heads",))
    pruner = pruned(images, processor, model=Data2VecVisionForImageClassification(made).eval(), moves=None)
    assert not cut_heads(pruner.model)


def test_layers_that_are_ignored_in_part_are_told_of(images, processor):
    with pytest.raises(ConfigError, match="units are not known"):
        pruned(images, processor, moves=("units",), ignore=("*.fc1",))


def test_a_budget_that_units_and_heads_cannot_meet(images, processor):
    model = tiny_model("vit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BudgetError, match="units and heads alone"):
        pruned(images, processor, model=model, moves=DENSE, ratio=0.1, min_kept_per_layer=0.5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_refit_that_fails_leaves_the_dense_model(images, processor, monkeypatch):
    model = tiny_model("vit")
    wanted = logits(model)

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "refit_layers", fails)
    with pytest.raises(KeyboardInterrupt):
        pruned(images, processor, model=model, moves=ALL)
    assert not cut_heads(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_model(images, processor, monkeypatch, tmp_path):
    def run(work_dir):
        model = tiny_model("vit")
        pruner = BlockPruner(model, processor, config(ALL), name="tiny")
        pruner.prune(str(images), work_dir=work_dir)
        return pruner.model

    wanted = run(tmp_path / "whole").state_dict()

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "refit_layers", fails)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    resumed = run(tmp_path / "parts").state_dict()
    assert resumed.keys() == wanted.keys()
    for name, value in resumed.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)


def test_device_budgets_know_units_and_heads(images, processor):
    pruner = BlockPruner(
        tiny_model("vit"),
        processor,
        config(ALL).replace(budget={"metric": "latency", "ratio": 0.8, "device": "systolic-32"}),
        name="tiny",
    )
    pruner.prune(str(images))
    [budget] = pruner.report()["budgets"]
    assert budget["reached"] <= 0.8 * budget["dense"] * (1 + 1e-9)
    cost = pruner.model.hardware_cost("systolic-32").latency_ms
    assert cost == pytest.approx(budget["reached"], rel=1e-6)
