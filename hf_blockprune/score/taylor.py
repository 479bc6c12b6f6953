"""Blocks by a Taylor expansion of the loss: LPViT (Xu et al., ECCV 2024, arXiv 2407.02068)."""

import torch
from torch import Tensor

from .blocks import block_sums
from .trace import RemovalTrace, one_queue


def taylor_trace(
    weight: Tensor, gradient: Tensor, block_gradients: Tensor, block_shape: tuple[int, int]
) -> RemovalTrace:
    """LPViT's ranking and distortion curve.

    Blocks go in the order of sum |w * g| over the block (g: mean gradient). With delta = W_pruned - W, the loss after
    k removals is D(k) = (g . delta)^2 + 1/2 delta^T F delta, F the empirical Fisher 1/N sum_n g_n g_n^T. delta is -W on
    removed blocks and 0 elsewhere, so g_n . delta is a sum over removed blocks of <g_n, W> restricted to the block:
    F never has to be formed, and no part of it is neglected.

    D as a quadratic may fall again late on the curve (removing everything can look free where the loss does not
    depend on the layer's scale); removing more is never cheaper in truth, so the running maximum is taken.

    Args:
        weight: [out_features, in_features].
        gradient: mean gradient of the loss, [out_features, in_features].
        block_gradients: [samples, block_rows, block_cols], rows scaled so that their mean square is the Fisher's
            diagonal: row n is <g_n, W> over each block (see `calibration.collect`).
        block_shape: (rows, cols).
    """
    scores = block_sums((weight.double() * gradient.double()).abs(), block_shape)
    order = scores.flatten().argsort(stable=True)
    mean_block = block_sums(weight.double() * gradient.double(), block_shape).flatten()[order]
    first = torch.cumsum(mean_block, dim=0).square()
    second = _fisher_curve(block_gradients.flatten(1), order)
    return one_queue(order, torch.cummax(first + second / 2, dim=0).values, scores.shape)


def _fisher_curve(block_gradients: Tensor, order: Tensor, rows_at_once: int = 64) -> Tensor:
    """delta^T F delta after each removal, float64 [blocks]; a few samples at a time to bound memory."""
    total = torch.zeros(block_gradients.shape[1], dtype=torch.float64, device=block_gradients.device)
    for rows in block_gradients.split(rows_at_once):
        total += rows[:, order].double().cumsum(dim=1).square().sum(dim=0)
    return total / len(block_gradients)
