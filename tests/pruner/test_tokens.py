"""Models that are pruned with tokens that merge."""

import copy

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_blockprune import BlockPruneConfig, BlockPruner, BudgetError, ConfigError, ModelError
from hf_blockprune.choose import selection
from hf_blockprune.choose.token_search import FREE
from hf_blockprune.hub.blockprune_tokens import TokenSchedule, merging_layers, schedule_of, set_schedule
from hf_blockprune.model.layers import full_states, groups_of
from hf_blockprune.model.targets import find_targets
from hf_blockprune.refit.suffixes import Suffixes
from tests.conftest import tiny_model

SETTINGS = {"hidden_size": 96, "intermediate_size": 192}
QUICK = {"block_shape": (8, 8), "coupling_rounds": 0, "true_loss_rounds": 0, "calibration": {"samples": 16}}


def config(**settings):
    return BlockPruneConfig.from_dict({**QUICK, "format_version": 1, **settings})


def pruned(processor, images, family="vit", **settings):
    pruner = BlockPruner(tiny_model(family, **SETTINGS), processor, config(**settings), name="tiny")
    pruner.prune(images)
    return pruner


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_numbers_are_taken_and_the_budget_is_met(processor, images, family, tmp_path):
    pruner = pruned(processor, images, family, tokens=[4, 2], budget={"metric": "flops", "ratio": 0.6})
    assert schedule_of(pruner.model) == TokenSchedule((4, 2), 16)
    report = pruner.report()
    assert 0.55 < report["flops_ratio"] <= 0.6
    assert report["tokens"]["leave"] == [4, 2]
    pruner.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).logits, pruner.model(pixels).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.85, 0.6])
def test_a_schedule_is_found(processor, images, ratio):
    pruner = pruned(processor, images, tokens="auto", budget={"metric": "flops", "ratio": ratio})
    report = pruner.report()
    tokens = report["tokens"]
    assert report["flops_ratio"] <= ratio
    assert schedule_of(pruner.model) == TokenSchedule(tuple(tokens["leave"]), 16)
    shares = [step["share"] for step in tokens["frontier"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1
    best = min(tokens["trials"], key=lambda trial: trial["divergence"])
    assert best["leave"] == tokens["leave"]
    free = next(step for step in tokens["frontier"] if step["leave"] == tokens["trials"][0]["leave"])
    assert free["divergence"] < FREE  # the other moves pay
    assert report["seconds"]["tokens"] > 0


def test_nothing_merges_where_other_moves_cost_less(processor, images):
    """Hidden units that do nothing are five sixths of all."""
    model = tiny_model("vit", **SETTINGS)
    with torch.no_grad():
        for layer in model.vit.layers:
            layer.mlp.fc2.weight[:, 32:] = 0
    dense = copy.deepcopy(model)
    settings = {"tokens": "auto", "moves": ["units"], "budget": {"metric": "flops", "ratio": 0.7}}
    pruner = BlockPruner(model, processor, config(**settings), name="tiny")
    pruner.prune(images)
    report = pruner.report()
    assert report["tokens"]["leave"] == [0, 15]  # what the class token does not read any more
    assert report["flops_ratio"] <= 0.7
    assert max(trial["divergence"] for trial in report["tokens"]["trials"]) > 1e-4
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(pruner.model(pixels).logits, dense(pixels).logits, rtol=0.02, atol=0.02)


def test_true_losses_are_those_of_layers_and_not_of_other_tokens_that_merge(processor, images, monkeypatch):
    measured, merging = selection.true_losses, []

    def true_losses(model, *args, **kwargs):
        merging.append(len(merging_layers(model)))
        return measured(model, *args, **kwargs)

    monkeypatch.setattr(selection, "true_losses", true_losses)
    budget = {"metric": "flops", "ratio": 0.5}
    pruner = pruned(processor, images, tokens=[4, 2], budget=budget, true_loss_rounds=1)
    assert merging == [0]
    assert schedule_of(pruner.model) == TokenSchedule((4, 2), 16)


@pytest.mark.parametrize("tokens", ["auto", [8, 4]])
def test_tokens_alone(processor, images, tokens):
    pruner = pruned(processor, images, tokens=tokens, moves=[], budget={"metric": "flops", "ratio": 0.7})
    report = pruner.report()
    assert report["flops_ratio"] <= 0.7
    assert report["density"] == 1
    assert report["permutation"] is None
    assert all(layer["kept_shape"] is None for layer in report["layers"])
    assert len(report["tokens"]["trials"]) == (1 if tokens == "auto" else 0)


def test_tokens_alone_without_refit_are_merging_and_nothing_else(processor, images):
    budget = {"metric": "flops", "ratio": 0.7}
    pruner = pruned(processor, images, tokens=[8, 4], moves=[], refit=False, budget=budget)
    model = tiny_model("vit", **SETTINGS)
    set_schedule(model, TokenSchedule((8, 4), 16), find_targets(model, config()))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(pruner.model(pixels).logits, model(pixels).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([1, 1], "cannot be met by tokens alone, which leave 0.9"), ("auto", "however many tokens merge; 0.[0-9]+ is")],
)
def test_tokens_alone_may_not_be_enough(processor, images, tokens, message):
    model = tiny_model("vit", **SETTINGS)
    settings = config(tokens=tokens, moves=[], budget={"metric": "flops", "ratio": 0.2})
    with pytest.raises(BudgetError, match=message):
        BlockPruner(model, processor, settings, name="tiny").prune(images)
    assert schedule_of(model) is None


def test_recovery_learns_with_merged_tokens(processor, images):
    pruner = pruned(processor, images, tokens=[4, 2], budget={"metric": "flops", "ratio": 0.5})
    pruner.recover(images, teacher=BlockPruner(tiny_model("vit", **SETTINGS), processor))
    assert pruner.report()["recovery"]["divergence"].keys() >= {"pruned", "reconstruction", "distillation"}
    assert schedule_of(pruner.model) == TokenSchedule((4, 2), 16)


def test_a_failure_leaves_the_model_as_it_was(processor, images):
    model = tiny_model("vit", **SETTINGS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = config(tokens=[4, 2], budget={"metric": "flops", "ratio": 0.02})
    with pytest.raises(Exception, match="cannot be met"):
        BlockPruner(model, processor, settings, name="tiny").prune(images)
    assert schedule_of(model) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": "some"}, "tokens: expected 'auto', 'keep', or a list"),
        ({"tokens": []}, "tokens: expected"),
        ({"tokens": [1, -1]}, "tokens: expected"),
        ({"moves": []}, "an empty list leaves all to tokens, which stay"),
        ({"tokens": [True, 1]}, "tokens: expected"),
        ({"tokens": "auto", "budget": {"metric": "density", "ratio": 0.5}}, "tokens: merging saves no weights"),
        ({"tokens": "auto", "method": "magnitude", "refit": False}, "tokens: 'auto' needs calibration images"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("family", "tokens", "message"),
    [
        ("vit", [1, 1, 1], "3 numbers, but the model has 2 layers"),
        ("vit", [8, 8], "16 of 16 patches leave"),
        ("beit", [1, 1], "a bias for each pair of places"),
        ("swin", [1, 1], "within windows"),
    ],
)
def test_models_that_cannot_are_refused(processor, images, family, tokens, message):
    pruner = BlockPruner(tiny_model(family), processor, config(tokens=tokens), name="tiny")
    with pytest.raises(ModelError, match=message):
        pruner.prune(images)


def test_suffixes_go_on_from_merged_tokens():
    model = tiny_model("vit", **SETTINGS)
    names = [
        name
        for name, module in model.named_modules()
        if name.startswith("vit.layers.") and hasattr(module, "in_features")
    ]
    set_schedule(model, TokenSchedule((4, 2), 16), names)
    batches = [torch.randn(3, 3, 32, 32)]
    suffixes = Suffixes(model, names, batches)
    changed = "vit.layers.1.mlp.fc1"
    with torch.no_grad():
        model.get_submodule(changed).weight.mul_(1.5)
        (found,) = suffixes.run([changed])
        torch.testing.assert_close(found.logits, model(batches[0]).logits)
    assert suffixes.layers


def test_states_of_all_tokens_come_back():
    states = torch.randn(2, 3, 5)
    merged = (states, torch.tensor([[1.0, 2.0, 1.0]] * 2), torch.tensor([[0, 1, 1, 2]] * 2))
    assert groups_of(states) is None
    assert torch.equal(full_states(states), states)
    assert torch.equal(full_states(merged)[:, 2], states[:, 1])
