"""Exported models answer as the checkpoint does, where they are meant to be used."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from hf_blockprune import BlockPruneConfig, BlockPruner, CheckpointError, ModelError, sparsify
from hf_blockprune.cli import app
from hf_blockprune.export.forms import export_checkpoint
from hf_blockprune.hub.blockprune_heads import CutHeads, set_heads
from hf_blockprune.hub.blockprune_layers import is_block_sparse
from hf_blockprune.hub.blockprune_linear import BlockSparseLinear
from hf_blockprune.hub.blockprune_tokens import TokenSchedule, forget_schedule, set_schedule
from hf_blockprune.model.structure import find_transformer_layers
from hf_blockprune.model.targets import find_targets
from hf_blockprune.reorder.cutting import cut_hidden_units
from hf_blockprune.score.blocks import grid_shape
from tests.conftest import ROOT, WITHOUT_THE_PACKAGE, tiny_model
from tests.cutting import KEPT, cut_model
from tests.forking import plain_forks
from tests.hub.saved_models import sparse_model

LOAD_DENSE = """
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
AutoImageProcessor.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""
LOAD_PROGRAM = """
import sys, torch
import hf_blockprune
with open(sys.argv[1], "rb") as file:
    program = torch.export.load(file).module()
torch.save(program(torch.load(sys.argv[2])).detach(), sys.argv[3])
"""
# `find_spec` does not find what is hidden so, as where it is not installed.
HIDE = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "onnxruntime" else found(name, package)
"""
RUNNER = CliRunner()


@pytest.fixture(scope="module", params=["vit", "deit-distilled"])
def pruned(request, processor, images, tmp_path_factory):
    """(folder, model), with hidden units cut out of the ViT."""
    config = BlockPruneConfig(
        method="magnitude", block_shape=(8, 8), budget={"metric": "density", "ratio": 0.4}, min_kept_per_layer=0.01
    )
    dense = tiny_model(request.param)
    for layer in dense.base_model.layers:
        layer.mlp.fc1.weight.data[:32] *= 1e-4
        layer.mlp.fc2.weight.data[:, :32] *= 1e-4
    pruner = BlockPruner(dense, processor, config)
    model = pruner.prune()
    assert sum(layer["cut_units"] for layer in pruner.report()["layers"])
    folder = tmp_path_factory.mktemp("pruned") / request.param
    pruner.save_pretrained(folder)
    return folder, model


def pixels(batch):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits_of(model, x):
    return model(pixel_values=x).logits


def run(script, tmp_path, source):
    torch.save(pixels(5), tmp_path / "pixels.pt")
    done = plain_forks().run("-c", script, source, tmp_path / "pixels.pt", tmp_path / "logits.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "logits.pt")


@pytest.mark.slow
def test_a_dense_export_needs_nothing_of_the_package(pruned, tmp_path):
    folder, model = pruned
    values = export_checkpoint(folder, tmp_path / "dense", "dense")
    assert values["max_difference"] < 1e-5
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert not {"quantization_config", "auto_map"} & set(config)
    assert not list((tmp_path / "dense").glob("*blockprune*"))
    with safe_open(tmp_path / "dense/model.safetensors", framework="pt") as file:
        zeros = sum(int((file.get_tensor(key) == 0).sum()) for key in file.keys() if key.endswith("weight"))  # noqa: SIM118
        assert zeros > 0.3 * sum(file.get_tensor(key).numel() for key in file.keys() if "layer" in key)  # noqa: SIM118
    logits = run(WITHOUT_THE_PACKAGE + LOAD_DENSE, tmp_path, tmp_path / "dense")
    torch.testing.assert_close(logits, logits_of(model, pixels(5)), rtol=1e-5, atol=1e-5)


def cut_checkpoint(folder, processor, family, widths, **changes):
    """Save a model of which each MLP keeps so many hidden units, and a random part of its other blocks of 4x4."""
    model = tiny_model(family, **changes)
    targets = find_targets(model, BlockPruneConfig(block_shape=(4, 4)))
    layers = find_transformer_layers(model, targets)
    masks = {name: torch.rand(grid_shape(tuple(t.weight.shape), (4, 4))) < 0.8 for name, t in targets.items()}
    for layer, width in zip(layers, widths, strict=True):
        masks[layer.fc1][width // 4 :], masks[layer.fc2][:, width // 4 :] = False, False
        masks[layer.fc1][: width // 4, 0] = True
    sparse = sparsify(model, masks, (4, 4))
    counts = cut_hidden_units(sparse, layers)
    sparse.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sparse.eval(), sum(counts.values())


def test_an_onnx_export_leaves_out_what_was_cut(processor, tmp_path):
    model, cut = cut_checkpoint(tmp_path / "pruned", processor, "vit", (36, 52))
    values = export_checkpoint(tmp_path / "pruned", tmp_path / "model.onnx", "onnx")
    assert (values["cut_units"], values["cut_units_kept_as_zeros"]) == (cut, 0) == (60 + 44, 0)
    weights = {tuple(sorted(tensor.dims)) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert {(36, 48), (48, 52)} <= weights
    assert not any(96 in shape for shape in weights)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pixel_values": pixels(5).numpy()})
    np.testing.assert_allclose(found, logits_of(model, pixels(5)).numpy(), rtol=1e-4, atol=1e-4)


def test_a_program_leaves_out_what_was_cut(processor, tmp_path):
    model, cut = cut_checkpoint(tmp_path / "pruned", processor, "vit", (36, 52))
    values = export_checkpoint(tmp_path / "pruned", tmp_path / "model.pt2", "torch-export")
    assert (values["cut_units"], values["cut_units_kept_as_zeros"]) == (cut, 0)
    with (tmp_path / "model.pt2").open("rb") as file:
        state = torch.export.load(file).state_dict
    have = {name.removeprefix("model."): tensor.shape for name, tensor in state.items()}
    assert have == {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("form", ["onnx", "torch-export", "dense"])
@pytest.mark.parametrize("family", ["vit", "beit"])
def test_heads_that_were_cut(processor, tmp_path, family, form):
    """Programs leave them out; a stock folder's attentions are whole."""
    model = cut_model(tiny_model(family), KEPT[family], share=0.8, others=True)
    model.save_pretrained(tmp_path / "pruned")
    processor.save_pretrained(tmp_path / "pruned")
    values = export_checkpoint(tmp_path / "pruned", tmp_path / "out", form)
    cut = sum(48 - heads * size for heads, size in KEPT[family])
    kept = cut if form == "dense" else 0
    assert (values["cut_head_features"], values["cut_head_features_kept_as_zeros"]) == (cut, kept)
    assert (values["cut_units"], values["cut_units_kept_as_zeros"]) == (0, 0)
    expected = logits_of(model, pixels(3))
    if form == "dense":
        dense = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(logits_of(dense, pixels(3)), expected, rtol=1e-5, atol=1e-5)
    elif form == "onnx":
        session = onnxruntime.InferenceSession(str(tmp_path / "out"), providers=["CPUExecutionProvider"])
        (found,) = session.run(["logits"], {"pixel_values": pixels(3).numpy()})
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
        sizes = {size for tensor in onnx.load(tmp_path / "out").graph.initializer for size in tensor.dims}
        assert {heads * size for heads, size in KEPT[family]} <= sizes
    else:
        with (tmp_path / "out").open("rb") as file:
            program = torch.export.load(file).module()
        torch.testing.assert_close(program(pixels(3)).detach(), expected, rtol=1e-5, atol=1e-5)


def test_a_stock_folder_of_a_model_without_units_and_heads(processor, tmp_path):
    """MLPs get narrower; attentions do not."""
    model, _ = cut_checkpoint(tmp_path / "units", processor, "vit", (36, 52))
    linears = {name: module for name, module in model.named_modules() if is_block_sparse(module)}
    layer = find_transformer_layers(model, linears)[0]
    cut = CutHeads(layer.query, layer.key, layer.value, layer.out, 2, 8, 3, 16)
    for name in cut.names():
        whole = model.get_submodule(name)
        stays = torch.arange(12) < 4  # of the blocks along the features of heads
        mask = whole.mask() & (stays if name == cut.out else stays[:, None])
        kept = BlockSparseLinear.from_dense(whole.to_dense(), mask, (4, 4))
        model.set_submodule(name, kept.cut(cols=stays) if name == cut.out else kept.cut(rows=stays))
    set_heads(model, cut)
    expected = logits_of(model, pixels(3))
    model.save_pretrained(tmp_path / "pruned")
    processor.save_pretrained(tmp_path / "pruned")
    values = export_checkpoint(tmp_path / "pruned", tmp_path / "dense", "dense")
    assert (values["cut_units"], values["cut_units_kept_as_zeros"]) == (60 + 44, 16)
    assert (values["cut_head_features"], values["cut_head_features_kept_as_zeros"]) == (32, 32)
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert dense.config.intermediate_size == 52
    torch.testing.assert_close(logits_of(dense, pixels(3)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "widths", "setting", "value", "zeros"),
    [
        ("vit", {}, (52, 52), "intermediate_size", 52, 0),
        ("deit-distilled", {}, (36, 52), "intermediate_size", 52, 16),
        ("vit", {}, (36, 96), "intermediate_size", 96, 60),  # one MLP is whole
        # 60 / 44 * 44 is less than 60 in floating point, and the model rounds down.
        ("swin", {"embed_dim": 44, "num_heads": [4, 8]}, (60, 60, 120, 120), "mlp_ratio", 60 / 44, 0),
        ("dinov2", {"mlp_ratio": 3}, (52, 60), "mlp_ratio", 2, 44 + 36),  # a whole number, it says
    ],
)
def test_a_stock_folder_has_the_width_of_the_widest_mlp(
    processor, tmp_path, family, changes, widths, setting, value, zeros
):
    model, cut = cut_checkpoint(tmp_path / "pruned", processor, family, widths, **changes)
    values = export_checkpoint(tmp_path / "pruned", tmp_path / "dense", "dense")
    assert (values["cut_units"], values["cut_units_kept_as_zeros"]) == (cut, zeros)
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert getattr(dense.config, setting) == pytest.approx(value)
    torch.testing.assert_close(logits_of(dense, pixels(3)), logits_of(model, pixels(3)), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def onnx_file(pruned, tmp_path_factory):
    """What the command makes of it."""
    folder, _ = pruned
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    done = RUNNER.invoke(app, ["export", str(folder), "--onnx", "-o", str(file), "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["format"] == "onnx"
    assert values["size_bytes"] == file.stat().st_size
    return file


def test_an_onnx_export_takes_any_batch(pruned, onnx_file):
    _, model = pruned
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        (found,) = session.run(["logits"], {"pixel_values": pixels(batch).numpy()})
        np.testing.assert_allclose(found, logits_of(model, pixels(batch)).numpy(), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def program_file(pruned, tmp_path_factory):
    file = tmp_path_factory.mktemp("program") / "model.pt2"
    export_checkpoint(pruned[0], file, "torch-export")
    return file


@pytest.mark.slow
def test_a_program_keeps_its_kernels_and_runs_in_another_process(pruned, program_file, tmp_path):
    _, model = pruned
    with program_file.open("rb") as file:
        graph = torch.export.load(file).graph
    assert any("blockprune" in str(node.target) for node in graph.nodes)
    logits = run(LOAD_PROGRAM, tmp_path, program_file)
    torch.testing.assert_close(logits, logits_of(model, pixels(5)), rtol=1e-5, atol=1e-5)


def test_files_for_others_name_no_folder_of_this_machine(onnx_file, program_file):
    for file in (onnx_file, program_file):
        content = file.read_bytes()
        for folder in (ROOT, Path(torch.__file__).parents[1]):
            assert str(folder).encode() not in content


def test_a_bias_that_refitting_gave_stays(processor, tmp_path):
    """The architecture has one for q, k and v, or for none of them."""
    model = tiny_model("vit", qkv_bias=False)
    name = next(name for name, _ in model.named_modules() if name.endswith("q_proj"))
    grid = grid_shape(tuple(model.get_submodule(name).weight.shape), (8, 8))
    layer = sparsify(model, {name: torch.rand(grid) < 0.5}, (8, 8)).get_submodule(name)
    layer.bias = torch.nn.Parameter(torch.randn(layer.out_features))
    model.save_pretrained(tmp_path / "pruned")
    processor.save_pretrained(tmp_path / "pruned")
    export_checkpoint(tmp_path / "pruned", tmp_path / "dense", "dense")
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits_of(dense, pixels(2)), logits_of(model, pixels(2)), rtol=1e-5, atol=1e-5)


def test_a_bias_that_the_architecture_never_has_is_named(processor, tmp_path):
    """Swin's patch merging has none, and its config has no setting for one."""
    model = tiny_model("swin")
    name = next(name for name, _ in model.named_modules() if name.endswith("reduction"))
    assert model.get_submodule(name).bias is None
    grid = grid_shape(tuple(model.get_submodule(name).weight.shape), (8, 8))
    layer = sparsify(model, {name: torch.rand(grid) < 0.5}, (8, 8)).get_submodule(name)
    layer.bias = torch.nn.Parameter(torch.randn(layer.out_features))
    model.save_pretrained(tmp_path / "pruned")
    processor.save_pretrained(tmp_path / "pruned")
    with pytest.raises(CheckpointError, match=f"refitting gave biases to 1 Linears .*{name}.*refit=False"):
        export_checkpoint(tmp_path / "pruned", tmp_path / "dense", "dense")
    assert not (tmp_path / "dense").exists()


def test_a_full_disk_leaves_nothing(forks, pruned, tmp_path):
    script = f"""
import resource, signal, sys
from hf_blockprune import CheckpointError
from hf_blockprune.export.forms import export_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    export_checkpoint({str(pruned[0])!r}, {str(tmp_path / "model.pt2")!r}, "torch-export")
except CheckpointError as error:
    print(error)
"""
    done = forks.run("-c", script)
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout
    assert not list(tmp_path.iterdir())


def test_what_exists_is_replaced_on_demand_only(pruned, tmp_path):
    file = tmp_path / "model.pt2"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="--overwrite"):
        export_checkpoint(pruned[0], file, "torch-export")
    assert file.read_text() == "mine"
    export_checkpoint(pruned[0], file, "torch-export", overwrite=True)
    assert file.stat().st_size > 1000
    with pytest.raises(CheckpointError, match="is a folder"):
        export_checkpoint(pruned[0], tmp_path, "torch-export", overwrite=True)


def test_an_export_that_answers_otherwise_is_not_kept(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_blockprune.export.forms.TOLERANCE", -1.0)
    for form, name in (("dense", "dense"), ("torch-export", "model.pt2")):
        with pytest.raises(CheckpointError, match="was not kept"):
            export_checkpoint(pruned[0], tmp_path / name, form)
    assert not list(tmp_path.iterdir())


def test_dense_models_are_not_exported(vit_folder, tmp_path):
    with pytest.raises(ModelError, match="no block-sparse layers"):
        export_checkpoint(vit_folder, tmp_path / "dense", "dense")


@pytest.mark.parametrize("forms", [[], ["--dense", "--onnx"]])
def test_one_form_is_asked_for(pruned, tmp_path, forms):
    done = RUNNER.invoke(app, ["export", str(pruned[0]), *forms, "-o", str(tmp_path / "x")])
    assert done.exit_code == 2


@pytest.mark.slow
def test_missing_packages_are_named(forks, pruned, tmp_path):
    script = HIDE + "from hf_blockprune.cli import app; app(sys.argv[1:])"
    done = forks.run("-c", script, "export", pruned[0], "--onnx", "-o", tmp_path / "model.onnx")
    assert done.returncode == 1
    assert "onnxruntime" in done.stderr
    assert "pip install 'hf_blockprune[onnx]'" in done.stderr


@pytest.mark.parametrize("family", ["vit", "dinov2"])
@pytest.mark.parametrize("form", ["onnx", "torch-export", "dense"])
def test_tokens_that_merge(processor, tmp_path, family, form, caplog):
    """They do in programs, of any number of images; a stock folder's do not, which is said."""
    model = tiny_model(family)
    set_schedule(model, TokenSchedule((5, 3), 16), find_targets(model, BlockPruneConfig(block_shape=(8, 8))))
    sparse = sparse_model(model)
    sparse.save_pretrained(tmp_path / "pruned")
    processor.save_pretrained(tmp_path / "pruned")
    with caplog.at_level("WARNING"):
        values = export_checkpoint(tmp_path / "pruned", tmp_path / "out", form)
    assert values["merges_tokens"] is (form != "dense")
    assert ("cannot merge tokens" in caplog.text) is (form == "dense")
    for count in (1, 3, 7):
        expected = logits_of(sparse, pixels(count))
        if form == "onnx":
            session = onnxruntime.InferenceSession(str(tmp_path / "out"), providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(["logits"], {"pixel_values": pixels(count).numpy()})[0])
        elif form == "torch-export":
            with (tmp_path / "out").open("rb") as file:
                found = torch.export.load(file).module()(pixels(count)).detach()
        else:
            forget_schedule(sparse)
            expected = logits_of(sparse, pixels(count))
            found = logits_of(AutoModelForImageClassification.from_pretrained(tmp_path / "out"), pixels(count))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
