"""What a stranger's checkpoint may not do: name sizes, files or code, each tried by itself (tests/fuzzing.py mixes)."""

import json
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from hf_blockprune import BlockPruner, BlockSparseFormatError, ConfigError, ModelError
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.errors import CheckpointError
from hf_blockprune.hub.blockprune_headers import MAX_REPEATED_LAYERS, check_location
from hf_blockprune.hub.blockprune_layout import MAX_OVERHANGING_BLOCK, check_shapes, grid_shape
from tests.conftest import ROOT, tiny_model

WEIGHTS = "model.safetensors"
FC1 = "vit.encoder.layer.0.intermediate.dense"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of format 1 that a test may change."""
    return Path(shutil.copytree(ROOT / "tests/fixtures/format-1", tmp_path / "stranger"))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_settings(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**settings, **changes})


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load(folder, **kwargs):
    return AutoModelForImageClassification.from_pretrained(folder, **kwargs)


OPENERS = pytest.mark.parametrize("opened", [load, inspect_checkpoint], ids=["from_pretrained", "inspect"])


@OPENERS
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**6}, r"declares|matrix|shape|declared"),
        ({"intermediate_size": 10**9}, r"declares|shape|declared|kept blocks"),
        ({"image_size": 65536}, r"declares|shape"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"num_hidden_layers": MAX_REPEATED_LAYERS + 1}, "num_hidden_layers"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_declared_sizes_are_not_believed(folder, opened, changes, message):
    """No memory is spent on them."""
    edit_config(folder, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((BlockSparseFormatError, ModelError), match=message):
        opened(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_huge_number_of_labels_is_seen_before_a_list_of_them_is_made(folder):
    edit_config(folder, num_labels=10**9)
    with pytest.raises(ModelError, match="num_labels"):
        inspect_checkpoint(folder)


@OPENERS
def test_empty_layers_of_any_size_are_refused(folder, opened):
    """Zero blocks are zero bytes, however large a block or the matrix is said to be."""
    size = 10**6

    def empty(tensors):
        for name in json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]:
            tensors[f"{name}.weight"] = torch.empty(0, size, size)
            tensors[f"{name}.col_indices"] = torch.empty(0, dtype=torch.int32)
            tensors[f"{name}.crow_indices"] = torch.zeros(2, dtype=torch.int32)

    edit_tensors(folder, empty)
    layers = dict.fromkeys(json.loads((folder / "config.json").read_text())["quantization_config"]["layers"], 0)
    edit_settings(folder, layers=layers, block_shape=[size, size])
    with pytest.raises(BlockSparseFormatError, match="do not fit"):
        opened(folder)


def test_blocks_may_overhang_a_little():
    shapes = {"weight": (0, MAX_OVERHANGING_BLOCK, 8), "crow_indices": (2,), "col_indices": (0,)}
    sizes = {"nnz_blocks": 0, "out_features": 3, "in_features": 8}
    check_shapes("layer", shapes, block_shape=(MAX_OVERHANGING_BLOCK, 8), **sizes)
    with pytest.raises(BlockSparseFormatError, match="do not fit"):
        check_shapes("layer", shapes, block_shape=(MAX_OVERHANGING_BLOCK + 1, 8), **sizes)


def test_grids_of_large_sizes_are_exact():
    assert grid_shape(2**62 + 1, 10**400, (1, 10**399)) == (2**62 + 1, 10)


@OPENERS
@pytest.mark.parametrize("name", [f"{FC1}.weight", f"{FC1}.col_indices", "vit.layernorm.weight"])
def test_a_tensor_stored_under_two_names_is_refused(folder, opened, name):
    """Which of them transformers loads is left to chance."""
    alias = name.replace("encoder.layer", "layers").replace("intermediate.dense", "mlp.fc1")
    alias = alias if alias != name else name.removeprefix("vit.")
    edit_tensors(folder, lambda tensors: tensors.update({alias: tensors[name].clone()}))
    with pytest.raises(BlockSparseFormatError, match="both stored"):
        opened(folder)


@OPENERS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{FC1}.bias"), r"bias: missing"),
        (lambda tensors: tensors.update({f"{FC1}.bias": torch.zeros(31)}), r"bias: shape"),
        (lambda tensors: tensors.update({f"{FC1}.bias": torch.zeros(32, dtype=torch.int64)}), "must be floating"),
        (lambda tensors: tensors.update({f"{FC1}.weight": tensors[f"{FC1}.weight"].byte()}), "must be floating"),
        (lambda tensors: tensors.update({"vit.layernorm.weight": torch.ones(16).byte()}), "must be floating"),
        (lambda tensors: tensors.update({f"{FC1}.col_indices": tensors[f"{FC1}.col_indices"].byte()}), "int32"),
    ],
    ids=["no bias", "short bias", "whole bias", "weight in bytes", "dense weight in bytes", "indices in bytes"],
)
def test_tensors_of_another_kind_are_refused(folder, opened, change, message):
    edit_tensors(folder, change)
    with pytest.raises(BlockSparseFormatError, match=message):
        opened(folder)


def shard(folder, **moved):
    """Split the weights in two; `moved` gives the file that the index names instead of one of them."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = list(tensors)
    parts = {"first.safetensors": names[:20], "second.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: moved.get(file.partition(".")[0], file) for file, part in parts.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


@OPENERS
def test_shards_load(folder, opened):
    shard(folder)
    opened(folder)


@OPENERS
@pytest.mark.parametrize("where", ["../outside.safetensors", "absolute", "../stranger-2/outside.safetensors"])
def test_shards_outside_the_folder_are_refused(folder, opened, where):
    outside = folder.parent / "outside.safetensors"
    shard(folder, second=str(outside) if where == "absolute" else where)
    (folder.parent / "stranger-2").mkdir()
    shutil.copy(folder / "second.safetensors", outside)
    shutil.copy(folder / "second.safetensors", folder.parent / "stranger-2/outside.safetensors")
    with pytest.raises((BlockSparseFormatError, CheckpointError), match=r"outside|no file of this folder"):
        opened(folder)


@OPENERS
def test_a_tensor_in_two_shards_is_refused(folder, opened):
    tensors = shard(folder)
    name = next(iter(load_file(folder / "first.safetensors")))
    second = {**load_file(folder / "second.safetensors"), name: tensors[name]}
    save_file(second, folder / "second.safetensors", metadata={"format": "pt"})
    with pytest.raises(BlockSparseFormatError, match="only one may hold it"):
        opened(folder)


@OPENERS
def test_a_missing_shard_is_refused(folder, opened):
    shard(folder, second="third.safetensors")
    with pytest.raises((BlockSparseFormatError, CheckpointError), match=r"third\.safetensors"):
        opened(folder)


def test_files_of_a_repository_lie_in_its_own_part_of_the_cache(tmp_path):
    own = tmp_path / "models--someone--vit/snapshots/0123/model.safetensors"
    check_location([str(own)], "someone/vit")
    for other in (own.parent / "../../../models--else--vit/x.safetensors", tmp_path / "x.safetensors"):
        with pytest.raises(BlockSparseFormatError, match="outside"):
            check_location([str(own), str(other)], "someone/vit")


@OPENERS
@pytest.mark.parametrize("key", ["self", "bits", "dequantize", "modules_to_not_convert"])
def test_settings_of_other_names_are_unknown(folder, opened, key):
    edit_settings(folder, **{key: True})
    with pytest.raises(BlockSparseFormatError, match="unknown keys"):
        opened(folder)


@OPENERS
def test_more_layers_than_the_file_can_hold_are_not_looked_for(folder, opened):
    edit_settings(folder, layers={f"layer.{i}": 0 for i in range(200_000)})
    with pytest.raises(BlockSparseFormatError, match="200,000 named"):
        opened(folder)


def test_code_of_the_folder_does_not_run(folder, monkeypatch):
    """Nor is the user asked on the terminal, which would wait."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (folder / "evil.py").write_text("raise SystemExit('the code ran')\n")
    edit_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"})
    assert inspect_checkpoint(folder)["layers"]
    edit_config(folder, model_type="not-one-of-transformers")
    with pytest.raises(ModelError):
        inspect_checkpoint(folder)
    with pytest.raises(ModelError):
        BlockPruner.from_pretrained(folder)


def test_a_pickle_is_no_checkpoint(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(BlockSparseFormatError, match="not a whole safetensors file"):
        load(folder)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        inspect_checkpoint(folder)


def test_a_header_of_any_length_is_not_believed(folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + whole[8:])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        inspect_checkpoint(folder)


def test_json_nested_beyond_all_bounds_is_refused(folder):
    (folder / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        inspect_checkpoint(folder)


def test_weights_may_be_no_numbers(folder):
    """They are values like others."""
    edit_tensors(folder, lambda tensors: tensors[f"{FC1}.weight"].fill_(float("nan")))
    model = load(folder)
    assert model(torch.zeros(1, 3, 16, 16)).logits.isnan().all()


def test_a_new_classifier_may_be_missing(folder):
    if Version(transformers.__version__) < Version("5.21"):  # which ignores the option beside a quantizer
        with pytest.raises(RuntimeError, match="a newer transformers"):
            load(folder, num_labels=50, ignore_mismatched_sizes=True)
        return
    model = load(folder, num_labels=50, ignore_mismatched_sizes=True)
    assert model.classifier.out_features == 50


REPORT = {
    "base_model": "x",
    "config": {"block_shape": [8, 8]},
    "layers": [],
    "seconds": {},
    "permutation": {"residual_order": list(range(16))},
}


@pytest.fixture
def with_report(folder, processor):
    processor.save_pretrained(folder)

    def write(**changes):
        (folder / "blockprune_report.json").write_text(json.dumps({**REPORT, **changes}))
        return folder

    return write


def test_a_good_report_is_read(with_report):
    assert BlockPruner.from_pretrained(with_report()).config.block_shape == (8, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"config": None}, CheckpointError, "config must be"),
        ({"layers": {}}, CheckpointError, "layers must be"),
        ({"config": {"block_shape": [8, -8]}}, ConfigError, "block_shape"),
        ({"config": {"evil": 1}}, ConfigError, "unknown key"),
        ({"permutation": []}, CheckpointError, "permutation must be"),
        ({"permutation": {"residual_order": [0, 0, 1]}}, CheckpointError, "every feature once"),
        ({"permutation": {"residual_order": [-1, 0]}}, CheckpointError, "every feature once"),
        ({"permutation": {"residual_order": [0.0, 1.0]}}, CheckpointError, "every feature once"),
        ({"permutation": {"residual_order": "01"}}, CheckpointError, "every feature once"),
        ({"permutation": {"residual_order": [True, 0]}}, CheckpointError, "every feature once"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_report_of_other_values_is_refused(with_report, changes, error, message):
    with pytest.raises(error, match=message):
        BlockPruner.from_pretrained(with_report(**changes))


def test_an_order_of_another_model_is_refused(with_report):
    pruner = BlockPruner.from_pretrained(with_report())
    with pytest.raises(CheckpointError, match="orders 16 features"):
        pruner._in_same_order(tiny_model("vit"))
