"""Least-squares refit of the weights that survive pruning.

Pure functions of moments. For a block row R with kept columns S, inputs xhat of the pruned model and a target t:

    What_RS = (B_RS + rho D W_RS) (A_SS + rho D)^-1,   bhat = E[t] - What E[xhat]

with A the covariance of xhat, B the covariance of t with xhat and D the diagonal of A: a ridge that pulls towards the
weights before, relative to each input's size. Block rows share a factorisation, since their rows share a support.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..score.blocks import expand_mask

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Share of the mean variance, and of its own squared mean, below which an input's variance is nothing but rounding (of
# some fifty units in the last place of single precision): such an input counts as constant.
CONSTANT = 1e-11


@dataclass(frozen=True)
class Moments:
    """Weighted means over tokens of the inputs xhat and the targets t of a Linear, float64.

    Attributes:
        input_mean: E[xhat], [in].
        target_mean: E[t], [out].
        covariance: E[xhat xhat^T] - E[xhat] E[xhat]^T, [in, in].
        cross_covariance: E[t xhat^T] - E[t] E[xhat]^T, [out, in].
        target_variance: E|t - E[t]|^2, summed over outputs.
    """

    input_mean: Tensor
    target_mean: Tensor
    covariance: Tensor
    cross_covariance: Tensor
    target_variance: float

    def error(self, weight: Tensor) -> float:
        """E|W xhat - t|^2 of the centred quantities over the variance of t; 0 where that is nothing but rounding."""
        if self.target_variance <= CONSTANT * float(self.target_mean.square().sum()):
            return 0.0
        change = (weight @ self.covariance * weight).sum() - 2 * (weight * self.cross_covariance).sum()
        return (float(change) + self.target_variance) / self.target_variance


@dataclass(frozen=True)
class Refit:
    """Refitted weights (zero in removed blocks), their bias, the ridge that held-back tokens preferred, and the error.

    Attributes:
        error: see `Moments.error`; on held-back tokens where there are any.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    error: float


def refit(
    weight: Tensor,
    mask: Tensor,
    block_shape: tuple[int, int],
    moments: Moments,
    held_back: Moments | None,
    ridges: tuple[float, ...] = RIDGES,
) -> Refit:
    """Solve for the surviving weights and the bias; the ridge is chosen on held-back tokens.

    Args:
        weight: the weights before, [out_features, in_features].
        mask: bool [block_rows, block_cols], True where a block is kept.
        block_shape: (rows, cols).
        moments: what is fitted.
        held_back: the same quantities on other tokens; without them the middle candidate is taken.
        ridges: candidates for rho.

    Raises:
        torch.linalg.LinAlgError: a system could not be factorised with any of the ridges.
    """
    if held_back is None:
        ridges = (ridges[len(ridges) // 2],)
    judge = held_back or moments
    best: tuple[float, float, Tensor] | None = None
    for ridge in sorted(ridges, reverse=True):  # among equals the largest wins
        try:
            solution = solve(weight, mask, block_shape, moments, ridge)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            if best is None:  # smaller ridges have no chance
                raise
            continue
        error = judge.error(solution)
        if best is None or error < best[0]:
            best = (error, ridge, solution)
    assert best is not None
    error, ridge, solution = best
    bias = moments.target_mean - solution @ moments.input_mean
    return Refit(solution.to(weight.dtype), bias.to(weight.dtype), ridge, error)


def solve(weight: Tensor, mask: Tensor, block_shape: tuple[int, int], moments: Moments, ridge: float) -> Tensor:
    """The ridge solution for one rho, float64 [out_features, in_features]."""
    before = weight.double()
    after = torch.zeros_like(before)
    diagonal = moments.covariance.diagonal()
    # An input that never varies says nothing about its weights: they stay as they were. What rounding left of its
    # moments is no matrix that could be factorised: whether it can be would hang on the processor.
    varies = diagonal > CONSTANT * torch.maximum(diagonal.mean(), moments.input_mean.square())
    covariance = moments.covariance * torch.outer(varies, varies)
    cross_covariance = moments.cross_covariance * varies
    pull = torch.where(varies, ridge * diagonal, 1.0)
    entries = expand_mask(mask, (weight.shape[0], weight.shape[1]), block_shape)
    if not mask.numel():
        return after
    # Rows that keep the same inputs are solved for together.
    patterns, pattern = mask.unique(dim=0, return_inverse=True)
    pattern = pattern.repeat_interleave(block_shape[0])[: len(weight)]
    for number in range(len(patterns)):
        rows = (pattern == number).nonzero().squeeze(1)
        keep = entries[rows[0]].nonzero().squeeze(1)
        if not len(keep):
            continue
        gram = covariance[keep][:, keep] + torch.diag(pull[keep])
        right = cross_covariance[rows][:, keep] + before[rows][:, keep] * pull[keep]
        after[rows[:, None], keep] = torch.cholesky_solve(right.t(), torch.linalg.cholesky(gram)).t()
    return after
