"""The C++ kernels' products with weights in int8, for every instruction set that this processor has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_blockprune._cpu.int8 import CpuInt8
from hf_blockprune._cpu.library import CpuLibrary, find_library
from hf_blockprune.errors import BlockSparseFormatError
from hf_blockprune.hub.blockprune_int8 import reference_int8
from hf_blockprune.hub.blockprune_layout import PackedWeight, grid_shape, pack, unpack
from hf_blockprune.hub.blockprune_reference import Int8Arguments
from tests.cpu.test_backend import block_sides, instruction_sets, sizes
from tests.hub.test_int8 import GELU_ERROR
from tests.hub.test_ops import ACTIVATIONS

LIBRARY, WHY_NOT = find_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=WHY_NOT)
KERNELS = {name: CpuInt8(CpuLibrary(name)) for name in instruction_sets()}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # of float32 after exact sums, of one rounding to bfloat16


@pytest.fixture(params=list(KERNELS))
def kernels(request):
    return KERNELS[request.param]


def make_layer(shape, block_shape, density=0.5, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    mask = torch.rand(grid_shape(*shape, block_shape), generator=generator) < density
    scale = torch.rand(shape[0], generator=generator) * 0.01
    layer = Int8Arguments(*pack(weight, mask, block_shape), None, shape[0], "none", None, scale)
    return layer._replace(**changes)


def whole_numbers(tokens, features, seed=0):
    """Inputs that are their own numbers: rounding changes nothing where the largest is 127."""
    x = torch.randint(-127, 128, (tokens, features), generator=torch.Generator().manual_seed(seed)).float()
    x[:, 0] = 127
    return x


@pytest.mark.parametrize("isa", list(KERNELS))
@given(
    shape=st.tuples(sizes, sizes),
    block_shape=st.tuples(block_sides, block_sides),
    tokens=st.integers(0, 61),
    density=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    num_threads=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_sums_are_exact(isa, shape, block_shape, tokens, density, num_threads, seed):
    layer = make_layer(shape, block_shape, density, seed, weight_scale=torch.ones(shape[0]))
    x = whole_numbers(tokens, shape[1], seed)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        (y,) = KERNELS[isa](x, [layer])
    finally:
        torch.set_num_threads(before)
    expected = x.long() @ unpack(PackedWeight(*layer[:3]), *shape).long().t()
    assert torch.equal(y.double(), expected.double())  # below 2^24, so that float32 holds each


@pytest.mark.parametrize("isa", list(KERNELS))
@given(
    shape=st.tuples(sizes, sizes),
    block_shape=st.tuples(block_sides, block_sides),
    tokens=st.integers(1, 61),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_equals_the_reference(isa, shape, block_shape, tokens, dtype, bias, activation, seed):
    torch.manual_seed(seed)
    layer = make_layer(shape, block_shape, seed=seed, activation=activation)
    layer = layer._replace(bias=torch.randn(shape[0]).to(dtype) if bias else None)
    x = (torch.randn(tokens, shape[1]) * 10.0 ** torch.randint(-6, 7, (tokens, 1))).to(dtype)
    (y,), expected = KERNELS[isa](x, [layer]), reference_int8(x, layer)
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    # GELU of numbers below -5 has no digits left in float32: errors are those of what goes into it.
    size = reference_int8(x, layer._replace(activation="none")).double().abs().amax(1, keepdim=True)
    allowed = TOLERANCE[dtype] * (size + 1e-30) + ((GELU_ERROR + 5e-6 * size) if activation == "gelu" else 0)
    assert ((y.double() - expected.double()).abs() <= allowed).all()


def test_every_instruction_set_has_the_same_sums():
    x, layer = torch.randn(30, 200), make_layer((96, 200), (16, 8), weight_scale=torch.ones(96))
    outputs = [kernels(x, [layer])[0] for kernels in KERNELS.values()]
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@pytest.mark.parametrize("block_shape", [(32, 32), (32, 4), (64, 1), (5, 7)], ids=str)
def test_many_features_do_not_overflow(kernels, block_shape):
    """The largest sums of 100,000 products."""
    features = 100_000
    mask = torch.ones(grid_shape(8, features, block_shape), dtype=torch.bool)
    weight = torch.full((8, features), -128, dtype=torch.int8)
    layer = Int8Arguments(*pack(weight, mask, block_shape), None, 8, "none", None, torch.ones(8))
    for sign in (1, -1):
        (y,) = kernels(torch.full((3, features), sign * 127.0), [layer])
        assert (y.double() + sign * 127 * 128 * features).abs().max() <= 64  # float32 has 24 bits


def test_layers_that_read_one_input_are_as_each_by_itself(kernels):
    x = torch.randn(2, 25, 96)
    layers = [make_layer((n, 96), (16, 16), density, seed=n) for n, density in ((32, 1.0), (80, 0.4), (17, 0.0))]
    for y, layer in zip(kernels(x, layers), layers, strict=True):
        assert torch.equal(y, kernels(x, [layer])[0])


def test_any_number_of_threads_gives_the_same_bits(kernels):
    x, layer, before = (
        torch.randn(197, 192),
        make_layer((192, 192), (32, 4), activation="gelu"),
        torch.get_num_threads(),
    )
    outputs = []
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            outputs += kernels(x, [layer])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@pytest.mark.parametrize("view", [lambda x: x[:, ::2], lambda x: x[::3], lambda x: x[:1].expand(7, -1)], ids=range(3))
def test_strided_tensors(kernels, view):
    x, wide = view(torch.randn(13, 160)), torch.rand(192)
    layer = make_layer((96, x.shape[1]), (16, 16), weight_scale=wide[::2], bias=torch.randn(192)[::2])
    torch.testing.assert_close(kernels(x, [layer])[0], reference_int8(x, layer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_that_is_not_finite_has_no_numbers_and_the_others_have_theirs(kernels, value, dtype):
    x, layer = torch.randn(20, 70).to(dtype), make_layer((40, 70), (8, 8))
    (clean,) = kernels(x, [layer])
    x[3, 69] = value
    (y,) = kernels(x, [layer])
    assert y[3].isnan().all()
    assert reference_int8(x, layer)[3].isnan().all()
    others = torch.arange(20) != 3
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-44, 9e-31])
def test_tokens_of_next_to_nothing_count_as_zeros(kernels, value):
    layer = make_layer((40, 64), (8, 8), bias=torch.randn(40))
    assert torch.equal(kernels(torch.full((3, 64), value), [layer])[0], layer.bias.expand(3, -1))


@pytest.mark.parametrize("place", ["crow_indices", "col_indices"])
def test_bad_indices_are_refused(kernels, place):
    layer = make_layer((64, 64), (16, 16))
    indices = getattr(layer, place).clone()
    indices[1] = 99
    with pytest.raises(BlockSparseFormatError, match=place):
        kernels(torch.randn(5, 64), [layer._replace(**{place: indices})])
