"""Models with weights in int8: rounding, storing, loading, and what is refused."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification

from hf_blockprune import BlockPruneConfig, BlockPruner, BlockSparseFormatError, BlockSparseLinear, ModelError
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.hub import blockprune_int8
from hf_blockprune.hub.blockprune_int8 import (
    dequantize_weight,
    int8_linears,
    quantize_tokens,
    quantize_weight,
    reference_int8,
    whole_sums,
)
from hf_blockprune.hub.blockprune_int8_linear import Int8BlockSparseLinear
from hf_blockprune.hub.blockprune_layers import block_sparse_layers
from hf_blockprune.hub.blockprune_layout import BackendError, pack, unpack
from hf_blockprune.hub.blockprune_reference import Int8Arguments
from hf_blockprune.hub.blockprune_rounding import quantize, unquantize
from tests.conftest import tiny_model
from tests.hub.saved_models import PIXELS, answer, sparse_model

SHAPE = (40, 24)
GELU_ERROR = 1e-4  # that kernels may make where 8 bits are left of it next


def layer_of(density=0.5, bias=True, seed=0, block_shape=(8, 8)):
    torch.manual_seed(seed)
    dense = nn.Linear(SHAPE[1], SHAPE[0], bias=bias)
    mask = torch.rand(-(-SHAPE[0] // block_shape[0]), -(-SHAPE[1] // block_shape[1])) < density
    return BlockSparseLinear.from_dense(dense, mask, block_shape)


@pytest.fixture
def rounded():
    return quantize(sparse_model(tiny_model()).eval())


@pytest.fixture
def folder(rounded, tmp_path):
    rounded.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("block_shape", [(8, 8), (7, 5), (64, 1), (1, 64)], ids=str)
def test_weights_are_the_nearest_of_their_output_s_steps(block_shape):
    layer = layer_of(block_shape=block_shape)
    packed = layer.packed()
    weight, scale = quantize_weight(packed, SHAPE[0])
    dense, whole = unpack(packed, *SHAPE).double(), unpack(packed._replace(weight=weight), *SHAPE).double()
    largest = dense.abs().amax(1)
    torch.testing.assert_close(scale.double(), (largest / 127).clamp(min=1e-30), rtol=1e-6, atol=0)
    assert ((whole * scale[:, None] - dense).abs() <= 0.5001 * scale[:, None]).all()
    assert torch.equal(whole.abs().amax(1), torch.where(largest > 0, 127.0, 0.0).double())
    back = unpack(packed._replace(weight=dequantize_weight(packed._replace(weight=weight), scale)), *SHAPE)
    assert torch.equal(back.double(), (whole.float() * scale[:, None]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_tokens_are_the_nearest_of_their_own_steps(dtype):
    x = (torch.randn(50, 30) * 10.0 ** torch.randint(-3, 3, (50, 1))).to(dtype)
    numbers, scale = quantize_tokens(x)
    assert torch.equal(numbers.abs().amax(1), torch.full((50,), 127, dtype=torch.int8))
    assert ((numbers * scale[:, None] - x.float()).abs() <= 0.5001 * scale[:, None]).all()


def test_sums_are_exact_whatever_their_size():
    x = torch.randint(-127, 128, (6, 5000), dtype=torch.int8)
    weight = torch.randint(-128, 128, (9, 5000), dtype=torch.int8)
    x[0], weight[0] = 127, -128
    assert torch.equal(whole_sums(x, weight).long(), x.long() @ weight.long().t())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    model = sparse_model(tiny_model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name, layer = list(block_sparse_layers(model))[-1]
    layer.weight.data.view(-1)[0] = value
    with pytest.raises(BlockSparseFormatError, match=rf"{name}.*not finite"):
        quantize(model)
    assert before.keys() == model.state_dict().keys()
    assert not any(isinstance(module, Int8BlockSparseLinear) for module in model.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_layer_is_near_the_one_that_it_was_made_of(dtype, bias):
    layer = layer_of(bias=bias).to(dtype)
    small, x = Int8BlockSparseLinear.from_float(layer), torch.randn(3, 7, SHAPE[1]).to(dtype)
    with torch.no_grad():
        y, expected = small(x), layer.double()(x.double())
    assert (y.dtype, y.shape, small.dtype) == (dtype, expected.shape, dtype)
    assert (y.double() - expected).norm() / expected.norm() < 0.015


def test_a_quarter_of_the_weights_bytes_and_the_rest_as_it_was(rounded, folder, tmp_path):
    unrounded = sparse_model(tiny_model())
    unrounded.save_pretrained(tmp_path / "floats")
    small, large = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "floats"))
    names = {
        f"{key}.weight" for key in json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    }
    for name, tensor in large.items():
        assert small[name].dtype == (torch.int8 if name in names else tensor.dtype)
        assert name in names or torch.equal(small[name], tensor)
    assert small.keys() - large.keys() == {name.replace(".weight", ".weight_scale") for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"], ids=str)
def test_scales_stay_as_exact_as_they_were_in_every_dtype(rounded, folder, dtype):
    loaded = AutoModelForImageClassification.from_pretrained(folder, dtype=dtype)
    for (_, have), (_, want) in zip(block_sparse_layers(loaded), block_sparse_layers(rounded), strict=True):
        assert torch.equal(have.weight, want.weight)
        assert torch.equal(have.weight_scale, want.weight_scale)
        assert have.bias.dtype == loaded.dtype
    again = copy.deepcopy(rounded).half().bfloat16().float()
    assert all(
        torch.equal(have.weight_scale, want.weight_scale)
        for (_, have), (_, want) in zip(block_sparse_layers(again), block_sparse_layers(rounded), strict=True)
    )


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: quantize(model),  # which is in int8 already
    ],
    ids=["deepcopy", "pickle", "again"],
)
def test_copies_answer_the_same(rounded, copied):
    expected = answer(rounded)
    assert torch.equal(answer(copied(rounded)), expected)


def test_shards_load_as_one_file_does(rounded, tmp_path):
    rounded.save_pretrained(tmp_path, max_shard_size="4kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(answer(loaded), answer(rounded))
    assert inspect_checkpoint(tmp_path)["dtype"] == "int8"


def test_a_state_goes_into_layers_of_its_kind_alone(rounded):
    floats = sparse_model(tiny_model(seed=1))
    other = quantize(sparse_model(tiny_model(seed=1)))
    other.load_state_dict(rounded.state_dict())
    assert torch.equal(answer(other), answer(rounded))
    with pytest.raises(BlockSparseFormatError, match=r"float32 does not go into a layer in torch\.int8"):
        other.load_state_dict(floats.state_dict(), strict=False)
    with pytest.raises(BlockSparseFormatError, match=r"int8 does not go into a layer in torch\.float32"):
        floats.load_state_dict(rounded.state_dict(), strict=False)


def test_dequantize_gives_linears_of_what_the_numbers_stand_for(rounded):
    layers = {
        name: unpack(layer.packed_floats(), layer.out_features, layer.in_features)
        for name, layer in block_sparse_layers(rounded)
    }
    expected = answer(rounded)
    dense = rounded.dequantize()
    assert all(torch.equal(dense.get_submodule(name).weight, weight) for name, weight in layers.items())
    assert (answer(dense) - expected).abs().max() < 0.02 * expected.abs().max()


def test_floats_come_back_block_sparse(rounded):
    weights = {name: layer.packed_floats().weight for name, layer in block_sparse_layers(rounded)}
    floats = unquantize(copy.deepcopy(rounded))
    assert all(torch.equal(layer.packed().weight, weights[name]) for name, layer in block_sparse_layers(floats))
    once_more = quantize(floats)
    for (_, have), (_, want) in zip(block_sparse_layers(once_more), block_sparse_layers(rounded), strict=True):
        assert torch.equal(have.weight, want.weight)


def test_the_op_is_one_that_torch_knows():
    small, x = Int8BlockSparseLinear.from_float(layer_of()), torch.randn(5, SHAPE[1])
    arguments = (x, *small.requires_grad_(False).arguments("gelu"))
    torch.library.opcheck(torch.ops.blockprune.block_sparse_linear_int8, arguments)
    expected = reference_int8(x, small.arguments("gelu"))
    torch.testing.assert_close(
        torch.ops.blockprune.block_sparse_linear_int8(*arguments), expected, rtol=1e-5, atol=GELU_ERROR
    )


@pytest.mark.slow
def test_compiled_and_exported_models_answer_alike(rounded):
    torch._dynamo.reset()
    expected, compiled = answer(rounded), torch.compile(rounded, fullgraph=True)
    with torch.no_grad():
        without = compiled(PIXELS).logits
        exported = torch.export.export(rounded, (PIXELS,)).module()(PIXELS).logits
    # By parts they differ where a number lies between two steps.
    tolerance = 0.03 * float(expected.abs().max())
    torch.testing.assert_close(compiled(PIXELS).logits.detach(), without, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exported, without, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(without, expected, rtol=0, atol=tolerance)


def test_autocast_rounds_to_its_own_dtype():
    small, x = Int8BlockSparseLinear.from_float(layer_of()), torch.randn(5, SHAPE[1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = small(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, small(x.bfloat16()).detach(), rtol=1e-2, atol=1e-2)


def test_answers_without_no_grad_and_gradients_never(rounded):
    logits = rounded(PIXELS[:1]).logits
    with pytest.raises(BackendError, match=r"no gradients.*dequantize\(\)"):
        logits.sum().backward()
    small = Int8BlockSparseLinear.from_float(layer_of())
    with pytest.raises(BackendError, match="no gradients"):
        torch.func.grad(lambda x: small(x).sum())(torch.randn(2, SHAPE[1]))
    assert not rounded.hf_quantizer.is_trainable


def test_a_classifier_above_int8_layers_learns(rounded):
    rounded.requires_grad_(False)
    rounded.classifier.requires_grad_(True)
    rounded(PIXELS[:1]).logits.sum().backward()
    assert rounded.classifier.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("call", [lambda layer: layer.unpack_weight(), lambda layer: layer.cut()])
def test_what_a_layer_in_int8_cannot_do_says_so(call):
    with pytest.raises(BlockSparseFormatError, match="int8"):
        call(Int8BlockSparseLinear.from_float(layer_of()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_scale": torch.ones(3)}, r"weight_scale: expected float32 \[40\]"),
        ({"weight_scale": torch.ones(40).double()}, "weight_scale: expected float32"),
        ({"weight": torch.zeros(2, 8, 8)}, "weight: expected int8"),
        ({"bias": torch.zeros(7)}, "bias: expected"),
        ({"residual": torch.zeros(1)}, "residual: expected"),
        ({"activation": "relu"}, "unknown activation"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_tensors_that_are_no_layer_are_refused(change, words):
    arguments = Int8BlockSparseLinear.from_float(layer_of()).arguments()._replace(**change)
    with pytest.raises(ValueError, match=words):
        int8_linears(torch.randn(3, SHAPE[1]), [arguments])


def test_tensors_elsewhere_are_refused():
    arguments = Int8BlockSparseLinear.from_float(layer_of()).arguments()
    for name in ("weight", "weight_scale", "crow_indices", "bias"):
        elsewhere = arguments._replace(**{name: getattr(arguments, name).to("meta")})
        with torch.no_grad(), pytest.raises(ValueError, match="expected on cpu"):
            int8_linears(torch.randn(3, SHAPE[1]), [elsewhere])


def test_inputs_of_more_features_than_sums_can_hold_are_refused(monkeypatch):
    monkeypatch.setattr(blockprune_int8, "MAX_IN_FEATURES", SHAPE[1] - 1)
    small = Int8BlockSparseLinear.from_float(layer_of())
    with pytest.raises(BlockSparseFormatError, match="in_features"):
        small(torch.randn(2, SHAPE[1]))


def test_residuals_are_added_after_the_activation():
    x, residual = torch.randn(2, 3, SHAPE[1]), torch.randn(2, 3, SHAPE[0])
    arguments = Int8BlockSparseLinear.from_float(layer_of()).arguments("gelu")
    (plain,), (y,) = int8_linears(x, [arguments]), int8_linears(x, [arguments._replace(residual=residual)])
    torch.testing.assert_close(y, plain + residual)


@pytest.mark.parametrize("name", ["reference", "dense"])
def test_the_backend_that_is_named_runs(monkeypatch, name):
    small, x = Int8BlockSparseLinear.from_float(layer_of()), torch.randn(3, SHAPE[1])
    with torch.no_grad():
        expected = reference_int8(x, small.arguments())
        monkeypatch.setenv("BLOCKPRUNE_BACKEND", name)
        assert torch.equal(small(x), expected)
        monkeypatch.setenv("BLOCKPRUNE_BACKEND", "abacus")
        with pytest.raises(BackendError, match="'abacus' cannot run int8"):
            small(x)


FORGERIES = {
    "no scale": (lambda tensors, key: tensors.pop(f"{key}.weight_scale"), r"weight_scale: missing"),
    "short scale": (lambda tensors, key: _put(tensors, f"{key}.weight_scale", torch.ones(3)), "weight_scale: must be"),
    "half scale": (lambda tensors, key: _put(tensors, f"{key}.weight_scale", torch.ones(16).half()), "must be float32"),
    "float weight": (
        lambda tensors, key: _put(tensors, f"{key}.weight", tensors[f"{key}.weight"].float()),
        "must be int8",
    ),
}


def _put(tensors, name, value):
    tensors[name] = value


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("opened", [AutoModelForImageClassification.from_pretrained, inspect_checkpoint])
def test_forged_files_are_refused(folder, opened, name):
    change, words = FORGERIES[name]
    tensors = load_file(folder / "model.safetensors")
    change(tensors, next(iter(json.loads((folder / "config.json").read_text())["quantization_config"]["layers"])))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BlockSparseFormatError, match=words):
        opened(folder)


@pytest.mark.parametrize(
    ("value", "version", "words"),
    [
        ("int4", 6, "dtype: 'int8', or left out"),
        ("int8", 5, r"unknown keys \['dtype'\]"),
        (None, 6, "must be floating, got I8"),
    ],
)
def test_configs_that_do_not_fit_are_refused(folder, value, version, words):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"dtype": value, "format_version": version}
    path.write_text(json.dumps(config))
    with pytest.raises(BlockSparseFormatError, match=words):
        AutoModelForImageClassification.from_pretrained(folder)


def test_some_layers_in_int8_and_some_not_cannot_be_saved(tmp_path):
    model = sparse_model(tiny_model())
    name, layer = next(iter(block_sparse_layers(model)))
    model.set_submodule(name, Int8BlockSparseLinear.from_float(layer))
    with pytest.raises(BlockSparseFormatError, match="all layers in int8 or none"):
        model.save_pretrained(tmp_path)


def test_a_dense_model_cannot_be_quantized(processor):
    with pytest.raises(BlockSparseFormatError, match="no block-sparse layers"):
        quantize(tiny_model())
    with pytest.raises(ModelError, match=r"call prune\(\) first"):
        BlockPruner(tiny_model(), processor).quantize()


def test_a_pruner_quantizes_saves_and_trains_no_more(processor, images, tmp_path):
    config = BlockPruneConfig(block_shape=(8, 8), method="magnitude", refit=False)
    pruner = BlockPruner(tiny_model(), processor, config)
    pruner.prune()
    pruner.evaluate(images)
    assert pruner.quantize() is pruner.model
    assert pruner.report()["dtype"] == "int8"
    assert pruner.report()["evaluation"] is None  # it was of other weights
    pruner.save_pretrained(tmp_path / "saved")
    assert "int8" in (tmp_path / "saved/README.md").read_text()
    again = BlockPruner.from_pretrained(tmp_path / "saved")
    assert torch.equal(answer(again.model), answer(pruner.model))
    assert again.report()["dtype"] == "int8"
    for train in (again.recover, again.finetune):
        with pytest.raises(ModelError, match="no gradients"):
            train(images)


def test_arguments_are_those_of_floats_and_a_scale():
    assert Int8Arguments._fields[:7] == tuple(layer_of().arguments()._fields)
    packed = pack(torch.zeros(4, 4, dtype=torch.int8), torch.ones(1, 1, dtype=torch.bool), (4, 4))
    assert packed.weight.dtype == torch.int8
