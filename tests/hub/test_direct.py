"""Calls that go past torch's dispatcher: the same outputs, and none of them where somebody would miss it."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_blockprune import BlockSparseFormatError
from hf_blockprune.hub.blockprune_direct import needs_no_dispatcher
from hf_blockprune.hub.blockprune_linear import BlockSparseLinear

OP = "block_sparse_linear"
IN, OUT = 80, 96


def layer_of(block_shape=(16, 16), *, bias=True, density=0.6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    grid = -(-OUT // block_shape[0]), -(-IN // block_shape[1])
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    return BlockSparseLinear.from_dense(linear, torch.rand(grid, generator=generator) < density, block_shape)


class Watching(TorchDispatchMode):
    """The names of the operators that torch's dispatcher hands on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Named(TorchFunctionMode):
    """Likewise of torch's functions."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Counting(Tensor):
    """A tensor with an idea of its own about operators."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


VIEWS = {
    "whole": lambda x: x,
    "two leading dimensions": lambda x: x.view(4, 3, IN),
    "one token": lambda x: x[0],
    "every other token": lambda x: x[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "no token": lambda x: x[:0],
    "negated in name alone": lambda x: torch._neg_view(x),
}


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block_shape", [(16, 16), (32, 8), (8, 8), (7, 5), (96, 80), (128, 128)], ids=str)
def test_outputs_are_those_of_the_op(block_shape, bias, view, activation):
    layer, x = layer_of(block_shape, bias=bias), VIEWS[view](torch.randn(12, IN))
    with torch.no_grad():
        found = layer.product(x, activation)
        with Watching() as watching:
            expected = layer.product(x, activation)
    assert any(OP in name for name in watching.seen)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_plain_call_needs_no_dispatcher():
    layer, x = layer_of(), torch.randn(3, IN)
    assert not needs_no_dispatcher(x, [layer.arguments()])  # its weights want gradients
    with torch.no_grad():
        assert needs_no_dispatcher(x, [layer.arguments()])
    with torch.inference_mode():
        assert needs_no_dispatcher(x, [layer.arguments()])
        assert needs_no_dispatcher(x.clone(), [layer.arguments()])
    layer.requires_grad_(False)
    assert needs_no_dispatcher(x, [layer.arguments()])
    assert not needs_no_dispatcher(x.requires_grad_(), [layer.arguments()])


@torch.no_grad()
def test_torchs_functions_are_overridden():
    with Named() as named:
        layer_of()(torch.randn(3, IN))
    assert any(OP in name for name in named.seen)


@torch.no_grad()
def test_subclasses_of_tensors_are_asked():
    layer, x = layer_of(), torch.randn(3, IN)
    Counting.seen.clear()
    out = layer(x.as_subclass(Counting))
    assert any(OP in name for name in Counting.seen)
    torch.testing.assert_close(out.as_subclass(Tensor), layer(x))


@torch.no_grad()
def test_tensors_without_data_stay_so():
    layer = layer_of()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = layer(mode.from_tensor(torch.randn(3, IN)))
    assert out.fake_mode is mode
    assert out.shape == (3, OUT)
    for name in ("weight", "bias", "crow_indices", "col_indices"):
        part = copy.deepcopy(layer)
        setattr(part, name, type(getattr(part, name))(getattr(part, name).to("meta")))
        assert not needs_no_dispatcher(torch.randn(3, IN), [part.arguments()]), name


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_hold_the_op_and_not_its_outputs():
    layer, x, y = layer_of(), torch.randn(3, IN), torch.randn(3, IN)
    traced = torch.jit.trace(layer, x)
    assert OP in str(traced.graph)
    torch.testing.assert_close(traced(y), layer(y))
    graph = make_fx(layer)(x)
    assert OP in str(graph.graph)
    torch.testing.assert_close(graph(y), layer(y))


@torch.no_grad()
def test_profiles_name_the_op():
    layer, x = layer_of(), torch.randn(3, IN)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    assert any(OP in event.name for event in profile.events())


@torch.no_grad()
def test_autocast_converts():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer_of()(torch.randn(3, IN)).dtype == torch.bfloat16


def test_gradients_flow():
    layer, x = layer_of(), torch.randn(3, IN)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@torch.no_grad()
def test_what_the_kernels_do_not_take_is_computed_or_refused_as_ever(monkeypatch):
    x = torch.randn(3, IN)
    for dtype in (torch.float16, torch.float64):
        layer = layer_of(dtype=dtype)
        torch.testing.assert_close(layer(x.to(dtype)), layer.to_dense()(x.to(dtype)))
    with pytest.raises(ValueError, match="float64"):
        layer_of()(x.double())
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        layer_of().product(x, "relu")
    bad = layer_of()
    bad.col_indices.data.fill_(2**31 - 1)
    with pytest.raises(BlockSparseFormatError, match="col_indices"):
        bad(x)
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", "abacus")
    with pytest.raises(ValueError, match="'abacus'"):
        layer_of()(x)


@torch.no_grad()
def test_parameters_that_stand_elsewhere_are_read():
    x, layer = torch.randn(3, IN), layer_of()
    expected = 2 * layer(x) - layer.bias

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(layer, "weight", Doubled())
    torch.testing.assert_close(layer(x), expected)
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer(x), expected)
    doubled = layer_of()
    prune.identity(doubled, "weight")
    doubled.weight_mask.zero_()
    torch.testing.assert_close(doubled(x), doubled.bias.expand(3, OUT))
