"""The refit against ridge regression on explicit tokens, in float64."""

import numpy as np
import pytest
import torch

from hf_blockprune.refit.solve import RIDGES, Moments, refit, solve
from hf_blockprune.score.blocks import expand_mask, grid_shape


def random_tensor(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(seed, tokens, into, out, noise=0.5):
    """Correlated inputs with a mean, targets with another, and the weights before."""
    weight = random_tensor(seed, out, into)
    x = random_tensor(seed + 1, tokens, into) @ random_tensor(seed + 2, into, into) + 2
    target = (
        x @ (weight + 0.3 * random_tensor(seed + 3, out, into)).t() - 5 + noise * random_tensor(seed + 4, tokens, out)
    )
    return weight, x, target


def moments_of(x, target):
    xc, tc = x - x.mean(0), target - target.mean(0)
    variance = float(tc.square().sum() / len(x))
    return Moments(x.mean(0), target.mean(0), xc.t() @ xc / len(x), tc.t() @ xc / len(x), variance)


def ridge_regression(weight, keep, x, target, ridge):
    """min mean|V x - t|^2 + ridge sum_j var_j |V_j - W_j|^2, centred, V zero outside `keep`; one lstsq an output."""
    xc, tc = (x - x.mean(0)).numpy(), (target - target.mean(0)).numpy()
    penalty = np.sqrt(ridge * len(xc) * xc.var(0))
    result = np.zeros(tuple(weight.shape))
    for row in range(len(weight)):
        on = keep[row].numpy()
        system = np.concatenate([xc[:, on], np.diag(penalty[on])])
        right = np.concatenate([tc[:, row], penalty[on] * weight[row].numpy()[on]])
        result[row, on] = np.linalg.lstsq(system, right, rcond=None)[0]
    return torch.from_numpy(result)


def centred_error(weight, x, target):
    return float(((x - x.mean(0)) @ weight.t() - (target - target.mean(0))).square().sum(1).mean())


def random_mask(seed, shape, block_shape):
    """One block row empty, one full where there are three."""
    mask = random_tensor(seed, *grid_shape(shape, block_shape)) > 0
    mask[0] = False
    if len(mask) > 2:
        mask[1] = True
    return mask


@pytest.mark.parametrize("ridge", [1e-4, 1e-1, 1.0])
@pytest.mark.parametrize(
    ("shape", "block_shape"),
    [((6, 8), (2, 2)), ((7, 9), (2, 4)), ((9, 5), (4, 1)), ((5, 10), (1, 3)), ((3, 4), (8, 8))],
)
def test_solution_is_ridge_regression(shape, block_shape, ridge):
    weight, x, target = problem(0, 80, shape[1], shape[0])
    for seed in range(3):
        mask = random_mask(seed, shape, block_shape)
        keep = expand_mask(mask, shape, block_shape)
        got = solve(weight, mask, block_shape, moments_of(x, target), ridge)
        assert got.dtype == torch.float64
        assert torch.equal(got[~keep], torch.zeros_like(got[~keep]))
        torch.testing.assert_close(got, ridge_regression(weight, keep, x, target, ridge), rtol=1e-7, atol=1e-8)


def test_fewer_tokens_than_inputs():
    weight, x, target = problem(0, 6, 12, 4)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 1] = False
    got = solve(weight, mask, (2, 3), moments_of(x, target), 1e-2)
    expected = ridge_regression(weight, expand_mask(mask, (4, 12), (2, 3)), x, target, 1e-2)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_an_exact_answer_is_found():
    """Targets that kept weights can produce, and next to no ridge."""
    weight, x, _ = problem(0, 100, 8, 6)
    mask = random_mask(1, (6, 8), (2, 2))
    truth = random_tensor(9, 6, 8) * expand_mask(mask, (6, 8), (2, 2))
    got = solve(weight, mask, (2, 2), moments_of(x, x @ truth.t() + 4), 1e-12)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-6)


def test_a_huge_ridge_returns_the_weights_before():
    weight, x, target = problem(0, 50, 8, 6)
    mask = random_mask(1, (6, 8), (2, 2))
    got = solve(weight, mask, (2, 2), moments_of(x, target), 1e12)
    torch.testing.assert_close(got, weight * expand_mask(mask, (6, 8), (2, 2)), rtol=1e-9, atol=1e-9)


def test_an_input_that_never_varies_keeps_its_weight():
    weight, x, target = problem(0, 50, 8, 6)
    x[:, 3] = 7
    got = solve(weight, torch.ones(3, 4, dtype=torch.bool), (2, 2), moments_of(x, target), 1e-2)
    torch.testing.assert_close(got[:, 3], weight[:, 3], rtol=1e-6, atol=1e-6)
    keep = torch.ones(6, 8, dtype=torch.bool)
    keep[:, 3] = False
    others = ridge_regression(weight, keep, x, target, 1e-2)
    torch.testing.assert_close(got[:, [0, 1, 2, 4, 5, 6, 7]], others[:, [0, 1, 2, 4, 5, 6, 7]], rtol=1e-6, atol=1e-7)


def test_error_is_the_centred_squared_error_as_a_share_of_the_targets_variance():
    _, x, target = problem(0, 60, 8, 6)
    moments = moments_of(x, target)
    variance = float((target - target.mean(0)).square().sum(1).mean())
    for seed in range(5):
        candidate = random_tensor(seed, 6, 8)
        explicit = centred_error(candidate, x, target)
        assert moments.error(candidate) == pytest.approx(explicit / variance, rel=1e-9)


def test_error_for_a_target_that_never_varies_is_zero():
    _, x, _ = problem(0, 60, 8, 6)
    assert moments_of(x, torch.ones(60, 6, dtype=torch.float64)).error(torch.zeros(6, 8, dtype=torch.float64)) == 0


def test_ridge_with_least_held_back_error_is_taken():
    chosen = set()
    mask = random_mask(1, (6, 12), (2, 3))
    keep = expand_mask(mask, (6, 12), (2, 3))
    for tokens, noise in [(400, 0.01), (14, 3.0), (14, 30.0), (8, 3.0), (30, 3.0)]:
        weight, x, target = problem(0, tokens + 200, 12, 6, noise=noise)
        fitted, held_back = (x[:tokens], target[:tokens]), (x[tokens:], target[tokens:])
        answers = {ridge: ridge_regression(weight, keep, *fitted, ridge) for ridge in RIDGES}
        best = min(answers, key=lambda ridge: centred_error(answers[ridge], *held_back))
        result = refit(weight, mask, (2, 3), moments_of(*fitted), moments_of(*held_back))
        assert result.ridge == best
        torch.testing.assert_close(result.weight, answers[best], rtol=1e-6, atol=1e-7)
        chosen.add(best)
    assert len(chosen) > 1  # or the choice was not put to the test


def test_candidates_for_the_ridge_can_be_given():
    weight, x, target = problem(0, 60, 8, 6)
    mask = random_mask(1, (6, 8), (2, 2))
    fitted, held_back = moments_of(x[:40], target[:40]), moments_of(x[40:], target[40:])
    result = refit(weight, mask, (2, 2), fitted, held_back, ridges=(0.37,))
    assert result.ridge == 0.37
    torch.testing.assert_close(result.weight, solve(weight, mask, (2, 2), fitted, 0.37))


def test_without_held_back_tokens_the_middle_candidate_is_taken():
    weight, x, target = problem(0, 60, 8, 6)
    mask = random_mask(1, (6, 8), (2, 2))
    result = refit(weight, mask, (2, 2), moments_of(x, target), None)
    assert result.ridge == sorted(RIDGES)[len(RIDGES) // 2]
    expected = ridge_regression(weight, expand_mask(mask, (6, 8), (2, 2)), x, target, result.ridge)
    torch.testing.assert_close(result.weight, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("ridge", [1e-4, 1.0, 1e6])
def test_bias_takes_the_mean_out_of_the_residual(ridge):
    weight, x, target = problem(0, 60, 8, 6)
    mask = random_mask(1, (6, 8), (2, 2))
    result = refit(weight, mask, (2, 2), moments_of(x, target), None, ridges=(ridge,))
    residual = target - x @ result.weight.t() - result.bias
    torch.testing.assert_close(residual.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-9)
    # An output without any weights becomes its mean.
    torch.testing.assert_close(result.bias[:2], target.mean(0)[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_has_the_dtype_of_the_weights_and_is_solved_in_float64(dtype):
    weight, x, target = problem(0, 60, 8, 6)
    weight, before = weight.to(dtype), weight.to(dtype).clone()
    mask = random_mask(1, (6, 8), (2, 2))
    result = refit(weight, mask, (2, 2), moments_of(x, target), None)
    assert result.weight.dtype == result.bias.dtype == dtype
    expected = solve(weight.double(), mask, (2, 2), moments_of(x, target), result.ridge)
    torch.testing.assert_close(result.weight, expected.to(dtype), rtol=0, atol=0)
    assert torch.equal(weight, before)
