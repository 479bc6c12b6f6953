"""Removal traces against definitions spelled out in float64."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_blockprune.score.blocks import expand_mask, grid_shape
from hf_blockprune.score.magnitude import magnitude_trace
from hf_blockprune.score.methods import METHODS, TraceSettings, find_method
from hf_blockprune.score.taylor import taylor_trace

SIZES = st.integers(1, 7)
SHAPES = st.tuples(SIZES, SIZES)


def random_tensor(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def blocks_of(matrix, block_shape):
    """The blocks of a matrix, in flat order; edge blocks are smaller."""
    return [
        matrix[i : i + block_shape[0], j : j + block_shape[1]]
        for i in range(0, matrix.shape[0], block_shape[0])
        for j in range(0, matrix.shape[1], block_shape[1])
    ]


def block_products(gradients, weight, block_shape):
    """<g_n, W> over each block, by loops: [samples, block_rows, block_cols]."""
    rows = [[float(block.sum()) for block in blocks_of(g * weight, block_shape)] for g in gradients]
    return torch.tensor(rows, dtype=torch.float64).view(-1, *grid_shape(tuple(weight.shape), block_shape))


def delta_after(weight, removed, block_shape):
    """W_pruned - W."""
    grid = grid_shape(tuple(weight.shape), block_shape)
    gone = torch.zeros(grid, dtype=torch.bool)
    gone.view(-1)[removed] = True
    return -weight * expand_mask(gone, tuple(weight.shape), block_shape)


def true_distortions(weight, gradients, order, block_shape):
    """The quadratic after 0, 1, ... removals, with the Fisher of all weights formed in full."""
    rows = gradients.flatten(1)
    fisher = rows.t() @ rows / len(rows)
    mean = rows.mean(0)
    deltas = [delta_after(weight, order[:k], block_shape).flatten() for k in range(len(order) + 1)]
    return torch.stack([(mean @ d) ** 2 + (d @ fisher @ d) / 2 for d in deltas])


@settings(deadline=None, max_examples=50)
@given(shape=SHAPES, block_shape=SHAPES, seed=st.integers(0, 1000))
def test_magnitude_against_loops(shape, block_shape, seed):
    weight = random_tensor(seed, *shape)
    scores = [float(block.abs().sum()) / block.numel() for block in blocks_of(weight, block_shape)]
    trace = magnitude_trace(weight, block_shape)
    assert trace.grid == grid_shape(shape, block_shape)
    assert sorted(trace.order[0].tolist()) == list(range(len(scores)))
    by_order = torch.tensor([scores[i] for i in trace.order[0]], dtype=torch.float64)
    torch.testing.assert_close(by_order, torch.tensor(sorted(scores), dtype=torch.float64), rtol=1e-12, atol=0)
    running = torch.tensor([sum(sorted(scores)[:k]) for k in range(len(scores) + 1)], dtype=torch.float64)
    torch.testing.assert_close(trace.loss[0], running, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(shape=SHAPES, block_shape=SHAPES, samples=st.integers(1, 5), seed=st.integers(0, 1000))
def test_taylor_against_the_full_fisher(shape, block_shape, samples, seed):
    weight, gradients = random_tensor(seed, *shape), random_tensor(seed + 1, samples, *shape)
    mean = gradients.mean(0)
    trace = taylor_trace(weight, mean, block_products(gradients, weight, block_shape), block_shape)
    scores = torch.tensor([float(b.abs().sum()) for b in blocks_of(weight * mean, block_shape)], dtype=torch.float64)
    assert trace.grid == grid_shape(shape, block_shape)
    assert sorted(trace.order[0].tolist()) == list(range(len(scores)))
    torch.testing.assert_close(scores[trace.order[0]], scores.sort().values, rtol=1e-12, atol=0)
    expected = true_distortions(weight, gradients, trace.order[0].tolist(), block_shape).cummax(0).values
    torch.testing.assert_close(trace.loss[0], expected, rtol=1e-9, atol=1e-12)


def test_taylor_with_more_samples_than_are_taken_at_once():
    weight, gradients = random_tensor(0, 6, 5), random_tensor(1, 150, 6, 5)
    trace = taylor_trace(weight, gradients.mean(0), block_products(gradients, weight, (2, 2)), (2, 2))
    expected = true_distortions(weight, gradients, trace.order[0].tolist(), (2, 2)).cummax(0).values
    torch.testing.assert_close(trace.loss[0], expected, rtol=1e-9, atol=1e-12)


def test_taylor_curve_does_not_fall_where_the_quadratic_does():
    """Removing both blocks cancels the gradient, g . delta = 0, yet is not free."""
    weight = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    gradients = torch.tensor([[[1.0, -1.5]], [[1.0, -1.5]]], dtype=torch.float64)
    quadratic = true_distortions(weight, gradients, [0, 1], (1, 1))
    assert quadratic[2] < quadratic[1]
    loss = taylor_trace(weight, gradients.mean(0), block_products(gradients, weight, (1, 1)), (1, 1)).loss[0]
    torch.testing.assert_close(loss, torch.tensor([0, 1.5, 1.5], dtype=torch.float64))


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
@settings(deadline=None, max_examples=30)
@given(shape=SHAPES, block_shape=SHAPES, seed=st.integers(0, 1000))
def test_loss_starts_at_nothing_and_never_decreases(method, shape, block_shape, seed):
    weight, gradients = random_tensor(seed, *shape), random_tensor(seed + 1, 3, *shape)
    statistics = SimpleNamespace(
        gradient=gradients.mean(0), block_gradients=block_products(gradients, weight, block_shape).float()
    )
    trace = find_method(method).trace(weight.float(), statistics, block_shape, TraceSettings())
    assert trace.loss.dtype == torch.float64
    assert trace.loss.shape == (1, trace.order.shape[1] + 1)
    assert trace.loss[0, 0] == 0
    assert (trace.loss.diff(dim=1) >= 0).all()


def test_equal_scores_leave_in_index_order():
    assert magnitude_trace(torch.ones(4, 6), (2, 2)).order[0].tolist() == list(range(6))


def test_low_precision_weights_are_summed_in_float64():
    weight = random_tensor(0, 64, 64).to(torch.bfloat16)
    torch.testing.assert_close(
        magnitude_trace(weight, (8, 8)).loss, magnitude_trace(weight.double(), (8, 8)).loss, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "statistics",
    [
        None,
        SimpleNamespace(gradient=None, block_gradients=None),
        SimpleNamespace(gradient=torch.ones(4, 4), block_gradients=None),
        SimpleNamespace(gradient=None, block_gradients=torch.ones(1, 2, 2)),
    ],
)
def test_taylor_without_gradients_is_refused(statistics):
    with pytest.raises(ValueError, match="'taylor' needs gradient statistics; collect them with gradients=True"):
        find_method("taylor").trace(torch.ones(4, 4), statistics, (2, 2), TraceSettings())


def test_magnitude_needs_no_statistics():
    assert find_method("magnitude").trace(torch.ones(4, 4), None, (2, 2), TraceSettings()).order.shape == (1, 4)


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown method 'guess'"):
        find_method("guess").trace(torch.ones(4, 4), None, (2, 2), TraceSettings())


def test_methods_are_found_by_their_names():
    assert [find_method(name).name for name in METHODS] == list(METHODS)
