"""Input features that leave: against least squares, in float64."""

import pytest
import torch

from hf_blockprune.score.obs import damped, obs_trace
from hf_blockprune.score.shrink import Columns, column_trace, importance
from hf_blockprune.score.statistics import LayerStatistics

DAMPING = 1e-2


def made(outputs=5, inputs=12, seed=0):
    """(weight, statistics) of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(400, inputs, generator=generator, dtype=torch.float64) @ mix + 1.5
    f = torch.rand(outputs, generator=generator, dtype=torch.float64) + 0.1
    s = LayerStatistics(400, 4, mean=x.mean(0), second_moment=x.t() @ x / 400, output_weight=f)
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), s


def least_squares(weight, s, gone):
    """(weights, quadratic loss) of the best solution without some inputs, under the damped covariance."""
    hessian = damped(s.safe_covariance, DAMPING)
    left = [i for i in range(weight.shape[1]) if i not in gone.tolist()]
    solved = torch.zeros_like(weight)
    if left:
        solved[:, left] = weight @ hessian[:, left] @ torch.linalg.inv(hessian[left][:, left])
    change = solved - weight
    return solved, float((importance(s)[:, None] * (change @ hessian) * change).sum())


@pytest.mark.parametrize("gone", [[3], [0, 4, 5, 11], list(range(11)), list(range(12))])
def test_loss_and_weights_are_those_of_least_squares(gone):
    weight, s = made()
    columns, gone = Columns(weight, s, DAMPING), torch.tensor(gone)
    wanted, loss = least_squares(weight, s, gone)
    have, bias = columns.without(gone)
    torch.testing.assert_close(have, wanted, rtol=1e-7, atol=1e-9)
    assert columns.loss(gone) == pytest.approx(loss, rel=1e-7)
    torch.testing.assert_close(bias, (weight - wanted) @ s.mean, rtol=1e-6, atol=1e-8)


def test_nothing_gone_is_nothing_lost():
    weight, s = made()
    columns, none = Columns(weight, s, DAMPING), torch.zeros(0, dtype=torch.int64)
    have, bias = columns.without(none)
    assert columns.loss(none) == 0.0
    assert torch.equal(have, weight)
    assert not bias.any()


def test_the_trace_of_columns_says_the_same():
    """Columns in the order of a trace with blocks as high as the matrix."""
    weight, s = made()
    trace = obs_trace(weight, s.safe_covariance, importance(s), (len(weight), 1), damping=DAMPING)
    columns = Columns(weight, s, DAMPING)
    for count in range(1, 12):
        assert float(trace.loss[0, count]) == pytest.approx(columns.loss(trace.order[0, :count]), rel=1e-7)


@pytest.mark.parametrize("step", [1, 4])
def test_column_traces_add_up_to_the_loss_of_all_that_are_gone(step):
    weight, s = made()
    trace, columns = column_trace(weight, s, DAMPING, step), Columns(weight, s, DAMPING)
    assert trace.order.shape == (1, 12 // step, step)
    assert sorted(trace.order.flatten().tolist()) == list(range(12))
    for count in range(1, 12 // step):
        gone = trace.order[0, :count].flatten()
        assert float(trace.loss[0, count]) == pytest.approx(columns.loss(gone), rel=1e-7)


def test_one_by_one_it_is_the_greedy_order_of_blocks_as_high_as_the_matrix():
    weight, s = made()
    blocks = obs_trace(weight, s.safe_covariance, importance(s), (len(weight), 1), damping=DAMPING)
    have = column_trace(weight, s, DAMPING)
    assert torch.equal(have.order.flatten(), blocks.order.flatten())
    torch.testing.assert_close(have.loss, blocks.loss)


def test_steps_are_alike_where_features_do_not_divide():
    weight, s = made(inputs=10)
    assert column_trace(weight, s, DAMPING, 16).order.shape == (1, 5, 2)


def test_mean_output_stays():
    weight, s = made()
    have, bias = Columns(weight, s, DAMPING).without(torch.tensor([1, 2, 7]))
    torch.testing.assert_close(have @ s.mean + bias, weight @ s.mean)
