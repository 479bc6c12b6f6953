"""The block-sparse op against dense float64 arithmetic, alone and under torch's compilers."""

import math
import shutil
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hf_blockprune.hub import blockprune_backends
from hf_blockprune.hub.blockprune_backends import Backend, LayerArguments, available_backends, choose_backend
from hf_blockprune.hub.blockprune_layout import PackedWeight, pack
from hf_blockprune.hub.blockprune_linear import BlockSparseLinear
from hf_blockprune.hub.blockprune_ops import block_sparse_linear
from hf_blockprune.hub.blockprune_reference import dense_backward, reference_backward, reference_forward

OUT, IN = 96, 80  # 32x32, 64x32, 64x1 and 5x3 blocks do not divide it
BLOCK_SHAPES = [(16, 16), (32, 32), (64, 32), (32, 4), (64, 1), (1, 1), (5, 3)]
ACTIVATIONS = ["none", "gelu", "gelu_tanh"]
MAX_RELATIVE_ERROR = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def shape_id(shape):
    return "x".join(map(str, shape))


class Case(NamedTuple):
    """The inputs of a call, and the weight as a dense float64 matrix with zeros in removed blocks."""

    dense: Tensor
    packed: PackedWeight
    bias: Tensor | None
    x: Tensor


def random_mask(grid, density, generator):
    mask = torch.rand(grid, generator=generator) < density
    if 0 < density < 1 and grid[0] > 2:
        mask[1] = False
        mask[-1] = True
    return mask


def make_case(
    block_shape,
    leading=(13,),
    *,
    shape=(OUT, IN),
    density=0.5,
    dtype=torch.float32,
    bias=True,
    seed=0,
):
    """Random values, rounded to `dtype`; one empty and one full row of blocks where the grid has room for both."""
    generator = torch.Generator().manual_seed(seed)
    grid = -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])
    mask = random_mask(grid, density, generator)
    keep = torch.kron(mask, torch.ones(block_shape, dtype=torch.bool))[: shape[0], : shape[1]]
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return Case(
        dense=torch.where(keep, weight.double(), 0.0),
        packed=pack(weight, mask, block_shape),
        bias=torch.randn(shape[0], generator=generator, dtype=torch.float64).to(dtype) if bias else None,
        x=torch.randn(*leading, shape[1], generator=generator, dtype=torch.float64).to(dtype),
    )


def reference_activation(z, activation):
    if activation == "gelu":
        return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return z


def reference(case, activation="none"):
    z = case.x.double() @ case.dense.T
    return reference_activation(z if case.bias is None else z + case.bias.double(), activation)


def run(case, activation="none", **options):
    return block_sparse_linear(
        case.x, *case.packed, case.bias, out_features=len(case.dense), activation=activation, **options
    )


def assert_matches(actual, expected, dtype):
    """Same shape, the wanted dtype, and within the dtype's relative Frobenius error."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    scale = torch.linalg.vector_norm(expected).clamp_min(1e-300)
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.linalg.vector_norm(actual.double() - expected) / scale
    torch.testing.assert_close(error, zero, atol=MAX_RELATIVE_ERROR[dtype], rtol=0)


@pytest.mark.parametrize("tokens", [0, 1, 13, 197])
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=shape_id)
def test_equals_the_dense_product(block_shape, tokens):
    case = make_case(block_shape, (tokens,))
    assert_matches(run(case), reference(case), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=shape_id)
def test_equals_the_dense_product_in_other_dtypes(block_shape, dtype):
    case = make_case(block_shape, dtype=dtype)
    assert_matches(run(case), reference(case), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_and_activation(dtype, bias, activation):
    case = make_case((32, 32), dtype=dtype, bias=bias)
    assert_matches(run(case, activation), reference(case, activation), dtype)


@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_residual_is_added_after_the_activation(activation, backend):
    case = make_case((16, 16), (2, 7))
    residual = torch.randn(2, 7, OUT, generator=torch.Generator().manual_seed(1))
    out = run(case, activation, backend=backend, residual=residual)
    assert_matches(out, reference(case, activation) + residual, torch.float32)


def test_gradient_of_a_residual_is_that_of_the_output():
    case = make_case((16, 16), (2, 7))
    residual = torch.randn(2, 7, OUT).requires_grad_()
    grad = torch.randn(2, 7, OUT)
    run(case, "gelu", residual=residual).backward(grad)
    assert torch.equal(residual.grad, grad)


@pytest.mark.parametrize(
    "residual", [torch.zeros(7, OUT), torch.zeros(2, 7, OUT, dtype=torch.float64)], ids=["shape", "dtype"]
)
def test_residual_that_does_not_fit_is_refused(residual):
    with pytest.raises(ValueError, match=r"residual: expected torch.float32 \[2, 7, 96\], got"):
        run(make_case((16, 16), (2, 7)), residual=residual)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 0, 5), (2, 3, 1, 4)], ids=str)
def test_any_number_of_leading_dimensions(leading):
    case = make_case((16, 16), leading)
    assert_matches(run(case), reference(case), torch.float32)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[:, :1].expand(-1, 4, -1),
        lambda x: x.flip(-1).as_strided(x.shape, (1, 6, 24)),
    ],
    ids=["transposed", "every other", "expanded", "features not adjacent"],
)
def test_non_contiguous_inputs(view):
    case = make_case((16, 16), (6, 4))
    case = case._replace(x=view(case.x))
    assert not case.x.is_contiguous()
    assert_matches(run(case), reference(case), torch.float32)


@pytest.mark.parametrize("density", [0.0, 1.0], ids=["all blocks removed", "all blocks kept"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("block_shape", [(16, 16), (64, 32), (5, 3)], ids=shape_id)
def test_extreme_patterns(block_shape, bias, density):
    case = make_case(block_shape, density=density, bias=bias)
    assert len(case.packed.weight) == density * math.ceil(OUT / block_shape[0]) * math.ceil(IN / block_shape[1])
    assert_matches(run(case), reference(case), torch.float32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (100, 3), (33, 17)], ids=shape_id)
@pytest.mark.parametrize("block_shape", [(16, 16), (5, 3)], ids=shape_id)
def test_features_that_the_block_does_not_divide(block_shape, shape):
    case = make_case(block_shape, shape=shape, density=1.0)
    assert_matches(run(case), reference(case), torch.float32)


def test_an_empty_block_row_gives_the_bias_alone():
    case = make_case((16, 16))
    assert torch.equal(run(case)[:, 16:32], case.bias[16:32].expand(13, -1))


def differentiable(case):
    tensors = {"x": case.x, "weight": case.packed.weight, "bias": case.bias}
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items() if t is not None}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradients_agree_with_finite_differences(bias, activation):
    case = make_case((5, 3), (2, 3), shape=(12, 8), dtype=torch.float64, bias=bias)
    inputs = differentiable(case)

    def function(x, weight, bias=None):
        return run(Case(case.dense, case.packed._replace(weight=weight), bias, x), activation)

    # Entries of edge blocks that reach past the matrix have no influence, and so no gradient, either way.
    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=shape_id)
def test_gradients_equal_those_of_the_dense_product(block_shape, activation):
    case = make_case(block_shape, (2, 7))
    inputs = differentiable(case)
    out_grad = torch.randn(2, 7, OUT, generator=torch.Generator().manual_seed(1))
    packed = case.packed._replace(weight=inputs["weight"])
    run(Case(case.dense, packed, inputs["bias"], inputs["x"]), activation).backward(out_grad)

    x, dense, bias = (t.detach().double().requires_grad_() for t in (case.x, case.dense, case.bias))
    reference(Case(dense, case.packed, bias, x), activation).backward(out_grad.double())
    mask = torch.zeros(-(-OUT // block_shape[0]), -(-IN // block_shape[1]), dtype=torch.bool)
    for row, (start, end) in enumerate(zip(packed.crow_indices[:-1], packed.crow_indices[1:], strict=True)):
        mask[row, packed.col_indices[start:end].long()] = True

    assert_matches(inputs["x"].grad, x.grad, torch.float32)
    assert_matches(inputs["bias"].grad, bias.grad, torch.float32)
    assert_matches(inputs["weight"].grad, pack(dense.grad, mask, block_shape).weight, torch.float32)


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=shape_id)
def test_gradients_by_dense_products_equal_those_by_blocks(block_shape):
    case = make_case(block_shape, (23,), dtype=torch.float64)
    grad = torch.randn(23, OUT, dtype=torch.float64)
    found, expected = (of(grad, case.x, *case.packed) for of in (dense_backward, reference_backward))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.is_contiguous() == theirs.is_contiguous()


@pytest.mark.parametrize(
    ("leading", "density"), [((0,), 0.5), ((2, 0), 0.5), ((13,), 0.0)], ids=["no tokens", "no tokens, 3D", "no blocks"]
)
def test_gradients_of_nothing_are_zero(leading, density):
    case = make_case((16, 16), leading, density=density)
    inputs = differentiable(case)
    packed = case.packed._replace(weight=inputs["weight"])
    run(Case(case.dense, packed, inputs["bias"], inputs["x"]), "gelu").sum().backward()
    for name in ("x", "weight"):
        assert torch.equal(inputs[name].grad, torch.zeros_like(inputs[name]))
    assert inputs["bias"].grad.shape == (OUT,)


def test_gradients_reach_only_what_asks_for_them():
    case = make_case((16, 16))
    x = case.x.clone().requires_grad_()
    run(case._replace(x=x)).sum().backward()
    assert_matches(x.grad, case.dense.sum(0).expand(13, -1), torch.float32)
    assert case.packed.weight.grad is None


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_theirs():
    case = make_case((32, 32))
    inputs = differentiable(case)
    packed = case.packed._replace(weight=inputs["weight"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(Case(case.dense, packed, inputs["bias"], inputs["x"]))
    assert_matches(out, reference(case), torch.bfloat16)
    out.float().sum().backward()
    assert {tensor.grad.dtype for tensor in inputs.values()} == {torch.float32}
    expected = case.dense.sum(0).expand(13, -1)
    torch.testing.assert_close(inputs["x"].grad.double(), expected, rtol=2e-2, atol=0.2)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_op_keeps_the_rules_of_torch_library(bias, activation):
    case = make_case((5, 3), (2, 3), shape=(12, 8), bias=bias)
    inputs = differentiable(case)
    args = (inputs["x"], inputs["weight"], *case.packed[1:], inputs.get("bias"), 12, activation, "auto")
    torch.library.opcheck(torch.ops.blockprune.block_sparse_linear, args)


class Mlp(nn.Module):
    """Two block-sparse layers with dense arithmetic around them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        mask = torch.rand(3, 2) < 0.6
        self.fc1 = BlockSparseLinear.from_dense(nn.Linear(24, 40), mask, (16, 16))
        self.fc2 = BlockSparseLinear.from_dense(nn.Linear(40, 24), mask.T, (16, 16))

    def forward(self, x):
        return x + self.fc2(nn.functional.gelu(self.fc1(x)))


def test_compiled_without_graph_breaks_forward_and_backward():
    torch._dynamo.reset()
    model, plain = Mlp(), Mlp()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (5, 13):
        x = torch.randn(2, tokens, 24)
        out, expected = compiled(x), plain(x)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        expected.sum().backward()
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


# Inductor writes C++ for the CPU.
CODE_GENERATOR = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"


@pytest.mark.slow
def test_compiled_to_machine_code(tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = Mlp().eval(), torch.randn(13, 24)
    with torch.no_grad():
        out = torch.compile(model, fullgraph=True, backend=CODE_GENERATOR)(x)
    torch.testing.assert_close(out, model(x))


def test_exported_with_any_number_of_tokens():
    model = Mlp().eval()
    tokens = torch.export.Dim("tokens", min=2, max=1024)
    program = torch.export.export(model, (torch.randn(2, 5, 24),), dynamic_shapes={"x": {1: tokens}})
    x = torch.randn(2, 13, 24)
    torch.testing.assert_close(program.module()(x), model(x))
    assert any("block_sparse_linear" in str(node.target) for node in program.graph.nodes)


def test_auto_takes_the_latest_backend_that_can_run_the_call(monkeypatch):
    monkeypatch.setattr(blockprune_backends, "_BACKENDS", dict(blockprune_backends._BACKENDS))
    monkeypatch.delenv("BLOCKPRUNE_BACKEND", raising=False)
    case = make_case((16, 16), dtype=torch.float64)
    double = case.x, LayerArguments(*case.packed, None, OUT)
    single = case.x.float(), LayerArguments(case.packed.weight.float(), *case.packed[1:], None, OUT)
    before = choose_backend(*single)
    blockprune_backends.register_backend(
        "doubles", Backend(lambda *args: reference_forward(*args) + 1, lambda x, _: x.dtype == torch.double)
    )
    assert available_backends()[0] == "doubles"
    assert choose_backend(*double) == "doubles"
    assert choose_backend(*single) == before
    assert_matches(run(case), reference(case) + 1, torch.float64)
    assert_matches(run(case, backend="reference"), reference(case), torch.float64)


def test_environment_chooses_where_the_call_does_not(monkeypatch):
    case = make_case((16, 16))
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", "reference")
    assert choose_backend(case.x, LayerArguments(*case.packed, None, OUT)) == "reference"
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"'abacus'.*'reference'"):
        run(case)
    assert_matches(run(case, backend="reference"), reference(case), torch.float32)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"unknown block-sparse backend 'abacus'.*'reference'"):
        run(make_case((16, 16)), backend="abacus")


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"unknown activation 'relu'.*'gelu_tanh'"):
        run(make_case((16, 16)), activation="relu")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_mixed_dtypes_are_refused(backend):
    case = make_case((16, 16))
    with pytest.raises(ValueError, match="float64"):
        run(case._replace(x=case.x.double()), backend=backend)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_layer_without_data_gives_shapes_and_never_numbers(mode):
    layer = BlockSparseLinear.from_dense(nn.Linear(32, 48), torch.ones(3, 2).bool(), (16, 16)).to("meta")
    with mode():
        assert layer(torch.ones(2, 32, device="meta")).shape == (2, 48)
        with pytest.raises(ValueError, match="expected on cpu, as the input is, got meta"):
            layer(torch.ones(2, 32))
