"""Block-sparse models through transformers: saved, loaded, saved again, and refused where a file lies."""

import copy
import importlib
import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_blockprune import (
    BlockPruneConfig,
    BlockPruneQuantizationConfig,
    BlockPruner,
    BlockSparseFormatError,
    BlockSparseLinear,
    sparsify,
)
from hf_blockprune.hub import blockprune_backends, blockprune_ops, blockprune_quantizer
from hf_blockprune.hub.blockprune_config import FORMAT_VERSION
from hf_blockprune.hub.blockprune_layout import grid_shape
from hf_blockprune.hub.blockprune_names import find_linears, stored_layer_names
from tests.conftest import tiny_model

FC1 = "vit.encoder.layer.0.intermediate.dense"  # the first MLP layer of a ViT, as files name it
WEIGHTS = "model.safetensors"


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def entry_mask(mask, linear, block_shape):
    return torch.kron(mask, torch.ones(block_shape, dtype=torch.bool))[: linear.out_features, : linear.in_features]


def random_masks(model, block_shape):
    """Half the blocks of every Linear in the repeated layers; one layer loses all of its blocks."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            grid = -(-module.out_features // block_shape[0]), -(-module.in_features // block_shape[1])
            masks[name] = torch.rand(grid, generator=generator) < 0.5
    masks[next(name for name in masks if name.endswith("layers.1.mlp.fc2"))].fill_(False)
    return masks


def models(family="vit", block_shape=(16, 16)):
    """(block-sparse model, the same model dense with zeros in the removed blocks)."""
    dense = tiny_model(family)
    masks = random_masks(dense, block_shape)
    sparse = sparsify(copy.deepcopy(dense), masks, block_shape)
    for name, mask in masks.items():
        linear = dense.get_submodule(name)
        linear.weight.data[~entry_mask(mask, linear, block_shape)] = 0
    return sparse, dense


def count_sparse(model):
    return sum(isinstance(module, BlockSparseLinear) for module in model.modules())


def answers(model, pixels):
    with torch.no_grad():
        return model(pixels).logits


def load(folder, **kwargs):
    return AutoModelForImageClassification.from_pretrained(folder, **kwargs)


@pytest.fixture(scope="session")
def pruned_vit(tmp_path_factory, processor):
    """A checkpoint as `BlockPruner` writes it, and its model."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    config = BlockPruneConfig(method="magnitude", block_shape=(16, 16), budget={"metric": "density", "ratio": 0.5})
    pruner = BlockPruner(tiny_model("vit"), processor, config, name="tiny")
    model = pruner.prune()
    pruner.save_pretrained(folder)
    return folder, model


@pytest.fixture
def tampered(pruned_vit, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(pruned_vit[0], tmp_path / "tampered"))


GOOD_CONFIG = {"block_shape": [16, 16], "layers": {"a": 3, "b": 0}, "format_version": 1, "quant_method": "blockprune"}


def test_config_round_trip_through_json():
    config = BlockPruneQuantizationConfig(**GOOD_CONFIG)
    assert json.loads(json.dumps(config.to_dict())) == GOOD_CONFIG
    assert BlockPruneQuantizationConfig(**config.to_dict()).to_dict() == GOOD_CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 4}, r"unknown keys \['bits'\]"),
        ({"format_version": FORMAT_VERSION + 1}, "newer hf_blockprune"),
        ({"format_version": 0}, "format_version"),
        ({"format_version": "1"}, "format_version"),
        ({"format_version": True}, "format_version"),
        ({"quant_method": "gptq"}, "quant_method.*'gptq'"),
        ({"block_shape": [16]}, "block_shape"),
        ({"block_shape": [16, 16, 16]}, "block_shape"),
        ({"block_shape": [16, 0]}, "block_shape"),
        ({"block_shape": [16, -16]}, "block_shape"),
        ({"block_shape": [16, 16.0]}, "block_shape"),
        ({"block_shape": [16, True]}, "block_shape"),
        ({"block_shape": "16x16"}, "block_shape"),
        ({"block_shape": 16}, "block_shape"),
        ({"block_shape": None}, "block_shape"),
        ({"layers": None}, "layers"),
        ({"layers": ["a"]}, "layers"),
        ({"layers": {"a": -1}}, "layers"),
        ({"layers": {"a": 1.0}}, "layers"),
        ({"layers": {"a": "1"}}, "layers"),
        ({"layers": {"a": True}}, "layers"),
        ({"layers": {1: 1}}, "layers"),
        ({"cut": {"a": [8, 8]}}, r"unknown keys \['cut'\] in format 1"),
        ({"format_version": 2, "cut": {"c": [8, 8]}}, "cut"),
        ({"format_version": 2, "cut": {"a": [8, 0]}}, "cut"),
        ({"format_version": 2, "cut": {"a": [8]}}, "cut"),
        ({"format_version": 2, "cut": ["a"]}, "cut"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value),
)
def test_config_refuses(change, message):
    with pytest.raises(BlockSparseFormatError, match=message):
        BlockPruneQuantizationConfig(**{**GOOD_CONFIG, **change})


@pytest.mark.parametrize("key", ["block_shape", "layers"])
def test_config_needs(key):
    with pytest.raises(BlockSparseFormatError, match=key):
        BlockPruneQuantizationConfig(**{k: v for k, v in GOOD_CONFIG.items() if k != key})


def test_layer_names_lead_to_the_file_and_back(family):
    model = tiny_model(family)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    stored = list(stored_layer_names(model, names).values())
    assert len(set(stored)) == len(names)
    assert sorted(find_linears(model, stored).values()) == sorted(names)


def test_config_names_layers_as_the_file_does(family, tmp_path):
    sparse, _ = models(family)
    sparse.save_pretrained(tmp_path)
    keys = load_file(tmp_path / WEIGHTS).keys()
    layers = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    assert len(layers) == count_sparse(sparse) == 12
    assert {key.removesuffix(".crow_indices") for key in keys if key.endswith(".crow_indices")} == layers.keys()


@pytest.mark.parametrize("block_shape", [(16, 16), (32, 32), (64, 1)], ids=str)
def test_a_sparse_model_answers_like_the_masked_dense_one(family, block_shape, pixels):
    sparse, dense = models(family, block_shape)
    torch.testing.assert_close(answers(sparse, pixels), answers(dense, pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_shape", [(16, 16), (32, 32)], ids=str)
def test_a_loaded_model_answers_like_the_masked_dense_one(family, block_shape, pixels, tmp_path):
    sparse, dense = models(family, block_shape)
    sparse.save_pretrained(tmp_path)
    loaded, info = load(tmp_path, output_loading_info=True)
    assert type(loaded) is type(dense)
    assert count_sparse(loaded) == 12
    assert not any(info.values()), info
    assert not loaded.training
    torch.testing.assert_close(answers(loaded, pixels), answers(dense, pixels), rtol=1e-5, atol=1e-5)


def test_a_pruned_model_loads_as_it_was(pruned_vit, pixels):
    folder, model = pruned_vit
    assert torch.equal(answers(load(folder), pixels), answers(model, pixels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loads_in_half_precision(pruned_vit, pixels, dtype):
    folder, model = pruned_vit
    loaded = load(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    indices = [buffer for name, buffer in loaded.named_buffers() if name.endswith("_indices")]
    assert len(indices) == 24
    assert {buffer.dtype for buffer in indices} == {torch.int32}
    expected = answers(model, pixels)
    error = torch.linalg.vector_norm(answers(loaded, pixels.to(dtype)).float() - expected)
    assert error < 3e-2 * torch.linalg.vector_norm(expected)


def test_the_base_model_loads_from_a_classifier(pruned_vit, pixels):
    folder, model = pruned_vit
    base = AutoModel.from_pretrained(folder)
    assert count_sparse(base) == 12
    with torch.no_grad():
        expected = model.vit(pixels).last_hidden_state
        torch.testing.assert_close(base(pixels).last_hidden_state, expected)


def test_saving_a_loaded_model_again_gives_the_same_bytes(family, tmp_path):
    models(family)[0].save_pretrained(tmp_path / "first")
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert first["quantization_config"] == second["quantization_config"]


def test_a_sharded_checkpoint_loads(pixels, tmp_path):
    sparse, dense = models()
    sparse.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(answers(load(tmp_path), pixels), answers(dense, pixels), rtol=1e-5, atol=1e-5)


def test_dequantize_gives_the_masked_dense_model(pixels, tmp_path):
    sparse, dense = models()
    sparse.save_pretrained(tmp_path / "sparse")
    restored = load(tmp_path / "sparse").dequantize()
    assert count_sparse(restored) == 0
    assert torch.equal(answers(restored, pixels), answers(dense, pixels))
    for name, value in dense.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)
    restored.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(answers(load(tmp_path / "dense"), pixels), answers(dense, pixels))


def test_dequantize_after_saving_gives_the_same(pixels, tmp_path):
    sparse, dense = models()
    sparse.save_pretrained(tmp_path / "sparse")
    assert torch.equal(answers(sparse.dequantize(), pixels), answers(dense, pixels))


def test_a_trained_model_saves_what_it_learnt(pruned_vit, pixels, tmp_path):
    model = load(pruned_vit[0])
    before = answers(model, pixels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(pixels, labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    after = answers(model, pixels)
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(answers(load(tmp_path), pixels), after)


def test_a_changed_model_is_saved_as_it_is(pruned_vit, tmp_path, pixels):
    model = load(pruned_vit[0])
    layer = model.vit.layers[0].mlp
    layer.fc1 = layer.fc1.to_dense()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.vit.layers[0].mlp.fc1) is torch.nn.Linear
    assert torch.equal(answers(loaded, pixels), answers(model, pixels))


def test_a_base_model_is_saved_and_loads_again(pruned_vit, tmp_path, pixels):
    base = AutoModel.from_pretrained(pruned_vit[0])
    base.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path)(pixels).last_hidden_state
        torch.testing.assert_close(again, base(pixels).last_hidden_state)


def test_layers_of_different_block_shapes_are_not_saved(pruned_vit, tmp_path):
    model = load(pruned_vit[0])
    mlp = model.vit.layers[0].mlp
    grid = grid_shape(mlp.fc1.out_features, mlp.fc1.in_features, (8, 8))
    mlp.fc1 = BlockSparseLinear.from_dense(mlp.fc1.to_dense(), torch.ones(grid, dtype=torch.bool), (8, 8))
    with pytest.raises(BlockSparseFormatError, match="block_shape"):
        model.save_pretrained(tmp_path)


def test_pipeline(pruned_vit, images):
    folder, model = pruned_vit
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    image = Image.open(images / "picture_000.png")
    answer = classify(image, top_k=7)
    with torch.no_grad():
        scores = model(**classify.image_processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    expected = {model.config.id2label[i]: score for i, score in enumerate(scores.tolist())}
    assert {entry["label"]: entry["score"] for entry in answer} == pytest.approx(expected, abs=1e-5)
    assert answer[0]["label"] == max(expected, key=expected.get)


def edit_config(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values["quantization_config"])
    path.write_text(json.dumps(values))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def add_blocks(count):
    return lambda config: config["layers"].update({FC1: config["layers"][FC1] + count})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_blocks(1), rf"{FC1}\.weight: shape"),
        (add_blocks(-1), rf"{FC1}\.weight: shape"),
        (add_blocks(1000), rf"{FC1}: \d+ kept blocks declared"),
        (lambda config: config.update(block_shape=[8, 32]), r"\.weight: shape"),
        (lambda config: config.update(format_version=FORMAT_VERSION + 1), "newer hf_blockprune"),
        (lambda config: config.update(bits=4), "unknown keys"),
        (lambda config: config["layers"].update({"vit.encoder.layer.9.intermediate.dense": 1}), "no such Linear"),
        (lambda config: config["layers"].update({"vit.layernorm": 1}), "vit.layernorm: .*no such Linear"),
        (lambda config: config["layers"].update({"__class__": 1}), "no such Linear"),
        (lambda config: config["layers"].update({"": 1}), "no such Linear"),
        (lambda config: config["layers"].update({"vit.layers.0.mlp.fc1": config["layers"][FC1]}), "a second entry"),
        (lambda config: config["layers"].update({"classifier": 1}), r"classifier\.weight: shape"),
        (lambda config: config.update(format_version=2, cut={FC1: [32, 48]}), rf"{FC1} of 32x48 has no layer"),
        (lambda config: config.update(format_version=2, cut={FC1: [960, 48]}), rf"{FC1} of 960x48 is larger"),
    ],
    ids=[
        "one block more",
        "one block less",
        "more blocks than there are",
        "other block shape",
        "newer format",
        "unknown key",
        "layer that is not there",
        "layer that is no Linear",
        "layer named like an attribute",
        "layer without a name",
        "layer named twice",
        "layer that is stored dense",
        "cut to another size",
        "cut larger than the architecture",
    ],
)
def test_a_config_that_disagrees_with_the_tensors_is_refused(tampered, change, message):
    edit_config(tampered, change)
    with pytest.raises(BlockSparseFormatError, match=message):
        load(tampered)


def test_a_layer_that_the_config_forgets_is_refused(tampered):
    edit_config(tampered, lambda config: config["layers"].pop(FC1))
    with pytest.raises(RuntimeError, match="mismatch"):
        load(tampered)


@pytest.mark.parametrize("name", ["weight", "crow_indices", "col_indices"])
def test_a_missing_tensor_is_refused(tampered, name):
    edit_tensors(tampered, lambda tensors: tensors.pop(f"{FC1}.{name}"))
    with pytest.raises(BlockSparseFormatError, match=rf"{FC1}\.{name}: missing"):
        load(tampered)


def set_entry(name, index, value):
    def change(tensors):
        tensors[f"{FC1}.{name}"][index] = value

    return change


def swap_columns(tensors):
    crow, col = tensors[f"{FC1}.crow_indices"], tensors[f"{FC1}.col_indices"]
    start = next(int(a) for a, b in pairwise(crow) if b - a > 1)
    col[start : start + 2] = col[start : start + 2].flip(0)


def repeat_column(tensors):
    crow, col = tensors[f"{FC1}.crow_indices"], tensors[f"{FC1}.col_indices"]
    start = next(int(a) for a, b in pairwise(crow) if b - a > 1)
    col[start + 1] = col[start]


def retype(name, dtype):
    def change(tensors):
        tensors[f"{FC1}.{name}"] = tensors[f"{FC1}.{name}"].to(dtype)

    return change


def lengthen(tensors):
    crow = tensors[f"{FC1}.crow_indices"]
    tensors[f"{FC1}.crow_indices"] = torch.cat([crow, crow[-1:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_entry("col_indices", 0, 3), r"col_indices: .*\[0, 3\)"),
        (set_entry("col_indices", 0, 2**31 - 1), r"col_indices: .*\[0, 3\)"),
        (set_entry("col_indices", -1, -1), r"col_indices: .*\[0, 3\)"),
        (swap_columns, "col_indices: .*increase"),
        (repeat_column, "col_indices: .*increase"),
        (set_entry("crow_indices", 0, 1), "crow_indices: .*start at 0"),
        (set_entry("crow_indices", -1, 0), "crow_indices: .*end at"),
        (set_entry("crow_indices", 2, 1000), "crow_indices: .*decrease"),
        (set_entry("crow_indices", 2, -5), "crow_indices: .*decrease"),
        (lengthen, r"crow_indices: shape"),
        (retype("crow_indices", torch.int64), "crow_indices: .*int32"),
        (retype("col_indices", torch.float32), "col_indices: .*int32"),
    ],
    ids=[
        "col past the last",
        "col huge",
        "col negative",
        "cols swapped",
        "col twice",
        "crow starts late",
        "crow ends early",
        "crow overshoots",
        "crow negative",
        "crow too long",
        "crow int64",
        "col float",
    ],
)
def test_tampered_indices_are_refused(tampered, change, message):
    edit_tensors(tampered, change)
    with pytest.raises(BlockSparseFormatError, match=message):
        load(tampered)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999], ids=["empty", "within the header", "half", "tail missing"])
def test_a_truncated_file_is_refused(tampered, kept):
    whole = (tampered / WEIGHTS).read_bytes()
    (tampered / WEIGHTS).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(BlockSparseFormatError, match=rf"{WEIGHTS}: not a whole safetensors file"):
        load(tampered)


@pytest.fixture
def second_copy(tmp_path, monkeypatch):
    """The hub files under another package name, as a checkpoint's own code is imported.

    What the copy registers goes with the test: errors of its backends are of its own classes.
    """
    registries = blockprune_backends._BACKENDS, blockprune_backends._UNPACKERS
    before = [dict(registry) for registry in registries]
    package = tmp_path / "blockprune_second_copy"
    shutil.copytree(Path(blockprune_quantizer.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(f"{package.name}.modeling_blockprune")
    yield package.name
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_a_second_copy_leaves_the_first_registered(second_copy, pruned_vit, pixels):
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["blockprune"] is BlockPruneQuantizationConfig
    assert AUTO_QUANTIZER_MAPPING["blockprune"] is blockprune_quantizer.BlockPruneHfQuantizer
    folder, model = pruned_vit
    assert torch.equal(answers(load(folder), pixels), answers(model, pixels))


def test_the_op_works_from_both_copies(second_copy):
    other = importlib.import_module(f"{second_copy}.blockprune_ops")
    assert other is not blockprune_ops
    layer = BlockSparseLinear.from_dense(nn.Linear(6, 4), torch.tensor([[True, False], [True, True]]), (2, 3))
    x = torch.randn(5, 6)
    arguments = (x, layer.weight, layer.crow_indices, layer.col_indices, layer.bias)
    expected = layer.to_dense()(x)
    for module in (blockprune_ops, other):
        torch.testing.assert_close(module.block_sparse_linear(*arguments, out_features=4), expected)


def test_copies_share_one_registry_of_backends(second_copy):
    other = importlib.import_module(f"{second_copy}.blockprune_backends")
    assert other.available_backends() == blockprune_backends.available_backends()
    assert other._BACKENDS is blockprune_backends._BACKENDS


def test_layers_of_another_copy_are_saved_too(second_copy, pixels, tmp_path):
    other = importlib.import_module(f"{second_copy}.blockprune_quantizer")
    dense = tiny_model()
    sparse = other.sparsify(dense, random_masks(dense, (16, 16)), (16, 16))
    assert count_sparse(sparse) == 0  # none is of the first copy's class
    sparse.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert count_sparse(loaded) == 12
    assert torch.equal(answers(loaded, pixels), answers(sparse, pixels))
