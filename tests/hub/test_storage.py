"""A block-sparse layer answers, learns, loads and saves the same, whether it holds its blocks or the whole matrix."""

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification, Dinov2Config, SwinConfig, ViTConfig

from hf_blockprune import BlockSparseFormatError, BlockSparseLinear
from hf_blockprune._cpu.backend import CpuBackend, multiplication_cost
from hf_blockprune._cpu.library import find_library
from hf_blockprune.errors import BackendError
from hf_blockprune.hub.blockprune_backends import LayerArguments, beats_dense
from hf_blockprune.hub.blockprune_layout import expand_mask, pack, unpack
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers, choose_storage, pack_weights
from hf_blockprune.hub.blockprune_storage import is_best_packed, least_tokens, unpack_in_pieces
from hf_blockprune.hub.blockprune_triton_backend import _beats_dense
from hf_blockprune.runs.resume import weights_fingerprint
from tests.conftest import ALL_FAMILIES, tiny_model
from tests.hub.saved_models import PIXELS, answer, assert_same, run, sparse_model
from tests.hub.test_ops import assert_matches

OUT, IN = 52, 40
SHAPES = [(16, 16), (8, 8), (12, 20), (1, 1), (64, 48)]
FORMS = ["packed", "unpacked"]


def linear_and_mask(block_shape=(16, 16), dtype=torch.float32, density=0.5, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(IN, OUT, bias=bias).to(dtype)
    for parameter in linear.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    grid = math.ceil(OUT / block_shape[0]), math.ceil(IN / block_shape[1])
    return linear, torch.rand(grid, generator=generator) < density


def layer_of(form, *arguments, block_shape=(16, 16), **kwargs):
    layer = BlockSparseLinear.from_dense(*linear_and_mask(block_shape, *arguments, **kwargs), block_shape)
    if form == "unpacked":
        layer.unpack_weight()
    return layer


def inputs(dtype=torch.float32, count=13):
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def whole(layer):
    """The matrix in double precision, from what the layer holds."""
    entries = layer.entry_mask()
    weight = layer.weight.detach().double()
    return weight * entries if layer.is_unpacked else unpack(layer.packed()._replace(weight=weight), OUT, IN)


def strays(layer):
    return layer.weight.detach()[~layer.entry_mask()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@torch.no_grad()
def test_answers(block_shape, dtype, activation):
    layer, x = layer_of("unpacked", dtype, block_shape=block_shape), inputs(dtype)
    layer.activation = activation
    expected = x.double() @ whole(layer).T + layer.bias.double()
    if activation != "none":
        expected = nn.functional.gelu(expected, approximate="tanh" if activation == "gelu_tanh" else "none")
    assert_matches(layer(x), expected, dtype)
    assert_matches(layer.product(x, activation), expected, dtype)


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    block_shape=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    density=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=60)
def test_storage_changes_back_and_forth(shape, block_shape, density, seed):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(shape[1], shape[0])
    grid = math.ceil(shape[0] / block_shape[0]), math.ceil(shape[1] / block_shape[1])
    layer = BlockSparseLinear.from_dense(linear, torch.rand(grid, generator=generator) < density, block_shape)
    parameter, before, mask = layer.weight, layer.weight.detach().clone(), layer.mask()
    layer.weight.grad = torch.randn(before.shape, generator=generator)
    gradient = unpack(layer.packed()._replace(weight=layer.weight.grad), *shape)
    layer.unpack_weight()
    layer.unpack_weight()
    assert layer.weight is parameter
    assert torch.equal(layer.weight, linear.weight * expand_mask(mask, shape, block_shape))
    assert torch.equal(layer.weight.grad, gradient)
    assert (layer.nnz_blocks, torch.equal(layer.mask(), mask)) == (len(before), True)
    layer.pack_weight()
    layer.pack_weight()
    assert layer.weight is parameter
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(("grid", "block_shape"), [((40, 50), (16, 8)), ((13, 7), (40, 100)), ((2, 3), (300, 70))])
def test_matrices_that_are_larger_than_a_piece_are_unpacked_right(grid, block_shape):
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(0)) < 0.5
    size = grid[0] * block_shape[0] - 5, grid[1] * block_shape[1] - 3
    packed = pack(torch.randn(size), mask, block_shape)
    assert torch.equal(unpack_in_pieces(packed, *size), unpack(packed, *size))


CHANGES = {
    "scaled": lambda layer: layer.weight.data.mul_(1.5),
    "one": lambda layer: layer.weight.data.view(-1)[layer.weight.data.view(-1).nonzero()[-1]].fill_(50),
    "numpy": lambda layer: layer.weight.detach().numpy().__imul__(-1),
    "other storage": lambda layer: setattr(layer.weight, "data", layer.weight.data * -2),
    "bias": lambda layer: layer.bias.data.add_(3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@torch.no_grad()
def test_the_next_call_sees_each_change(change):
    layer, x = layer_of("unpacked"), inputs()
    layer(x)
    change(layer)
    assert_matches(layer(x), x.double() @ whole(layer).T + layer.bias.double(), torch.float32)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_the_same_form(copied):
    layer, x = layer_of("unpacked"), inputs()
    twin = copied(layer)
    assert twin.is_unpacked
    with torch.no_grad():
        layer.weight.zero_()
    assert twin(x).std() > 0.5


@pytest.mark.parametrize("order", [1, 2])
def test_gradients_are_those_of_the_blocks(order):
    found = {}
    for form in FORMS:
        layer, x = layer_of(form, torch.float64), inputs(torch.float64).requires_grad_()
        grads = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight, layer.bias], create_graph=order == 2)
        if order == 2:
            grads = torch.autograd.grad(sum(g.square().sum() for g in grads), [x, layer.weight, layer.bias])
        found[form] = [grads[0], layer.packed_like(grads[1]) if form == "unpacked" else grads[1], grads[2]]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_transforms_see_the_blocks_alone():
    layer, x = layer_of("unpacked", torch.float64), inputs(torch.float64)
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)["weight"]
    entries = layer.entry_mask()
    assert not each[:, ~entries].any()
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(each.sum(0), layer.weight.grad)
    tangent = {"weight": torch.ones(OUT, IN, dtype=torch.float64), "bias": torch.zeros(OUT, dtype=torch.float64)}
    _, along = torch.func.jvp(lambda w: loss(w, x), (weights,), (tangent,))
    torch.testing.assert_close(along, layer.weight.grad.sum())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
@pytest.mark.parametrize("switch", [False, True], ids=["one form", "switched on the way"])
def test_both_forms_learn_the_same(optimizer, switch):
    trained, x = [], inputs(torch.float64)
    for form in FORMS:
        layer = layer_of(form, torch.float64)
        step = optimizer(layer.parameters())
        for i in range(6):
            if switch and i == 3 and form == "unpacked":
                layer.pack_weight()
                layer.unpack_weight()
            step.zero_grad()
            (layer(x).square().mean() + nn.functional.gelu(layer(x)).mean()).backward()
            step.step()
        trained.append(layer)
    assert not strays(trained[1]).any()
    torch.testing.assert_close(whole(trained[0]), whole(trained[1]))
    torch.testing.assert_close(trained[0].bias, trained[1].bias)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("into", FORMS)
@pytest.mark.parametrize("of", FORMS)
def test_states_fit_either_form(of, into, nested, assign):
    source, target = layer_of(of, seed=1), layer_of(into, seed=1)
    with torch.no_grad():
        target.weight.zero_()
    kept = target.weight
    wrapped = [nn.Sequential(nn.ReLU(), layer) for layer in (source, target)] if nested else [source, target]
    wrapped[1].load_state_dict(wrapped[0].state_dict(), assign=assign)
    assert target.is_unpacked == (into == "unpacked")
    assert assign or target.weight is kept
    assert torch.equal(whole(target), whole(source))


def test_hostile_states_are_refused():
    target, state = layer_of("unpacked"), layer_of("packed").state_dict()
    state["col_indices"] = state["col_indices"].clone()
    state["col_indices"][0] = 2**30
    before = target.weight.detach().clone()
    with pytest.raises(BlockSparseFormatError, match="col_indices"):
        target.load_state_dict(state)
    assert torch.equal(target.weight, before)
    state = layer_of("unpacked").state_dict()
    state["weight"] = torch.ones(OUT, IN)
    with pytest.raises(BlockSparseFormatError, match="no block"):
        layer_of("packed").load_state_dict(state)
    state["weight"] = torch.ones(OUT + 1, IN)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer_of("packed").load_state_dict(state)


@torch.no_grad()
def test_values_without_a_block_are_never_dropped():
    layer = layer_of("unpacked")
    assert not layer.mask().all()
    layer.weight.fill_(1)
    for use in (layer.packed, layer.pack_weight, layer.to_dense):
        with pytest.raises(BlockSparseFormatError, match="no block"):
            use()
    assert layer.is_unpacked
    layer.weight.data.mul_(layer.entry_mask())  # as the message says
    layer.pack_weight()
    assert torch.equal(whole(layer), layer.entry_mask().double())


def to_form(model, form):
    for _, layer in block_sparse_layers(model):
        layer.unpack_weight() if form == "unpacked" else layer.pack_weight()
    return model


@pytest.mark.parametrize("how", ["own state", "state by name", "state by place"])
def test_files_are_the_same(tmp_path, how):
    for form in FORMS:
        model = to_form(sparse_model(tiny_model()), form)
        state = model.state_dict()
        arguments = {"own state": ((), {}), "state by name": ((), {"state_dict": state})}
        args, kwargs = arguments.get(how, ((True, state), {}))
        model.save_pretrained(tmp_path / form, *args, **kwargs)
        assert {layer.is_unpacked for _, layer in block_sparse_layers(model)} == {form == "unpacked"}
        assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    files = [(tmp_path / form / "model.safetensors").read_bytes() for form in FORMS]
    assert files[0] == files[1]
    assert load_file(tmp_path / "packed/model.safetensors")


def test_a_model_with_values_without_a_block_is_not_saved(tmp_path):
    model = to_form(sparse_model(tiny_model()), "unpacked")
    with torch.no_grad():
        next(block_sparse_layers(model))[1].weight.fill_(1)
    with pytest.raises(BlockSparseFormatError, match="no block"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.glob("saved/*.safetensors"))


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_loads_in_each_form(tmp_path, family, form, monkeypatch):
    model = sparse_model(tiny_model(family))
    expected = answer(to_form(model, "packed"))
    assert_same(answer(to_form(model, "unpacked")), expected)
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("BLOCKPRUNE_STORAGE", form)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    if form != "auto":
        assert {layer.is_unpacked for _, layer in block_sparse_layers(loaded)} == {form == "unpacked"}
    assert_same(answer(loaded), expected)
    loaded.dequantize()
    assert not list(block_sparse_layers(loaded))
    assert_same(answer(loaded), expected)


def test_layers_of_both_forms_work_together():
    model = sparse_model(tiny_model())
    expected = answer(model)
    names = [name for name, _ in block_sparse_layers(model)]
    for side in ("q_proj", "k_proj", "v_proj", "fc1"):
        for name in names:
            layer = model.get_submodule(name)
            layer.unpack_weight() if name.endswith(side) else layer.pack_weight()
        assert_same(answer(model), expected)
        assert_same(answer(model), expected)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_and_exported_models_answer_and_learn(form):
    model = to_form(sparse_model(tiny_model()), form)
    expected = answer(model)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(answer(compiled), expected)
    grads = []
    for each in (model, compiled):
        model.zero_grad()
        each(pixel_values=pixels).logits.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
    program = torch.export.export(model, (), {"pixel_values": pixels})
    with torch.no_grad():
        assert_same(program.module()(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


WITHOUT = """
import os, sys
import torch, transformers

os.environ["BLOCKPRUNE_STORAGE"] = "auto"
model = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
layers = [module for module in model.modules() if type(module).__name__ == "BlockSparseLinear"]
with torch.no_grad():
    logits = model(pixel_values=torch.load("pixels.pt")).logits
model.save_pretrained("again")
torch.save([len(layers), sum(layer.is_unpacked for layer in layers), logits], "answer.pt")
"""


@pytest.mark.slow
def test_without_the_package_and_its_kernels_layers_are_unpacked(tmp_path):
    model = sparse_model(tiny_model(hidden_size=192, intermediate_size=768), shape=(16, 16))
    model.save_pretrained(tmp_path / "saved")
    torch.save(PIXELS, tmp_path / "pixels.pt")
    done = run(WITHOUT, tmp_path, "saved", package=False)
    assert done.returncode == 0, done.stderr[-3000:]
    count, unpacked, logits = torch.load(tmp_path / "answer.pt")
    assert count == unpacked == 12
    assert_same(logits, answer(model))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "again")]
    assert files[0] == files[1]


def test_fingerprints_do_not_depend_on_the_form():
    model = sparse_model(tiny_model())
    found = {weights_fingerprint(to_form(model, form)) for form in FORMS}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (ViTConfig(), 196),
        (ViTConfig(image_size=[64, 32], patch_size=8), 32),
        (SwinConfig(), 49),
        (Dinov2Config(image_size=28, patch_size=14), 4),
        (ViTConfig(image_size=8, patch_size=16), 1),
    ],
)
def test_tokens_of_configs(config, tokens):
    assert least_tokens(config) == tokens


def arguments_of(size, density, block_shape=(16, 16), dtype=torch.float32):
    out, into = size
    grid = math.ceil(out / block_shape[0]), math.ceil(into / block_shape[1])
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(0)) < density
    return LayerArguments(*pack(torch.zeros(size, dtype=dtype), mask, block_shape), None, out)


@pytest.mark.skipif(find_library()[0] is None, reason="no compiled kernels here")
@given(
    size=st.tuples(st.integers(16, 800), st.integers(16, 800)),
    block_shape=st.sampled_from([(16, 16), (32, 32), (8, 8), (64, 1)]),
    tokens=st.integers(1, 2000),
    density=st.floats(0, 1),
)
@settings(deadline=None, max_examples=60)
def test_more_tokens_and_fewer_blocks_speak_for_kernels(size, block_shape, tokens, density):
    backend = CpuBackend(find_library()[0])
    layer = arguments_of(size, density, block_shape)
    if backend.beats_dense(layer, size[1], tokens):
        assert backend.beats_dense(layer, size[1], 2 * tokens)
        assert backend.beats_dense(arguments_of(size, 0, block_shape), size[1], tokens)


@pytest.mark.skipif(find_library()[0] is None, reason="no compiled kernels here")
def test_half_of_deit_tiny_runs_in_kernels_and_a_toy_does_not():
    assert beats_dense(arguments_of((768, 192), 0.5), 192, 197)
    assert not beats_dense(arguments_of((128, 128), 0.9), 128, 17)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_no_kernel_takes_is_unpacked(dtype):
    assert not beats_dense(arguments_of((768, 192), 0.5, dtype=dtype), 192, 197)


def test_the_environment_decides(monkeypatch):
    layer = arguments_of((768, 192), 0.5)
    for name, best in (("packed", True), ("unpacked", False)):
        monkeypatch.setenv("BLOCKPRUNE_STORAGE", name)
        assert is_best_packed(layer, 192, 197) == best
    for name in ("", "auto"):
        monkeypatch.setenv("BLOCKPRUNE_STORAGE", name)
        assert is_best_packed(layer, 192, 197) == beats_dense(layer, 192, 197)
        assert not is_best_packed(arguments_of((16, 16), 1), 16, 1)
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", "reference")  # it shall run, whatever it costs
    assert is_best_packed(arguments_of((16, 16), 1), 16, 1)
    monkeypatch.setenv("BLOCKPRUNE_STORAGE", "zipped")
    with pytest.raises(BackendError, match=r"BLOCKPRUNE_STORAGE: unknown storage 'zipped'"):
        is_best_packed(layer, 192, 197)


@pytest.mark.parametrize(
    ("torch_has_avx512", "family", "best"), [(True, "6", False), (False, "25", False), (False, "26", True)]
)
@pytest.mark.skipif(
    find_library()[0] is None or not find_library()[0].isa.startswith("avx512"), reason="no AVX-512 kernels here"
)
def test_a_layer_that_keeps_all_runs_where_it_is_faster(monkeypatch, torch_has_avx512, family, best):
    """oneMKL multiplies with half of AVX-512's width on processors that are not Intel's; so does Zen 4 itself."""
    monkeypatch.setenv("BLOCKPRUNE_STORAGE", "auto")
    monkeypatch.setattr("hf_blockprune._cpu.backend._torch_has_avx512", lambda: torch_has_avx512)
    monkeypatch.setattr("hf_blockprune._cpu.backend._cpuinfo", lambda key: family)
    multiplication_cost.cache_clear()
    try:
        assert is_best_packed(arguments_of((768, 192), 1), 192, 197) == best
        assert is_best_packed(arguments_of((760, 200), 1), 200, 197) == best  # blocks that overhang the matrix
        assert not is_best_packed(arguments_of((16, 16), 1), 16, 197)
        monkeypatch.setenv("BLOCKPRUNE_STORAGE", "packed")
        assert is_best_packed(arguments_of((768, 192), 1), 192, 197)
    finally:
        multiplication_cost.cache_clear()


def test_a_layer_that_keeps_all_is_unpacked_on_gpus():
    def asked(density):
        weight, *rest = arguments_of((768, 192), density)
        on_gpu = SimpleNamespace(shape=weight.shape, is_cuda=True)
        return _beats_dense(LayerArguments(on_gpu, *rest), 192, 197)

    assert asked(0.9)
    assert not asked(1)


def test_a_model_that_moves_is_looked_at_again(monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_STORAGE", "auto")
    model = sparse_model(tiny_model())
    expected, layer = answer(model), next(block_sparse_layers(model))[1]
    monkeypatch.setenv("BLOCKPRUNE_STORAGE", "packed")
    model.float()
    assert layer.is_unpacked  # nothing has changed
    nn.Module.to(model, torch.float64)
    assert not layer.is_unpacked
    monkeypatch.setenv("BLOCKPRUNE_STORAGE", "unpacked")
    nn.Module.to(model, torch.float32)
    assert layer.is_unpacked
    assert_same(answer(model), expected)
    pack_weights(model)
    nn.Module.to(model, torch.float64)
    assert not layer.is_unpacked
    nn.Module.to(model, torch.float32)
    choose_storage(model)
    assert layer.is_unpacked
    nn.Module.to(model, "meta")
    assert layer.weight.is_meta


def test_weights_that_torch_holds_elsewhere_stay_as_they_are():
    layer = layer_of("packed")
    layer.tokens = 1
    nn.utils.parametrizations.weight_norm(layer, dim=0)
    layer.choose_storage()
    layer.double()
    assert layer.weight.dim() == 3
    assert layer(inputs(torch.float64)).shape == (13, OUT)
