"""Halves of a layer in one call of the C++ kernels against float64, for every instruction set of this processor."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_blockprune._cpu.halves import CpuHalves
from hf_blockprune._cpu.library import CpuLibrary, find_library
from hf_blockprune.hub.blockprune_int8 import dequantize_weight, quantize_weight
from hf_blockprune.hub.blockprune_layout import grid_shape, pack, unpack
from hf_blockprune.hub.blockprune_quick_halves import HalfArguments, Heads
from hf_blockprune.hub.blockprune_reference import Int8Arguments, LayerArguments
from tests.cpu.test_backend import instruction_sets

LIBRARY, WHY_NOT = find_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=WHY_NOT)
KERNELS = {name: CpuHalves(CpuLibrary(name)) for name in instruction_sets()}
EPSILON = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
# Of what is added to x, as a whole: float32's own, a few roundings to bfloat16, and those of products' inputs to int8.
TOLERANCE = {(False, torch.float32): 2e-6, (False, torch.bfloat16): 2e-2}
INT8_TOLERANCE = 6e-2


@pytest.fixture(params=list(KERNELS))
def kernels(request):
    return KERNELS[request.param]


class Case:
    """Half of a layer with random numbers, and what it should give."""

    def __init__(
        self, *, images, tokens, heads, head_size, width, block_shape, int8, dtype, attention, seed=0, density=0.6
    ):
        torch.manual_seed(seed)
        self.heads, self.head_size, self.attention, self.block_shape = heads, head_size, attention, block_shape
        self.int8, self.dtype, self.density = int8, dtype, density
        self.x = torch.randn(images, tokens, width).to(dtype)
        self.norm = (torch.rand(width) + 0.5).to(dtype), (0.1 * torch.randn(width)).to(dtype), EPSILON
        self.output_scale = (torch.rand(width) + 0.5).to(dtype)
        self.bias = torch.randn(images, tokens)
        features = heads * head_size
        shapes = (
            [(features, width)] * 3 + [(width, features)] if attention else [(2 * width, width), (width, 2 * width)]
        )
        self.layers, self.dense = zip(*[self._layer(shape) for shape in shapes], strict=True)
        if not attention:
            self.layers = (self.layers[0]._replace(activation="gelu"), self.layers[1])

    def _layer(self, shape):
        rows, cols = self.block_shape
        block_shape = min(rows, shape[0]), min(cols, shape[1])
        mask = torch.rand(grid_shape(*shape, block_shape)) < self.density
        packed = pack(torch.randn(shape).mul(shape[1] ** -0.5).to(self.dtype), mask, block_shape)
        bias = (0.1 * torch.randn(shape[0])).to(self.dtype)
        if not self.int8:
            return LayerArguments(*packed, bias, shape[0]), (unpack(packed, *shape).double(), bias.double())
        numbers, scale = quantize_weight(packed, shape[0])
        small = packed._replace(weight=numbers)
        stands_for = unpack(packed._replace(weight=dequantize_weight(small, scale)), *shape).double()
        return Int8Arguments(*small, bias, shape[0], "none", None, scale), (stands_for, bias.double())

    def run(self, kernels, *, reads=False, output_scale=True, biased=True, in_place=False):
        bias = self.bias if biased else None
        heads = Heads(self.heads, self.head_size, self.head_size**-0.5, bias) if self.attention else None
        scale = self.output_scale if output_scale else None
        x = self.x.clone() if in_place else self.x
        return kernels(x, HalfArguments(self.norm, self.layers, scale, heads, reads, in_place))

    def expected(self, *, biased=True, output_scale=True):
        """(what is added to x, norm(x)) in float64."""
        weight, bias, _ = self.norm
        read = F.layer_norm(self.x.double(), weight.shape, weight.double(), bias.double(), EPSILON)
        first, last = [F.linear(read, *dense) for dense in self.dense[:-1]], self.dense[-1]
        if self.attention:
            q, k, v = (y.unflatten(-1, (self.heads, self.head_size)).transpose(1, 2) for y in first)
            mask = self.bias[:, None, None].double() if biased else None
            hidden = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        else:
            hidden = F.gelu(first[0])
        scale = self.output_scale.double() if output_scale else 1.0
        return scale * F.linear(hidden, *last), read


def assert_right(case, given, expected):
    added = given.double() - case.x.double()
    # What is rounded with x is as large as x.
    rounding = 2e-3 * case.x.double().norm() if case.dtype == torch.bfloat16 else 2e-7 * case.x.double().norm()
    tolerance = INT8_TOLERANCE if case.int8 else TOLERANCE[case.int8, case.dtype]
    assert (added - expected).norm() <= tolerance * expected.norm() + rounding


@pytest.mark.parametrize("isa", list(KERNELS))
@given(
    images=st.integers(1, 4),
    tokens=st.one_of(st.integers(1, 40), st.sampled_from([64, 197])),
    heads=st.integers(1, 4),
    head_size=st.one_of(st.integers(1, 40), st.sampled_from([64])),
    width=st.integers(9, 96),
    block_shape=st.sampled_from([(16, 16), (8, 8), (32, 32), (5, 7), (32, 4), (64, 1)]),
    int8=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    attention=st.booleans(),
    reads=st.booleans(),
    output_scale=st.booleans(),
    biased=st.booleans(),
    num_threads=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_parts(
    isa, images, tokens, heads, head_size, width, block_shape, int8, dtype, attention, reads, output_scale, biased,
    num_threads, seed,
):  # fmt: skip
    sizes = {"images": images, "tokens": tokens, "heads": heads, "head_size": head_size, "width": width}
    case = Case(**sizes, block_shape=block_shape, int8=int8, dtype=dtype, attention=attention, seed=seed)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        y, read = case.run(KERNELS[isa], reads=reads, output_scale=output_scale, biased=biased)
    finally:
        torch.set_num_threads(before)
    expected, normalised = case.expected(output_scale=output_scale, biased=biased)
    assert (y.shape, y.dtype, read is not None) == (case.x.shape, dtype, reads)
    assert_right(case, y, expected)
    if reads:
        error = 1e-5 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(read.double(), normalised, rtol=error, atol=error)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", [False, True])
def test_any_number_of_threads_gives_the_same_bits(kernels, int8, dtype, attention):
    case = Case(
        images=7, tokens=50, heads=3, head_size=32, width=96, block_shape=(16, 16), int8=int8, dtype=dtype,
        attention=attention,
    )  # fmt: skip
    before, outputs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            outputs.append(case.run(kernels)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("width", [96, 90])
def test_in_place_are_the_same_bits(kernels, attention, width):
    case = Case(
        images=9, tokens=150, heads=3, head_size=32, width=width, block_shape=(16, 16), int8=False,
        dtype=torch.float32, attention=attention,
    )  # fmt: skip
    assert torch.equal(case.run(kernels, in_place=True)[0], case.run(kernels)[0])


@pytest.mark.parametrize("int8", [False, True])
def test_more_images_than_pass_at_once(kernels, int8):
    case = Case(
        images=20, tokens=197, heads=4, head_size=64, width=256, block_shape=(32, 32), int8=int8, dtype=torch.float32,
        attention=True,
    )  # fmt: skip
    assert_right(case, case.run(kernels)[0], case.expected()[0])


def test_layers_without_any_block_add_their_biases(kernels):
    case = Case(
        images=2, tokens=9, heads=2, head_size=8, width=16, block_shape=(8, 8), int8=False, dtype=torch.float32,
        attention=True, density=0.0,
    )  # fmt: skip
    assert_right(case, case.run(kernels)[0], case.expected()[0])


def test_a_token_that_is_not_finite_spoils_its_own_image_alone(kernels):
    case = Case(
        images=3, tokens=20, heads=2, head_size=16, width=32, block_shape=(16, 16), int8=True, dtype=torch.float32,
        attention=True,
    )  # fmt: skip
    clean = case.run(kernels)[0]
    case.x[1, 4, 3] = float("nan")
    spoiled = case.run(kernels)[0]
    assert spoiled[1].isnan().all()
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


CHANGES = {
    "float64": lambda case: setattr(case, "x", case.x.double()),
    "norm of another dtype": lambda case: setattr(case, "norm", (case.norm[0].bfloat16(), *case.norm[1:])),
    "short norm": lambda case: setattr(case, "norm", (case.norm[0][:-1], *case.norm[1:])),
    "another dtype of weights": lambda case: _change(case, weight=case.layers[0].weight.bfloat16()),
    "a whole matrix": lambda case: _change(case, weight=torch.zeros(32, 32)),
    "long indices": lambda case: _change(case, col_indices=case.layers[0].col_indices.long()),
    "a short bias": lambda case: _change(case, bias=torch.zeros(3)),
    "other outputs": lambda case: _change(case, out_features=30),
    "a residual": lambda case: _change(case, residual=torch.zeros(1)),
    "an unknown activation": lambda case: _change(case, activation="relu"),
    "bad indices": lambda case: _change(case, col_indices=case.layers[0].col_indices + 99),
    "a bias of other tokens": lambda case: setattr(case, "bias", case.bias[:, :-1]),
    "heads that do not fit": lambda case: setattr(case, "heads", 3),
}


def _change(case, **changes):
    case.layers = (case.layers[0]._replace(**changes), *case.layers[1:])


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_left_to_the_parts(kernels, change):
    case = Case(
        images=2, tokens=5, heads=2, head_size=16, width=32, block_shape=(16, 16), int8=False, dtype=torch.float32,
        attention=True,
    )  # fmt: skip
    assert case.run(kernels) is not None
    CHANGES[change](case)
    assert case.run(kernels) is None
