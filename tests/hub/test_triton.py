"""The GPU kernels against dense float64 arithmetic: on a GPU where there is one, else in Triton's interpreter."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton")

from hf_blockprune.errors import BlockSparseFormatError
from hf_blockprune.hub.blockprune_backends import LayerArguments, choose_backend
from hf_blockprune.hub.blockprune_layout import RowOrders, pack
from hf_blockprune.hub.blockprune_linear import BlockSparseLinear
from hf_blockprune.hub.blockprune_triton import k_major, launch
from hf_blockprune.hub.blockprune_triton_backend import BLOCK_ROWS, TritonBackend
from hf_blockprune.hub.blockprune_tuning import Config
from tests.hub.test_ops import ACTIVATIONS, OUT, make_case, reference, run, shape_id

from . import test_ops

# NumPy's word for exp(large) = inf in the interpreter; GELU wants just that.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK_SHAPES = [(16, 16), (16, 64), (32, 32), (32, 4), (64, 32), (64, 1), (128, 64), (16, 24), (32, 3)]
PATHS = {
    "a program a tile": Config(32, 32, 4, 2),
    "groups of token tiles": Config(16, 16, 4, 2, group=2),
    "a few programs": Config(32, 64, 4, 2, per_sm=1),
    "strips": Config(16, 32, 4, 2, group=1, per_sm=1, strips=True),
    "transposed x": Config(64, 32, 4, 2, k_major=True),
    "transposed x in strips": Config(32, 16, 4, 2, group=1, per_sm=2, strips=True, k_major=True),
}


@pytest.fixture(autouse=True)
def fixed_choice(monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_AUTOTUNE", "0")


def assert_matches(actual, expected, dtype):
    test_ops.assert_matches(actual.cpu(), expected, dtype)


def to_device(case):
    packed = type(case.packed)(*(t.to(DEVICE) for t in case.packed))
    return case._replace(packed=packed, bias=None if case.bias is None else case.bias.to(DEVICE), x=case.x.to(DEVICE))


def triton(case, activation="none", **options):
    return run(to_device(case), activation, backend="triton", **options)


def layer_arguments(case, **changes):
    case = to_device(case)
    return LayerArguments(*case.packed, case.bias, len(case.dense), **changes)


def launch_with(config, case, **changes):
    """The kernel by itself, with a configuration of ours."""
    layer, x = layer_arguments(case, **changes), case.x.to(DEVICE)
    rows = len(layer.crow_indices) - 1
    order = torch.randperm(rows, dtype=torch.int32).to(DEVICE)
    orders = RowOrders(order, order.sort()[0])
    source = k_major(x) if config.k_major else x
    return launch(source, len(x), layer, orders, config=config, precision="ieee")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=shape_id)
def test_equals_the_dense_product(block_shape, dtype):
    case = make_case(block_shape, (37,), dtype=dtype)
    assert_matches(triton(case), reference(case), dtype)


@pytest.mark.parametrize("tokens", [0, 1, 13, 197])
@pytest.mark.parametrize("block_shape", [(16, 16), (64, 32), (64, 1)], ids=shape_id)
def test_any_number_of_tokens(block_shape, tokens):
    case = make_case(block_shape, (tokens,))
    assert_matches(triton(case), reference(case), torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogues(dtype, residual, bias, activation):
    case = make_case((32, 32), (2, 9), dtype=dtype, bias=bias)
    added = torch.randn(2, 9, OUT, generator=torch.Generator().manual_seed(1)).to(dtype) if residual else None
    out = triton(case, activation, residual=None if added is None else added.to(DEVICE))
    expected = reference(case, activation) + (0 if added is None else added.double())
    assert_matches(out, expected, dtype)


@pytest.mark.parametrize("config", PATHS.values(), ids=list(PATHS))
@pytest.mark.parametrize("block_shape", [(16, 16), (32, 4), (64, 32), (16, 24)], ids=shape_id)
def test_every_way_of_going_through_the_tiles(block_shape, config):
    case = make_case(block_shape, (101,))
    assert_matches(launch_with(config, case, activation="gelu"), reference(case, "gelu"), torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BLOCK_ROWS),
    st.sampled_from([1, 2, 3, 4, 8, 16, 20, 32, 64, 128]),
    st.tuples(st.integers(1, 160), st.integers(1, 160)),
    st.integers(1, 70),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.builds(
        Config,
        block_m=st.sampled_from([16, 32, 64]),
        block_k=st.sampled_from([16, 32, 64]),
        warps=st.just(4),
        stages=st.just(2),
        group=st.integers(1, 5),
        per_sm=st.integers(0, 2),
        k_major=st.booleans(),
    ),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_random_problems_and_configurations(rows, cols, shape, tokens, density, config, strips, seed):
    if strips:
        config = config._replace(group=1, per_sm=max(config.per_sm, 1), strips=True)
    case = make_case((rows, cols), (tokens,), shape=shape, density=density, seed=seed)
    assert_matches(launch_with(config, case), reference(case), torch.float32)


@pytest.mark.parametrize("config", PATHS.values(), ids=list(PATHS))
def test_writes_every_output(monkeypatch, config):
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        tensor = new_empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    case = make_case((16, 16), (53,), bias=False)  # one block row is empty
    assert_matches(launch_with(config, case), reference(case), torch.float32)


@pytest.mark.parametrize("config", PATHS.values(), ids=list(PATHS))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_removed_features_are_not_read(config, value):
    case = make_case((16, 16), (40,))
    keep = torch.tensor([True, False, True, True, False]).repeat_interleave(16)  # input features
    mask = torch.tensor([[True, False, True, False, False]] * 3 + [[False, False, False, True, False]] * 3)
    case = case._replace(dense=torch.where(keep & mask.repeat_interleave(16, 0).repeat_interleave(16, 1), 1.0, 0.0))
    case = case._replace(dense=case.dense.double(), packed=pack(case.dense.float(), mask, (16, 16)))
    expected = reference(case)
    x = case.x.clone()
    x[:, ~keep] = value
    assert_matches(launch_with(config, case._replace(x=x)), expected, torch.float32)


@pytest.mark.parametrize("density", [0.0, 1.0], ids=["all blocks removed", "all blocks kept"])
@pytest.mark.parametrize("block_shape", [(16, 16), (64, 1), (128, 64)], ids=shape_id)
def test_extreme_patterns(block_shape, density):
    case = make_case(block_shape, density=density)
    assert_matches(triton(case), reference(case), torch.float32)


@pytest.mark.parametrize("view", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x.flip(-1)[..., :]])
def test_inputs_and_weights_in_other_layouts(view):
    case = make_case((16, 16), (6, 4))
    case = case._replace(x=view(case.x))
    assert_matches(triton(case), reference(case), torch.float32)
    packed = case.packed._replace(weight=case.packed.weight.transpose(1, 2).contiguous().transpose(1, 2))
    assert_matches(triton(case._replace(packed=packed)), reference(case), torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_equal_those_of_the_reference(activation):
    case = to_device(make_case((32, 16), (2, 7)))
    grad = torch.randn(2, 7, OUT).to(DEVICE)
    found = []
    for backend in ("triton", "reference"):
        inputs = [t.detach().clone().requires_grad_() for t in (case.x, case.packed.weight, case.bias)]
        packed = case.packed._replace(weight=inputs[1])
        run(case._replace(packed=packed, x=inputs[0], bias=inputs[2]), activation, backend=backend).backward(grad)
        found.append([t.grad for t in inputs])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_layers_that_read_the_same_tensor():
    cases = [make_case((32, 4), (21,), seed=seed, bias=bool(seed)) for seed in range(3)]
    x = cases[0].x
    outputs = TritonBackend().forward_all(x.to(DEVICE), [layer_arguments(case) for case in cases])
    for case, out in zip(cases, outputs, strict=True):
        assert_matches(out, reference(case._replace(x=x)), torch.float32)


def test_compiled_and_exported_models_call_it(monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", "triton")
    torch._dynamo.reset()
    linear = nn.Linear(80, 96)
    layer = BlockSparseLinear.from_dense(linear, torch.rand(6, 5) < 0.5, (16, 16)).to(DEVICE)
    x = torch.randn(2, 17, 80).to(DEVICE)
    with torch.no_grad():
        expected = layer.to_dense()(x)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)


def test_autocast_computes_in_its_dtype():
    case = make_case((32, 32))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = triton(case)
    assert_matches(out, reference(case), torch.bfloat16)


def test_indices_are_checked_once_and_before_the_kernel_sees_them(monkeypatch):
    from hf_blockprune.hub import blockprune_triton_backend

    backend, case = TritonBackend(), make_case((16, 16))
    layer, x = layer_arguments(case), case.x.to(DEVICE)
    assert_matches(backend.forward(x, layer), reference(case), torch.float32)

    def no_more(*args):
        raise AssertionError("checked again")

    with monkeypatch.context() as patch:
        patch.setattr(blockprune_triton_backend, "check_packed", no_more)
        backend.forward(x, layer)
    layer.col_indices[0] = 1000
    with pytest.raises(BlockSparseFormatError, match="col_indices"):
        backend.forward(x, layer)


@pytest.mark.parametrize("bias", [torch.zeros(OUT + 1), torch.zeros(OUT, dtype=torch.float64)], ids=["shape", "dtype"])
def test_bias_that_does_not_fit_is_refused(bias):
    case = make_case((16, 16))
    with pytest.raises(ValueError, match=r"bias: expected torch\.float32"):
        TritonBackend().forward(case.x.to(DEVICE), layer_arguments(case)._replace(bias=bias.to(DEVICE)))


@pytest.mark.parametrize(("block_shape", "dtype"), [((5, 3), torch.float32), ((16, 16), torch.float64)])
def test_what_it_cannot_run_is_left_to_others_and_refused_by_name(block_shape, dtype):
    case = to_device(make_case(block_shape, dtype=dtype))
    layer = LayerArguments(*case.packed, case.bias, OUT)
    assert choose_backend(case.x, layer) != "triton"
    with pytest.raises(ValueError, match=r"'triton' cannot run .* in \d+x\d+ blocks"):
        choose_backend(case.x, layer, "triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="GPUs are what it is for")
def test_the_interpreter_is_never_chosen_by_itself(monkeypatch):
    monkeypatch.delenv("BLOCKPRUNE_BACKEND", raising=False)
    case = make_case((16, 16))
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert choose_backend(case.x, LayerArguments(*case.packed, case.bias, OUT)) != "triton"
