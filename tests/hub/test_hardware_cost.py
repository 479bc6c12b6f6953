"""`model.hardware_cost()` of loaded models, wherever their code comes from: what the checkpoint's simulation says."""

import copy
import json
from types import SimpleNamespace

import accelerate
import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hf_blockprune import BlockPruneConfig, BlockPruner, ConfigError, ModelError
from hf_blockprune.checkpoint.simulation import predict, simulate_checkpoint
from hf_blockprune.hub import blockprune_linear
from hf_blockprune.hub.blockprune_cost import Cost
from hf_blockprune.hub.blockprune_devices import DEVICES
from hf_blockprune.hub.blockprune_flops import UncountableError
from hf_blockprune.hub.blockprune_profiles import CpuProfile, DeviceError, named_profile
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers, pack_weights
from hf_blockprune.hub.blockprune_saving import install
from tests.conftest import WITHOUT_THE_PACKAGE, tiny_config, tiny_model
from tests.cutting import KEPT, cut_model
from tests.hub.saved_models import run, sparse_model

REPO = "someone/of-known-cost"
# Calls cost little there, so that even the tiny models of the tests are faster with fewer blocks.
QUICK = {
    "kind": "cpu",
    "name": "quick",
    "cores": 1,
    "ghz": 1.0,
    "flops_per_cycle": 8,
    "dram_gb_s": 1000,
    "dense_call_us": 0.01,
    "sparse_call_us": 0.02,
    "input_gb_s": 100,
    "output_gb_s": 100,
    "weight_gb_s": 100,
}


def close(cost, values):
    return all(getattr(cost, key) == pytest.approx(values[key]) for key in Cost._fields)


@pytest.fixture(params=["packed", "unpacked"])
def storage(request, monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_STORAGE", request.param)
    return request.param


@pytest.mark.parametrize("device", [*DEVICES, QUICK], ids=lambda device: device if isinstance(device, str) else "quick")
def test_a_loaded_model_costs_what_its_checkpoint_does(first, storage, device, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(first[0])
    assert {layer.is_unpacked for _, layer in block_sparse_layers(model)} == {storage == "unpacked"}
    path = tmp_path / "device.yaml"
    path.write_text(yaml.safe_dump(DEVICES.get(str(device), device)))
    for batch in (1, 64):
        simulated = simulate_checkpoint(first[0], path, batch=batch)
        cost = model.hardware_cost(device, batch=batch)
        assert close(cost, simulated)
        assert predict(model, path, batch=batch) == cost
        dense = copy.deepcopy(model).dequantize().hardware_cost(device, batch=batch)
        assert close(dense, {key: simulated[f"dense_{key}"] for key in Cost._fields})


def test_pruning_never_costs_and_saves_where_calls_are_cheap(first, loaded):
    for device in (*DEVICES, QUICK):
        pruned, dense = (model.hardware_cost(device) for model in (loaded, tiny_model()))
        assert pruned.latency_ms <= dense.latency_ms
        assert pruned.flops <= dense.flops
    pruned, dense = (model.hardware_cost(QUICK) for model in (loaded, tiny_model()))
    assert pruned.latency_ms < 0.9 * dense.latency_ms
    assert pruned.energy_mj < dense.energy_mj


@pytest.mark.parametrize("family", ["vit", "deit-distilled", "beit", "dinov2"])
def test_families_whose_cost_is_known(family, tmp_path):
    model = sparse_model(tiny_model(family))
    model.save_pretrained(tmp_path)
    assert close(model.hardware_cost("systolic-16"), simulate_checkpoint(tmp_path, "systolic-16"))


def test_layers_that_were_left_out_are_paid_for(tmp_path):
    """By the checkpoint's simulation too, which used to count the pruned ones alone."""
    model = sparse_model(tiny_model(), chosen=lambda name: ".mlp." in name)
    model.save_pretrained(tmp_path)
    for device in ("systolic-16", "h100-sxm"):
        simulated = simulate_checkpoint(tmp_path, device)
        assert close(model.hardware_cost(device), simulated)
        assert close(tiny_model().hardware_cost(device), {key: simulated[f"dense_{key}"] for key in Cost._fields})


def test_cut_hidden_units_are_not_paid_for(processor, tmp_path):
    model = tiny_model()
    for layer in model.base_model.layers:
        layer.mlp.fc1.weight.data[:40] *= 1e-4
        layer.mlp.fc2.weight.data[:, :40] *= 1e-4
    config = BlockPruneConfig(
        method="magnitude", block_shape=(8, 8), budget={"metric": "density", "ratio": 0.4}, min_kept_per_layer=0.0
    )
    pruner = BlockPruner(model, processor, config, name="tiny")
    pruner.prune()
    assert any(layer.dense_shape for _, layer in block_sparse_layers(pruner.model))
    pruner.save_pretrained(tmp_path / "cut")
    assert close(pruner.model.hardware_cost(QUICK), _simulated(tmp_path / "cut", QUICK, tmp_path))


@pytest.mark.parametrize("family", ["vit", "deit-distilled", "beit", "dinov2"])
@pytest.mark.parametrize("device", ["systolic-16", "h100-sxm", QUICK], ids=["array", "gpu", "quick"])
def test_cut_heads_are_not_paid_for(family, device, tmp_path):
    dense = tiny_model(family).hardware_cost(device, batch=2)
    model = cut_model(tiny_model(family), KEPT[family], share=0.7, others=True)
    model.save_pretrained(tmp_path / "cut")
    values = device if isinstance(device, dict) else DEVICES[device]
    (tmp_path / "device.yaml").write_text(yaml.safe_dump(values))
    simulated = simulate_checkpoint(tmp_path / "cut", tmp_path / "device.yaml", batch=2)
    assert close(model.hardware_cost(device, batch=2), simulated)
    assert close(dense, {key: simulated[f"dense_{key}"] for key in Cost._fields})
    assert simulated["other_parts"]["flops"] < simulated["dense_other_parts"]["flops"]
    assert close(model.dequantize().hardware_cost(device, batch=2), dense._asdict())


def test_flops_on_a_device_are_those_of_the_model_that_runs(monkeypatch):
    """But for norms, softmax and residuals, which multiply nothing."""
    monkeypatch.setenv("BLOCKPRUNE_STORAGE", "unpacked")
    model = cut_model(tiny_model(), KEPT["vit"])
    model.set_attn_implementation("eager")  # torch does not count fused attention on CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=torch.zeros(1, 3, 32, 32))
    assert model.hardware_cost(QUICK).flops == pytest.approx(counter.get_total_flops())


def _simulated(folder, values, work):
    (work / "device.yaml").write_text(yaml.safe_dump(values))
    return simulate_checkpoint(folder, work / "device.yaml")


def test_settings(loaded):
    usual = loaded.hardware_cost("h100-sxm")
    assert usual == loaded.hardware_cost(named_profile("h100-sxm")) == loaded.hardware_cost(DEVICES["h100-sxm"])
    assert usual == loaded.hardware_cost("h100-sxm", dtype="float16", batch=1)
    assert usual == loaded.half().hardware_cost("h100-sxm", dtype=torch.float16, image_size=32)
    assert usual.size_bytes < loaded.hardware_cost("h100-sxm", dtype="float32").size_bytes
    assert loaded.hardware_cost("cpu-avx2") == loaded.hardware_cost("cpu-avx2", dtype="float32")
    assert loaded.hardware_cost(CpuProfile("mine", 1, 1.0, 8)).latency_ms > 0


def test_images_of_another_size_than_the_configs(tmp_path):
    model = sparse_model(tiny_model("dinov2", image_size=64))
    smaller = model.hardware_cost("systolic-16", image_size=32)
    assert smaller == sparse_model(tiny_model("dinov2")).hardware_cost("systolic-16")
    assert smaller.flops < model.hardware_cost("systolic-16").flops
    oblong = model.hardware_cost("systolic-16", image_size=(32, 64))
    assert smaller.flops < oblong.flops < model.hardware_cost("systolic-16").flops


@pytest.mark.parametrize(
    ("device", "settings", "message"),
    [
        ("abacus", {}, r"no profile 'abacus'; name one of a100-sxm, .*vitcod"),
        (17, {}, "expected a name, a profile or its values, got int"),
        ({"kind": "cpu", "name": "mine"}, {}, "a cpu needs cores"),
        ("h100-sxm", {"dtype": "fp16"}, "dtype: expected one of float32, bfloat16, float16, int8, got 'fp16'"),
        ("h100-sxm", {"dtype": torch.int8}, "h100-sxm: no peak for int8; its profile has bfloat16"),
        ("h100-sxm", {"batch": 0}, "batch: expected a whole number from 1, got 0"),
        ("h100-sxm", {"batch": 2.5}, "batch: expected a whole number"),
    ],
)
def test_devices_and_settings_that_are_not_known_are_refused(loaded, device, settings, message):
    with pytest.raises(DeviceError, match=message) as caught:
        loaded.hardware_cost(device, **settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        predict(loaded, device, **settings)


OTHERS = {
    "stages": (lambda: tiny_model("swin"), "SwinConfig: no plain vision transformer"),
    "convolutions": (
        lambda: ConvNextForImageClassification(ConvNextConfig(image_size=32, depths=[1] * 4, hidden_sizes=[8] * 4)),
        "ConvNextConfig: no plain vision transformer",
    ),
    "text": (
        lambda: BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)),
        "BertConfig: its config has no image_size; costs are known of vision models",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_whose_cost_is_not_known_are_refused(kind):
    make, message = OTHERS[kind]
    with pytest.raises(UncountableError, match=message) as caught:
        make().hardware_cost("h100-sxm")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=message):
        predict(make(), "h100-sxm")


@pytest.mark.parametrize("size", [48, (32, 31, 3), 0, "large"])
def test_images_that_a_model_does_not_take_are_refused(loaded, size):
    with pytest.raises(UncountableError, match="image_size: "):
        loaded.hardware_cost("h100-sxm", image_size=size)


def test_vision_parts_and_encoders(tmp_path):
    config = tiny_config("vit")
    settings = {key: getattr(config, key) for key in ("image_size", "patch_size", "hidden_size", "intermediate_size")}
    model = SiglipVisionModel(SiglipVisionConfig(**settings, num_hidden_layers=2, num_attention_heads=3)).eval()
    dense = model.hardware_cost(QUICK)
    assert sparse_model(model).hardware_cost(QUICK).latency_ms < dense.latency_ms


def another_copys(layer):
    """The same layer, of the class that another copy of this code would make."""
    layer.__class__ = type("BlockSparseLinear", (nn.Module,), dict(vars(blockprune_linear.BlockSparseLinear)))
    return layer


def test_layers_of_another_copy_of_the_code_are_counted(loaded):
    """As of a model whose classes came with the checkpoint, in a process that has the package too."""
    expected = predict(loaded, QUICK)
    pack_weights(loaded)
    for _, layer in block_sparse_layers(loaded):
        layer.shared_input = None
        another_copys(layer)
    assert not any(isinstance(m, blockprune_linear.BlockSparseLinear) for m in loaded.modules())
    assert predict(loaded, QUICK) == expected


def offloaded(model):
    return accelerate.cpu_offload(model, execution_device="cpu")


def compiled_layers(model):
    layers = model.vit.layers
    for index in range(len(layers)):
        layers[index] = torch.compile(layers[index], backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def in_training(model):
    model.train()
    for module in model.modules():
        module.register_forward_hook(lambda *_: pytest.fail("called"))
    return model


@pytest.mark.parametrize(
    "around",
    [offloaded, compiled_layers, compiled_in_place, in_training, lambda model: torch.compile(model, backend="eager")],
)
def test_whatever_is_around_a_model_it_is_not_run(loaded, around):
    expected = loaded.hardware_cost(QUICK)
    model = around(loaded)
    before = {name: module.training for name, module in model.named_modules()}
    hooks = [vars(module).get("_hf_hook") for module in model.modules()]
    assert model.hardware_cost(QUICK) == expected
    assert before == {name: module.training for name, module in model.named_modules()}
    assert hooks == [vars(module).get("_hf_hook") for module in model.modules()]
    if around is not in_training:
        with torch.no_grad():
            assert torch.isfinite(model(pixel_values=torch.ones(1, 3, 32, 32)).logits).all()


def test_blocks_that_are_not_in_memory_are_not_guessed(loaded):
    model = accelerate.cpu_offload(loaded, execution_device="cpu", offload_buffers=True)
    with pytest.raises(UncountableError, match="which blocks it keeps is not in memory"):
        model.hardware_cost(QUICK)


def test_models_that_older_code_extended_answer_too(loaded, monkeypatch):
    """As where a checkpoint's own code, of an older version, came before the package."""
    expected = loaded.hardware_cost(QUICK)
    monkeypatch.delattr(PreTrainedModel, "hardware_cost")
    install()
    assert loaded.hardware_cost(QUICK) == expected


CHILD = """
import json, sys
from transformers import AutoModelForImageClassification

source, device, kwargs = json.loads(sys.argv[1])
model = AutoModelForImageClassification.from_pretrained(source, **kwargs)
assert type(model).__name__ == ("BlockPruneViT" if kwargs else "ViT") + "ForImageClassification"
costs = [model.hardware_cost(device, batch=2)._asdict(), model.hardware_cost("h100-sxm")._asdict()]
try:
    model.hardware_cost("abacus")
except ValueError as error:
    assert "cpu-avx512" in str(error), error
costs.append(model.dequantize().hardware_cost(device, batch=2)._asdict())
assert ("hf_blockprune" in sys.modules) == ("package" in sys.argv), sys.modules
print(json.dumps(costs))
"""


def costs_of(output):
    return [SimpleNamespace(**costs) for costs in json.loads(output.splitlines()[-1])]


def assert_those_of_the_checkpoint(costs, folder, work):
    own, h100, dense = costs
    (work / "device.yaml").write_text(yaml.safe_dump(QUICK))
    simulated = simulate_checkpoint(folder, work / "device.yaml", batch=2)
    assert close(own, simulated)
    assert close(dense, {key: simulated[f"dense_{key}"] for key in Cost._fields})
    assert close(h100, simulate_checkpoint(folder, "h100-sxm"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["package", "folder", "package and folder"])
def test_ways_of_loading_from_a_folder(first, way, tmp_path):
    package = "package" in way
    arguments = json.dumps([str(first[0]), QUICK, {} if way == "package" else {"trust_remote_code": True}])
    done = run(CHILD, tmp_path, arguments, *["package"] * package, package=package)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_those_of_the_checkpoint(costs_of(done.stdout), first[0], tmp_path)


@pytest.mark.slow
def test_without_the_package_from_a_repository(online, first, tmp_path):
    hub, client = online
    hub.add(REPO, first[0])
    arguments = json.dumps([REPO, QUICK, {"trust_remote_code": True}])
    output = client.run(WITHOUT_THE_PACKAGE + CHILD, arguments)
    assert_those_of_the_checkpoint(costs_of(output), first[0], tmp_path)
    fetched = {request.rpartition("/")[2] for request in hub.requests if f"/{REPO}/resolve/" in request}
    assert {"blockprune_model_cost.py", "blockprune_devices.py"} <= fetched
