"""Systolic arrays: reference counts, closed forms against arrays that work cycle by cycle, schedules."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_blockprune.cost.systolic import Array, block_sparse_cycles, dense_cycles, simulate
from hf_blockprune.hub.blockprune_systolic import Fold, makespan

# M, K, N, rows, cols and the cycles that SCALE-Sim 3.0.0 counts; the last two stand for one row or column of blocks.
REFERENCE = [
    ((197, 768, 3072, 32, 32), {"ws": 670463, "os": 557759, "is": 531887}),
    ((197, 768, 768, 16, 16), {"ws": 559871, "os": 497951}),
    ((197, 768, 2304, 64, 64), {"ws": 167183, "os": 128735}),
    ((197, 3072, 768, 32, 32), {"ws": 670463}),
    ((100, 70, 50, 32, 32), {"ws": 1163, "os": 1055, "is": 1727}),
    ((37, 45, 29, 8, 16), {"ws": 803, "os": 669, "is": 1061}),
    ((197, 32, 160, 32, 32), {"ws": 1454}),
    ((197, 352, 32, 32, 32), {"os": 2897}),
]
COUNTS = [(*sizes, flow, cycles) for sizes, flows in REFERENCE for flow, cycles in flows.items()]


@pytest.mark.parametrize(("m", "k", "n", "rows", "cols", "dataflow", "cycles"), COUNTS)
def test_dense_counts_are_those_of_scale_sim(m, k, n, rows, cols, dataflow, cycles):
    assert dense_cycles(m, k, n, rows=rows, cols=cols, dataflow=dataflow) == cycles
    full = np.ones((-(-n // cols), -(-k // rows)), dtype=bool)
    options = {"rows": rows, "cols": cols, "dataflow": dataflow, "shape": (n, k)}
    assert block_sparse_cycles(m, full, **options) == cycles


def test_blocks_of_the_arrays_size():
    five = np.zeros((5, 1), dtype=bool)
    five[:] = True
    assert block_sparse_cycles(197, five, rows=32, cols=32, dataflow="ws") == 1454
    eleven = np.zeros((4, 24), dtype=bool)
    eleven[2, ::2][:11] = True
    assert block_sparse_cycles(197, eleven, rows=32, cols=32, dataflow="os") == 2897


PROBLEM = st.tuples(st.integers(1, 20), st.integers(1, 24), st.integers(1, 24))
ARRAY = st.tuples(st.integers(1, 7), st.integers(1, 7))


@settings(max_examples=200, deadline=None)
@given(PROBLEM, ARRAY, st.sampled_from(["ws", "os", "is"]), st.booleans(), st.integers(1, 3), st.integers(0, 1 << 30))
def test_simulated_products_and_cycles_equal_the_closed_forms(problem, sizes, dataflow, overlap, arrays, seed):
    m, k, n = problem
    array = Array(*sizes, dataflow=dataflow, overlap=overlap, arrays=arrays)
    random = np.random.default_rng(seed)
    x, weight = random.normal(size=(m, k)), random.normal(size=(n, k))
    run = simulate(x, weight, array)
    np.testing.assert_allclose(run.y, x @ weight.T, atol=1e-9)
    rows, cols = sizes
    options = {"rows": rows, "cols": cols, "dataflow": dataflow, "overlap": overlap, "arrays": arrays}
    assert run.cycles == dense_cycles(m, k, n, **options)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 20),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    ARRAY,
    st.sampled_from(["ws", "os", "is"]),
    st.booleans(),
    st.integers(1, 3),
    st.floats(0, 1),
    st.integers(0, 1 << 30),
)
def test_simulated_masks_equal_the_closed_forms(m, grid, block_shape, sizes, dataflow, overlap, arrays, density, seed):
    array = Array(*sizes, dataflow=dataflow, overlap=overlap, arrays=arrays)
    random = np.random.default_rng(seed)
    mask = random.random(grid) < density
    n, k = grid[0] * block_shape[0], grid[1] * block_shape[1]
    kept = mask.repeat(block_shape[0], 0).repeat(block_shape[1], 1)
    x, weight = random.normal(size=(m, k)), random.normal(size=(n, k)) * kept
    run = simulate(x, weight, array, kept)
    np.testing.assert_allclose(run.y, x @ weight.T, atol=1e-9)
    rows, cols = sizes
    options = {"rows": rows, "cols": cols, "dataflow": dataflow, "overlap": overlap, "arrays": arrays}
    assert run.cycles == block_sparse_cycles(m, mask, block_shape=block_shape, **options)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 3))
def test_the_schedule_is_at_most_a_third_longer_than_the_best_one(lengths, arrays):
    work = [Fold(length, length, length) for length in lengths]
    best = min(
        max(sum(length for length, place in zip(lengths, places, strict=True) if place == a) for a in range(arrays))
        for places in itertools.product(range(arrays), repeat=len(lengths))
    )
    found = makespan(work, arrays=arrays) + 1
    assert best <= found <= (4 / 3) * best + 1e-9  # Graham's bound for longest-first schedules


@pytest.mark.parametrize("dataflow", ["ws", "os", "is"])
def test_cycles_grow_with_kept_blocks_and_shrink_with_arrays_and_overlap(dataflow):
    random = np.random.default_rng(0)
    order = random.permutation(24 * 24)
    options = {"rows": 32, "cols": 32, "dataflow": dataflow}
    last = -1
    for kept in range(0, 24 * 24 + 1, 48):
        mask = np.zeros(24 * 24, dtype=bool)
        mask[order[:kept]] = True
        mask = mask.reshape(24, 24)
        cycles = block_sparse_cycles(197, mask, **options)
        assert cycles >= last
        assert block_sparse_cycles(197, mask, overlap=True, **options) <= cycles
        assert block_sparse_cycles(197, mask, arrays=4, **options) <= cycles
        last = cycles
    assert last == dense_cycles(197, 768, 768, **options)


def test_traffic_and_energy_of_a_dense_product():
    array = Array(4, 4, dataflow="os")
    random = np.random.default_rng(0)
    run = simulate(random.normal(size=(8, 12)), random.normal(size=(8, 12)), array)
    assert run.macs == 8 * 12 * 8
    # Two by two tiles of outputs; each reads 12 features of 4 tokens and of 4 outputs, and writes 16 sums.
    assert run.sram_reads == 4 * 12 * (4 + 4)
    assert run.sram_writes == 4 * 16
    assert run.dram_elements == 8 * 12 + 8 * 12 + 8 * 8


@pytest.mark.parametrize(
    "call", [lambda: dense_cycles(1, 1, 1, rows=1, cols=1, dataflow="rs"), lambda: Array(4, 4, "rs")]
)
def test_unknown_dataflows_are_refused(call):
    with pytest.raises(ValueError, match=r"'rs'.*'ws'"):
        call()


@pytest.mark.parametrize("change", [{"rows": 0}, {"cols": -1}, {"arrays": 0}])
def test_impossible_arrays_are_refused(change):
    with pytest.raises(ValueError, match="at least 1"):
        Array(**{"rows": 4, "cols": 4, "dataflow": "ws", **change})
