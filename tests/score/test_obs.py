"""Block Optimal Brain Surgeon against least squares solved from scratch after every removal, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_blockprune.score import obs
from hf_blockprune.score import statistics as layer_statistics
from hf_blockprune.score.blocks import grid_shape
from hf_blockprune.score.methods import TraceSettings, find_method
from hf_blockprune.score.obs import obs_trace
from hf_blockprune.score.statistics import LayerStatistics

TINY = 1e-12  # damping that changes no digit that is compared


def random_tensor(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance_of(seed, size, samples):
    """Of correlated inputs; singular where there are fewer samples than inputs."""
    x = random_tensor(seed, samples, size) @ random_tensor(seed + 1, size, size)
    x = x - x.mean(0)
    return x.t() @ x / samples


def damped(covariance, damping):
    """H: the covariance, the damping relative to each entry, and a floor far below the mean entry."""
    diagonal = covariance.diagonal()
    floor = 1e-10 * diagonal.mean() if diagonal.mean() > 0 else torch.ones(())
    return covariance + torch.diag(damping * diagonal + floor)


def least_error(weight, importance, h, gone):
    """min over V with V zero in the columns `gone` of sum_r f_r (W - V)_r H (W - V)_r^T."""
    root = torch.linalg.cholesky(h).t()  # |root d|^2 = d^T H d
    target, survivors = root @ weight.t(), root[:, ~gone]
    fitted = torch.linalg.lstsq(survivors, target, driver="gelsd").solution if (~gone).any() else target[:0]
    return float((importance * (target - survivors @ fitted).square().sum(0)).sum())


def check_against_brute_force(trace, weight, importance, h, block_shape, relative=1e-7):
    """The order is greedy and the loss is the error of the best refit, after every step of every block row."""
    rows, cols = block_shape
    block_rows, block_cols = trace.grid
    assert trace.grid == grid_shape(tuple(weight.shape), block_shape)
    assert trace.order.shape == (block_rows, block_cols)
    assert trace.loss.shape == (block_rows, block_cols + 1)
    column_block = torch.arange(weight.shape[1]) // cols
    for row in range(block_rows):
        w, f = weight[row * rows : (row + 1) * rows], importance[row * rows : (row + 1) * rows]
        order = (trace.order[row] - row * block_cols).tolist()
        assert sorted(order) == list(range(block_cols))
        scale = float((f * ((w @ h) * w).sum(1)).sum())
        assert trace.loss[row, 0] == 0
        for step in range(block_cols):
            left = [b for b in range(block_cols) if b not in order[:step]]
            errors = {b: least_error(w, f, h, torch.isin(column_block, torch.tensor([*order[:step], b]))) for b in left}
            assert errors[order[step]] <= min(errors.values()) + relative * scale
            assert float(trace.loss[row, step + 1]) == pytest.approx(
                errors[order[step]], rel=relative, abs=relative * scale
            )
    assert (trace.loss.diff(dim=1) >= 0).all()


@pytest.mark.parametrize(
    ("shape", "block_shape"),
    [
        ((4, 6), (2, 2)),
        ((6, 8), (3, 1)),
        ((5, 7), (2, 3)),  # edge blocks on both sides
        ((8, 6), (4, 1)),  # tall
        ((9, 5), (4, 1)),  # tall, with an edge
        ((3, 9), (1, 4)),
        ((4, 5), (4, 5)),  # one block
        ((2, 3), (5, 7)),  # a block larger than the matrix
        ((6, 12), (1, 1)),
    ],
)
@pytest.mark.parametrize("seed", [0, 10])
def test_loss_is_the_exact_least_squares_error(shape, block_shape, seed):
    weight, covariance = random_tensor(seed, *shape), covariance_of(seed + 1, shape[1], 60)
    ones = torch.ones(shape[0], dtype=torch.float64)
    trace = obs_trace(weight, covariance, ones, block_shape, damping=TINY)
    check_against_brute_force(trace, weight, ones, damped(covariance, TINY), block_shape)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 7)),
    block_shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    damping=st.sampled_from([TINY, 1e-2, 1.0]),
    seed=st.integers(0, 1000),
)
def test_with_any_shape_damping_and_importance(shape, block_shape, damping, seed):
    weight, covariance = random_tensor(seed, *shape), covariance_of(seed + 1, shape[1], 40)
    importance = random_tensor(seed + 2, shape[0]).square()
    trace = obs_trace(weight, covariance, importance, block_shape, damping=damping)
    check_against_brute_force(trace, weight, importance, damped(covariance, damping), block_shape)


@pytest.mark.parametrize("samples", [2, 5])
def test_fewer_samples_than_inputs(samples):
    weight, covariance = random_tensor(0, 4, 10), covariance_of(1, 10, samples)
    assert torch.linalg.matrix_rank(covariance) < 10
    ones = torch.ones(4, dtype=torch.float64)
    trace = obs_trace(weight, covariance, ones, (2, 3), damping=1e-2)
    check_against_brute_force(trace, weight, ones, damped(covariance, 1e-2), (2, 3))


def test_inputs_that_never_vary_go_first_and_cost_nothing():
    weight, covariance = random_tensor(0, 4, 8), covariance_of(1, 8, 50)
    covariance[2:4], covariance[:, 2:4] = 0, 0
    ones = torch.ones(4, dtype=torch.float64)
    trace = obs_trace(weight, covariance, ones, (2, 2), damping=1e-2)
    assert trace.order[:, 0].tolist() == [1, 5]
    assert float(trace.loss[:, 1].max()) < 1e-8 * float(trace.loss[:, -1].min())
    check_against_brute_force(trace, weight, ones, damped(covariance, 1e-2), (2, 2))


def test_inputs_none_of_which_varies():
    weight, ones = random_tensor(0, 4, 6), torch.ones(4, dtype=torch.float64)
    trace = obs_trace(weight, torch.zeros(6, 6, dtype=torch.float64), ones, (2, 2))
    check_against_brute_force(trace, weight, ones, torch.eye(6, dtype=torch.float64), (2, 2))


def test_loss_is_linear_in_the_importance_of_outputs():
    weight, covariance = random_tensor(0, 6, 8), covariance_of(1, 8, 50)
    importance = random_tensor(2, 6).square()
    one, thrice = (obs_trace(weight, covariance, f, (2, 2)) for f in (importance, 3 * importance))
    assert torch.equal(one.order, thrice.order)
    torch.testing.assert_close(thrice.loss, 3 * one.loss, rtol=1e-12, atol=0)


def test_outputs_without_importance_decide_nothing():
    weight, covariance = random_tensor(0, 4, 8), covariance_of(1, 8, 50)
    importance = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    other = weight.clone()
    other[1::2] = 5 * random_tensor(3, 2, 8)
    one, two = (obs_trace(w, covariance, importance, (2, 2)) for w in (weight, other))
    assert torch.equal(one.order, two.order)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-10, atol=1e-12)


def test_repeated_inputs_take_each_other_over():
    """One of two equal inputs is free to remove, both together are not: magnitudes alone could not tell."""
    x = random_tensor(0, 200, 3)
    x = torch.stack([x[:, 0], x[:, 1], x[:, 0], x[:, 2]], dim=1)
    x = x - x.mean(0)
    weight = torch.tensor([[5.0, 0.1, 5.0, 1.0]], dtype=torch.float64)
    ones = torch.ones(1, dtype=torch.float64)
    trace = obs_trace(weight, x.t() @ x / 200, ones, (1, 1), damping=1e-8)
    assert int(trace.order[0, 0]) in (0, 2)
    assert float(trace.loss[0, 1]) < 1e-4
    assert int(trace.order[0, -1]) in (0, 2)
    assert float(trace.loss[0, -1]) > 50


@pytest.mark.parametrize("memory_bytes", [1, 3 * 2 * 9 * 9 * 8])
def test_little_memory_changes_nothing(memory_bytes):
    weight, covariance = random_tensor(0, 11, 8), covariance_of(1, 8, 50)
    importance = random_tensor(2, 11).square()
    whole = obs_trace(weight, covariance, importance, (2, 3))
    parts = obs_trace(weight, covariance, importance, (2, 3), memory_bytes=memory_bytes)
    assert torch.equal(parts.order, whole.order)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-10, atol=1e-12)


def ill_conditioned(inputs):
    """Covariance of inputs that are nearly copies of each other and differ a thousandfold in size."""
    common = random_tensor(3, 400, 1)
    x = (common + 0.03 * random_tensor(4, 400, inputs)) * torch.logspace(-1.5, 1.5, inputs, dtype=torch.float64)
    x = x - x.mean(0)
    return x.t() @ x / len(x)


def test_single_precision_with_refresh_follows_double_precision(monkeypatch):
    weight, covariance, ones = random_tensor(0, 8, 256), ill_conditioned(256), torch.ones(8, dtype=torch.float64)
    exact = obs_trace(weight, covariance, ones, (8, 1), damping=1e-4)

    def worst():
        rounded = obs_trace(weight, covariance, ones, (8, 1), damping=1e-4, dtype=torch.float32)
        return float(((rounded.loss - exact.loss).abs() / exact.loss.clamp(min=1e-30))[:, 1:].max())

    with_refresh = worst()
    assert with_refresh < 1e-3
    monkeypatch.setattr(obs, "REFRESH", 10**9)
    assert worst() > 4 * with_refresh


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_chunks_are_halved_until_they_fit(monkeypatch, error):
    weight, covariance, ones = random_tensor(0, 11, 8), covariance_of(1, 8, 50), torch.ones(11, dtype=torch.float64)
    whole = obs_trace(weight, covariance, ones, (1, 2))
    sizes, eliminate = [], obs._eliminate

    def small_machine(w, *args):
        sizes.append(len(w))
        if len(w) > 3:
            w.zero_()  # what was begun is lost
            raise error
        return eliminate(w, *args)

    monkeypatch.setattr(obs, "_eliminate", small_machine)
    parts = obs_trace(weight, covariance, ones, (1, 2))
    assert sizes == [11, 5, 2, 2, 2, 2, 2, 1]
    assert torch.equal(parts.order, whole.order)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("error", [RuntimeError("something else"), MemoryError()])
def test_what_smaller_chunks_cannot_mend_is_raised(monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(obs, "_eliminate", fails)
    with pytest.raises(type(error)):
        obs_trace(random_tensor(0, 4, 8), covariance_of(1, 8, 50), torch.ones(4).double(), (2, 2))


def test_inputs_that_are_all_zero_cost_nothing_to_lose():
    weight, ones = random_tensor(0, 4, 6), torch.ones(4, dtype=torch.float64)
    trace = obs_trace(weight, torch.zeros(6, 6, dtype=torch.float64), ones, (2, 2))
    assert sorted(trace.order[0].tolist()) == [0, 1, 2]
    assert trace.loss.isfinite().all()
    varying = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64))
    trace = obs_trace(weight, varying, ones, (2, 2))
    assert trace.order[:, 0].tolist() == [1, 4]
    assert float(trace.loss[:, 1].max()) < 1e-8


def test_arguments_are_left_as_they_were():
    weight, covariance, importance = random_tensor(0, 4, 6), covariance_of(1, 6, 50), random_tensor(2, 4).square()
    before = [t.clone() for t in (weight, covariance, importance)]
    obs_trace(weight, covariance, importance, (2, 2))
    assert all(torch.equal(a, b) for a, b in zip((weight, covariance, importance), before, strict=True))


def test_low_precision_weights_are_worked_on_in_float64():
    weight, covariance = random_tensor(0, 6, 8).bfloat16(), covariance_of(1, 8, 50)
    ones = torch.ones(6, dtype=torch.float64)
    low, high = (obs_trace(w, covariance, ones, (2, 2)) for w in (weight, weight.double()))
    assert low.loss.dtype == torch.float64
    assert torch.equal(low.order, high.order)
    torch.testing.assert_close(low.loss, high.loss, rtol=0, atol=0)


def test_the_methods_trace_is_in_units_of_one_image(monkeypatch):
    """Half the weighted squared change of the outputs, the mean taken out, summed over an image's tokens."""
    monkeypatch.setattr(layer_statistics, "ROUNDING", 0.0)  # these moments are exact
    images, tokens = 6, 5
    x = random_tensor(0, images * tokens, 7) @ random_tensor(1, 7, 7) + 3
    weight, importance = random_tensor(2, 4, 7), random_tensor(3, 4).square()
    statistics = LayerStatistics(
        mean=x.mean(0),
        second_moment=x.t() @ x / len(x),
        output_weight=importance,
        num_tokens=images * tokens,
        num_images=images,
    )
    trace = find_method("obs").trace(weight, statistics, (2, 2), TraceSettings(damping=1e-10))
    centred = x - x.mean(0)
    total = (centred @ weight.t()).square() * importance / 2 / images  # all weights gone
    torch.testing.assert_close(trace.loss[:, -1], total.sum(0).view(2, 2).sum(1), rtol=1e-6, atol=0)
    for row in range(2):
        w, f = weight[2 * row : 2 * row + 2], importance[2 * row : 2 * row + 2]
        for step in range(1, 4):
            removed = trace.order[row, :step] - row * 4
            keep = ~torch.isin(torch.arange(7) // 2, removed)
            y = centred @ w.t()
            fitted = torch.linalg.lstsq(centred[:, keep], y).solution
            error = float(((y - centred[:, keep] @ fitted).square().sum(0) * f).sum()) / 2 / images
            assert float(trace.loss[row, step]) == pytest.approx(error, rel=1e-5)


def test_the_methods_trace_passes_the_damping_on(monkeypatch):
    monkeypatch.setattr(layer_statistics, "ROUNDING", 0.0)
    weight, covariance = random_tensor(0, 4, 6), covariance_of(1, 6, 50)
    statistics = LayerStatistics(
        mean=torch.zeros(6, dtype=torch.float64),
        second_moment=covariance,
        output_weight=torch.ones(4, dtype=torch.float64),
        num_tokens=2,
        num_images=1,
    )
    trace = find_method("obs").trace(weight, statistics, (2, 2), TraceSettings(damping=0.5))
    check_against_brute_force(trace, weight, torch.ones(4, dtype=torch.float64), damped(covariance, 0.5), (2, 2))


FULL = {"mean": torch.zeros(4), "second_moment": torch.eye(4), "output_weight": torch.ones(4)}


@pytest.mark.parametrize("missing", [None, "mean", "second_moment", "output_weight"])
def test_obs_without_fisher_statistics_is_refused(missing):
    statistics = missing and LayerStatistics(**{**FULL, missing: None}, num_tokens=1, num_images=1)
    with pytest.raises(ValueError, match="'obs' needs Fisher statistics; collect them with fisher=True"):
        find_method("obs").trace(torch.ones(4, 4), statistics, (2, 2), TraceSettings())
