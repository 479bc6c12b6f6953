"""Budgets of latency and energy on devices: met by the device's own account, and used up."""

import pytest
import torch
import yaml

from hf_blockprune import BlockPruneConfig, BlockPruner, BudgetError, ConfigError
from hf_blockprune.budget import Budget
from hf_blockprune.checkpoint.simulation import predict, simulate_checkpoint
from hf_blockprune.cost.device_cost import DeviceCost
from hf_blockprune.cost.profiles import load_profile
from hf_blockprune.hub.blockprune_cost import Linear, VisionTransformer, layer_cost
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from tests.conftest import tiny_model

# Calls that cost little, so that the tiny models of the tests can become faster at all.
QUICK_CALLS = {"dense_call_us": 0.01, "sparse_call_us": 0.02, "input_gb_s": 100, "output_gb_s": 100, "weight_gb_s": 100}
CPU = {"kind": "cpu", "name": "quick", "cores": 1, "ghz": 1.0, "flops_per_cycle": 8, "dram_gb_s": 1000, **QUICK_CALLS}


@pytest.fixture
def device(tmp_path):
    """Writes a profile and gives its path."""

    def write(**changes):
        path = tmp_path / "device.yaml"
        path.write_text(yaml.safe_dump({**CPU, **changes}))
        return str(path)

    return write


def prune(processor, budget, **settings):
    config = BlockPruneConfig(block_shape=(8, 8), method="magnitude", budget=budget, **settings)
    pruner = BlockPruner(tiny_model(), processor, config, name="tiny")
    pruner.prune()
    return pruner


@pytest.mark.parametrize(
    ("metric", "ratio"), [("latency", 0.9), ("latency", 0.7), ("latency", 0.55), ("energy", 0.9), ("energy", 0.7)]
)
def test_masks_meet_a_devices_budget_and_use_it_up(processor, device, tmp_path, metric, ratio):
    path = device()
    pruner = prune(processor, Budget(metric, ratio, device=path))
    (budget,) = pruner.report()["budgets"]
    assert budget["reached"] <= budget["asked"] * (1 + 1e-9)
    assert budget["reached"] > 0.97 * budget["asked"]
    cost = predict(pruner.model, path)
    key = {"latency": "latency_ms", "energy": "energy_mj"}[metric]
    assert getattr(cost, key) == pytest.approx(budget["reached"], rel=1e-6)
    pruner.save_pretrained(tmp_path / "out")
    found = simulate_checkpoint(tmp_path / "out", path)
    assert found[key] == pytest.approx(budget["reached"], rel=1e-6)
    assert found[f"dense_{key}"] == pytest.approx(budget["dense"], rel=1e-6)


@pytest.mark.parametrize("ratio", [0.85, 0.7])
def test_what_is_cut_is_paid_for_no_more_and_spent_elsewhere(processor, device, ratio):
    path = device(input_gb_s=2.0)  # calls that read and write many features are dear
    model = tiny_model()
    for layer in model.base_model.layers:
        layer.mlp.fc1.weight.data[:40] *= 1e-4
        layer.mlp.fc2.weight.data[:, :40] *= 1e-4
    budget = Budget("latency", ratio, device=path)
    config = BlockPruneConfig(block_shape=(8, 8), method="magnitude", budget=budget, min_kept_per_layer=0.0)
    pruner = BlockPruner(model, processor, config, name="tiny")
    pruner.prune()
    assert sum(layer["cut_units"] for layer in pruner.report()["layers"]) >= 40
    (account,) = pruner.report()["budgets"]
    assert predict(pruner.model, path).latency_ms == pytest.approx(account["reached"], rel=1e-6)
    assert 0.97 * account["asked"] < account["reached"] <= account["asked"] * (1 + 1e-9)


def test_a_systolic_array_is_a_device_too(processor):
    pruner = prune(processor, Budget("latency", 0.8, device="systolic-16"))
    (budget,) = pruner.report()["budgets"]
    assert 0.9 * budget["asked"] < budget["reached"] <= budget["asked"]


def test_absolute_budgets(processor, device):
    path = device()
    (half,) = prune(processor, Budget("latency", 0.6, device=path)).report()["budgets"]
    (same,) = prune(processor, Budget("latency", value=half["asked"], device=path)).report()["budgets"]
    assert same["asked"] == pytest.approx(half["asked"])
    assert same["reached"] == half["reached"]
    (flops,) = prune(processor, Budget("flops", 0.7)).report()["budgets"]
    (absolute,) = prune(processor, Budget("flops", value=flops["asked"])).report()["budgets"]
    assert absolute["reached"] == flops["reached"]


@pytest.mark.parametrize(("flops", "latency"), [(0.6, 0.9), (0.9, 0.6)])
def test_two_budgets_are_both_met(processor, device, flops, latency):
    second = Budget("latency", latency, device=device())
    budgets = prune(processor, Budget("flops", flops), second_budget=second).report()["budgets"]
    assert [b["metric"] for b in budgets] == ["flops", "latency"]
    assert all(b["reached"] <= b["asked"] * (1 + 1e-9) for b in budgets)
    assert any(b["reached"] > 0.95 * b["asked"] for b in budgets)


def test_layers_that_would_run_dense_keep_all_blocks(processor, device):
    # Reading x costs a sparse product of the narrow layers more than pruning could save, but not of fc2.
    path = device(input_gb_s=0.9)
    pruner = prune(processor, Budget("latency", 0.93, device=path), min_kept_per_layer=0.0)
    layers = dict(block_sparse_layers(pruner.model))
    full = {name for name, layer in layers.items() if layer.density == 1}
    assert full
    profile = load_profile(path)
    for name, layer in layers.items():
        work = Linear(17, layer.out_features, layer.in_features, "float32", layer.mask().numpy(), (8, 8))
        if name not in full:
            assert layer_cost(profile, work).latency_ms < profile.dense(work).latency_ms


def test_budgets_that_calls_alone_exceed_are_refused(processor, device):
    path = device(sparse_call_us=5.0, dense_call_us=5.0)
    with pytest.raises(BudgetError, match=r"cannot be met on quick: with no block left .* budget.batch \(now 1\)"):
        prune(processor, Budget("latency", 0.3, device=path))


def test_a_models_cost_is_that_of_its_parts():
    model = VisionTransformer(196, 768, 197, 192, 3, 12, 1000)
    profile = load_profile("cpu-avx512")
    linears = {"a": Linear(197, 192, 192), "b": Linear(197, 768, 192)}
    cost = DeviceCost(profile, "latency", model, linears, (32, 32))
    masks = {"a": torch.rand(6, 6) < 0.2, "b": torch.ones(24, 6, dtype=torch.bool)}
    work = linears["a"]._replace(mask=masks["a"].numpy(), block_shape=(32, 32))
    parts = layer_cost(profile, work).latency_ms + profile.dense(linears["b"]).latency_ms
    assert cost.of(masks) == pytest.approx(cost.rest + parts)
    assert cost.of({}) == pytest.approx(cost.dense)
    assert cost.runs_dense("b", masks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "latency"}, "budget.device: expected a device profile"),
        ({"metric": "flops", "device": "cpu-avx2"}, "same on every device"),
        ({"metric": "latency", "ratio": 0.5, "value": 3.0, "device": "cpu-avx2"}, "leave one of them out"),
        ({"metric": "density", "value": 3.0}, "no absolute value"),
        ({"metric": "energy", "value": -1.0, "device": "cpu-avx2"}, "budget.value"),
        ({"metric": "energy", "device": "cpu-avx2", "batch": 0}, "budget.batch"),
    ],
    ids=str,
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Budget(**settings)


def test_unknown_devices_are_refused_by_name(processor):
    with pytest.raises(ConfigError, match="no profile 'abacus'"):
        prune(processor, Budget("latency", 0.7, device="abacus"))


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("latency=0.6@cpu-avx512", Budget("latency", 0.6, device="cpu-avx512")),
        ("latency = 8ms @ mine.yaml", Budget("latency", value=8.0, device="mine.yaml")),
        ("energy=5.5mJ@h100-sxm", Budget("energy", value=5.5, device="h100-sxm")),
    ],
)
def test_the_command_lines_form(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["latency=fast@cpu-avx2", "latency=3mJ@cpu-avx2", "flops=8ms", "latency=0.5"])
def test_other_forms_are_refused(text):
    with pytest.raises(ConfigError, match="budget"):
        Budget.parse(text)
