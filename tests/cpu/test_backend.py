"""The C++ kernels against dense float64 arithmetic, for every instruction set that this processor has."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_blockprune._cpu.backend import BREAK_EVEN, CpuBackend
from hf_blockprune._cpu.library import CpuLibrary, find_library
from hf_blockprune.errors import BlockSparseFormatError
from hf_blockprune.hub.blockprune_backends import LayerArguments, available_backends, choose_backend
from hf_blockprune.hub.blockprune_layout import pack
from hf_blockprune.hub.blockprune_linear import BlockSparseLinear
from hf_blockprune.hub.blockprune_ops import block_sparse_linear
from tests.hub.test_ops import ACTIVATIONS, MAX_RELATIVE_ERROR, assert_matches, make_case, reference

LIBRARY, WHY_NOT = find_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=WHY_NOT)


def instruction_sets():
    names = []
    for name in ("avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2", "baseline"):
        try:
            names.append(CpuLibrary(name).isa)
        except (OSError, ValueError):
            continue
    return names


BACKENDS = {name: CpuBackend(CpuLibrary(name)) for name in instruction_sets()}


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    return BACKENDS[request.param]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(backend, case, activation="none"):
    return backend.forward(case.x, LayerArguments(*case.packed, case.bias, len(case.dense), activation))


def assert_right(out, case, activation):
    """Within the dtype's error of outputs before or after activation: GELU of -8 is -1e-14, whose digits are few."""
    expected = reference(case, activation)
    assert (out.shape, out.dtype) == (expected.shape, case.x.dtype)
    scale = max(torch.linalg.vector_norm(expected), torch.linalg.vector_norm(reference(case)))
    assert torch.linalg.vector_norm(out.double() - expected) <= MAX_RELATIVE_ERROR[out.dtype] * scale


sizes = st.integers(1, 140)
block_sides = st.one_of(st.integers(1, 70), st.sampled_from([16, 32, 48, 64]))


@pytest.mark.parametrize("isa", list(BACKENDS))
@given(
    shape=st.tuples(sizes, sizes),
    block_shape=st.tuples(block_sides, block_sides),
    tokens=st.integers(0, 61),
    density=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    num_threads=st.integers(1, 5),
    strided=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_equals_the_dense_product(
    isa, shape, block_shape, tokens, density, dtype, bias, activation, num_threads, strided, seed
):
    case = make_case(block_shape, (tokens,), shape=shape, density=density, dtype=dtype, bias=bias, seed=seed)
    if strided:
        weight = case.packed.weight.transpose(1, 2).contiguous().transpose(1, 2)
        case = case._replace(packed=case.packed._replace(weight=weight))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert_right(run(BACKENDS[isa], case, activation), case, activation)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("block_shape", [(64, 32), (16, 16), (64, 1), (8, 8)], ids=str)
@pytest.mark.parametrize(("tokens", "features"), [(500, 3072), (1576, 192)], ids=str)
def test_more_tokens_than_the_working_copy_holds_at_once(backend, block_shape, tokens, features):
    case = make_case(block_shape, (tokens,), shape=(80, features))
    assert_matches(run(backend, case), reference(case), torch.float32)


def test_any_number_of_threads_gives_the_same_bits(backend, threads):
    case = make_case((32, 4), (197,), shape=(192, 192))
    outputs = []
    for count in (1, 2, 3, 16):
        threads(count)
        outputs.append(run(backend, case, "gelu"))
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_calls_from_several_python_threads_do_not_disturb_each_other(backend):
    cases = [make_case((16, 16), (50 + 10 * i,), seed=i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            outputs = list(pool.map(lambda case: run(backend, case), cases))
            for case, out in zip(cases, outputs, strict=True):
                assert_matches(out, reference(case), torch.float32)


@pytest.mark.parametrize("view", [lambda x: x[:, ::2], lambda x: x[::3], lambda x: x[:1].expand(7, -1)], ids=range(3))
def test_strided_inputs(backend, view):
    x = view(torch.randn(13, 160))
    case = make_case((16, 16), shape=(96, x.shape[1]))._replace(x=x)
    assert_matches(run(backend, case), reference(case), torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_value_is_activated_as_torch_does_it(backend, activation):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 1e4])])[:, None]
    weight, crow, col = torch.ones(1, 16, 1), torch.tensor([0, 1]).int(), torch.tensor([0]).int()
    out = backend.forward(x, LayerArguments(weight, crow, col, None, 16, activation))
    expected = reference(make_case((16, 1), shape=(16, 1))._replace(x=x, dense=torch.ones(16, 1).double(), bias=None))
    if activation != "none":
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        expected = nn.functional.gelu(expected, approximate=approximate)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_a_number_stays_where_it_is(backend, dtype, activation):
    case = make_case((16, 16), (9,), dtype=dtype, density=1.0)
    case.x[4, 7] = torch.nan
    out = run(backend, case, activation)
    assert out[4].isnan().all()
    assert not out[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


@pytest.mark.parametrize(
    ("value", "stored"),
    [(1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6), (1 + 2**-8 + 2**-16, 1 + 2**-7), (3e38, 3e38)],
    ids=["tie to even below", "tie to even above", "above the tie", "large"],
)
def test_bfloat16_outputs_round_to_nearest_even(backend, value, stored):
    high = torch.tensor(value).bfloat16()
    low = torch.tensor(value - high.item()).bfloat16()
    x = torch.stack([high, low])[None]
    weight, crow, col = torch.ones(1, 16, 2).bfloat16(), torch.tensor([0, 1]).int(), torch.tensor([0]).int()
    out = backend.forward(x, LayerArguments(weight, crow, col, None, 16))
    assert torch.equal(out, torch.tensor(stored).bfloat16().expand(1, 16))


def broken_indices(generator):
    """Indices of an 8 x 6 grid of blocks that break a rule of the format, one or several."""
    mask = torch.rand(8, 6, generator=generator) < 0.5
    mask[0, :2] = True
    crow = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
    col = mask.nonzero()[:, 1].int()
    weight = torch.ones(len(col), 16, 16)
    kind = int(torch.randint(7, (1,), generator=generator))
    place = int(torch.randint(len(col), (1,), generator=generator))
    wild = int(torch.randint(-(2**31), 2**31 - 1, (1,), generator=generator))
    if kind == 0:
        col[place] = wild if not 0 <= wild < 6 else -1
    elif kind == 1:
        col[1] = col[0]
    elif kind == 2:
        col[:2] = col[:2].flip(0)
    elif kind == 3:
        crow[int(torch.randint(len(crow), (1,), generator=generator))] = wild
    elif kind == 4:
        crow = crow[:-1]
    elif kind == 5:
        weight = weight[:-1]
    else:
        crow, col = crow.long(), col.long()
    return weight, crow, col


def test_ten_thousand_malformed_index_sets_are_refused_before_the_kernel():
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(2, 96)
    for _ in range(10_000):
        weight, crow, col = broken_indices(generator)
        with pytest.raises(BlockSparseFormatError, match="block_sparse_linear"):
            block_sparse_linear(x, weight, crow, col, out_features=128, backend="cpu")


@pytest.mark.parametrize("bias", [torch.zeros(95), torch.zeros(97), torch.zeros(96).double()], ids=str)
def test_a_bias_that_does_not_fit_is_refused(backend, bias):
    with pytest.raises(ValueError, match=r"bias: expected torch.float32 \[96\]"):
        run(backend, make_case((16, 16))._replace(bias=bias))


def layer_of(density, block_shape=(16, 16), dtype=torch.float32):
    torch.manual_seed(0)
    grid = -(-96 // block_shape[0]), -(-128 // block_shape[1])
    mask = (torch.randperm(grid[0] * grid[1]) < density * grid[0] * grid[1]).view(grid)
    return BlockSparseLinear.from_dense(nn.Linear(128, 96).to(dtype), mask, block_shape)


def chosen(layer, x):
    return choose_backend(x, layer.arguments())


@pytest.mark.parametrize(
    ("density", "block_shape", "wanted"),
    [(0.5, (16, 16), "cpu"), (1.0, (16, 16), "cpu"), (1.0, (64, 100), "dense"), (0.5, (8, 1), "cpu")],
    ids=str,
)
def test_auto_takes_the_kernels_where_they_pay(density, block_shape, wanted, monkeypatch):
    monkeypatch.delenv("BLOCKPRUNE_BACKEND", raising=False)
    assert available_backends()[0] == "cpu"
    assert chosen(layer_of(density, block_shape), torch.ones(4, 128)) == wanted


def test_bfloat16_needs_fewer_blocks_where_torch_has_instructions_for_it(monkeypatch):
    monkeypatch.delenv("BLOCKPRUNE_BACKEND", raising=False)
    x = torch.ones(4, 128).bfloat16()
    for density in (0.05, 0.5, 0.9):
        wanted = "cpu" if density <= BREAK_EVEN[torch.bfloat16] else "dense"
        assert chosen(layer_of(density, dtype=torch.bfloat16), x) == wanted


@pytest.mark.skipif(BREAK_EVEN[torch.bfloat16] != 0.7, reason="no kernels with instructions for bfloat16 here")
@pytest.mark.parametrize(("cols", "density", "wanted"), [(1, 0.1, "cpu"), (1, 0.5, "dense"), (2, 0.5, "cpu")])
def test_odd_blocks_make_no_pairs(cols, density, wanted, monkeypatch):
    monkeypatch.delenv("BLOCKPRUNE_BACKEND", raising=False)
    layer = layer_of(density, (64, cols), dtype=torch.bfloat16)
    assert chosen(layer, torch.ones(197, 128).bfloat16()) == wanted


def test_double_precision_is_left_to_others(monkeypatch):
    monkeypatch.delenv("BLOCKPRUNE_BACKEND", raising=False)
    assert chosen(layer_of(0.5, dtype=torch.float64), torch.ones(4, 128).double()) == "dense"


def test_indices_that_become_wrong_unnoticed_are_refused(backend):
    case = make_case((16, 16))
    run(backend, case)
    case.packed.col_indices.data.fill_(2**31 - 1)
    with pytest.raises(BlockSparseFormatError, match="col_indices"):
        run(backend, case)
    with pytest.raises(BlockSparseFormatError, match="col_indices"):
        backend.unpack(case.x.shape[1], LayerArguments(*case.packed, case.bias, len(case.dense)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block_shape", [(16, 16), (8, 8), (12, 20), (1, 1), (32, 64)], ids=str)
def test_unpacks_into_the_dense_matrix(backend, block_shape, dtype, threads):
    threads(2)
    case = make_case(block_shape, shape=(300, 290), dtype=dtype)
    dense = backend.unpack(290, LayerArguments(*case.packed, case.bias, 300))
    assert dense.dtype == dtype
    assert torch.equal(dense.double(), case.dense)


def test_copied_and_converted_layers_run(backend):
    layer, x = layer_of(0.5), torch.randn(5, 128)
    other = copy.deepcopy(layer).to(torch.bfloat16)
    with torch.no_grad():
        expected = layer.to_dense()(x).double()
        out = backend.forward(x.bfloat16(), other.arguments())
        assert_matches(out, expected, torch.bfloat16)


def test_outputs_of_several_block_rows_multiply_with_what_any_row_keeps(backend):
    case = make_case((64, 32), shape=(128, 64), density=1.0)
    assert backend.work(64, LayerArguments(*case.packed, None, 128)) == 128 * 64
    mask = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    packed = pack(torch.ones(32, 16), mask, (8, 4))  # outputs 0 to 15 keep two block columns, and so do 16 to 31
    assert backend.work(16, LayerArguments(*packed, None, 32)) == 2 * 16 * 2 * 4


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="BLOCKPRUNE_CPU_ISA: 'abacus'"):
        CpuLibrary("abacus")


@pytest.mark.parametrize("block_shape", [(16, 16), (64, 1), (8, 8)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 197])
def test_several_layers_in_one_call(backend, block_shape, tokens):
    cases = [make_case(block_shape, (tokens,), shape=(out, 80), bias=bias) for out, bias in [(96, 1), (33, 0), (1, 1)]]
    arguments = [
        LayerArguments(*case.packed, case.bias, len(case.dense), activation)
        for case, activation in zip(cases, ACTIVATIONS, strict=True)
    ]
    outputs = backend.forward_all(cases[0].x, arguments)
    for case, activation, out in zip(cases, ACTIVATIONS, outputs, strict=True):
        assert_right(out, case._replace(x=cases[0].x), activation)
