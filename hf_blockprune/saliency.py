"""What each block is worth: in which order blocks should go, and the loss after each removal.

Pure functions of a weight and its calibration statistics. Sources: magnitude as in Han et al. 2015 (arXiv 1506.02626),
taken per block; taylor is LPViT (Xu et al., ECCV 2024, arXiv 2407.02068).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .blocks import block_sizes, block_sums


class GradientStatistics(Protocol):
    """What `taylor` needs of a layer's statistics (see `calibration.LayerStatistics`)."""

    @property
    def gradient(self) -> Tensor | None: ...

    @property
    def block_gradients(self) -> Tensor | None: ...


@dataclass(frozen=True)
class RemovalTrace:
    """How blocks leave a layer.

    A layer has one or more units; blocks of a unit leave in a fixed order, and units are independent of each other.

    Attributes:
        order: int64 [units, n], flat index (block_row * block_cols + block_col) of the block removed at each step.
        loss: float64 [units, n + 1], loss after 0, 1, ... n removals; starts at 0 and never decreases.
        grid: (block_rows, block_cols).
    """

    order: Tensor
    loss: Tensor
    grid: tuple[int, int]


def removal_trace(
    weight: Tensor, statistics: GradientStatistics | None, block_shape: tuple[int, int], method: str
) -> RemovalTrace:
    """The removal trace of a layer under a method.

    Args:
        weight: [out_features, in_features].
        statistics: the layer's calibration statistics; `magnitude` needs none.
        block_shape: (rows, cols).
        method: "magnitude" or "taylor".

    Raises:
        ValueError: the method is unknown, or needs statistics that are missing.
    """
    if method == "magnitude":
        return magnitude_trace(weight, block_shape)
    if method == "taylor":
        if statistics is None or statistics.gradient is None or statistics.block_gradients is None:
            raise ValueError("method 'taylor' needs gradient statistics; collect them with gradients=True")
        return taylor_trace(weight, statistics.gradient, statistics.block_gradients, block_shape)
    raise ValueError(f"unknown method {method!r}")


def magnitude_trace(weight: Tensor, block_shape: tuple[int, int]) -> RemovalTrace:
    """Blocks in the order of their mean absolute weight; the loss is the running sum of these means."""
    weight = weight.double()
    sizes = block_sizes((weight.shape[0], weight.shape[1]), block_shape).to(weight.device)
    scores = block_sums(weight.abs(), block_shape) / sizes
    order = scores.flatten().argsort(stable=True)
    loss = torch.cumsum(scores.flatten()[order], dim=0)
    return _one_unit(order, loss, scores.shape)


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
            diagonal: row n is <g_n, W> over each block (see `calibration`).
        block_shape: (rows, cols).
    """
    scores = block_sums((weight.double() * gradient.double()).abs(), block_shape)
    order = scores.flatten().argsort(stable=True)
    mean_block = block_sums(weight.double() * gradient.double(), block_shape).flatten()[order]
    first = torch.cumsum(mean_block, dim=0).square()
    second = _fisher_curve(block_gradients.flatten(1), order)
    return _one_unit(order, torch.cummax(first + second / 2, dim=0).values, scores.shape)


def _fisher_curve(block_gradients: Tensor, order: Tensor, rows_at_once: int = 64) -> Tensor:
    """delta^T F delta after each removal, float64 [blocks]; a few samples at a time to bound memory."""
    total = torch.zeros(block_gradients.shape[1], dtype=torch.float64, device=block_gradients.device)
    for rows in block_gradients.split(rows_at_once):
        total += rows[:, order].double().cumsum(dim=1).square().sum(dim=0)
    return total / len(block_gradients)


def _one_unit(order: Tensor, loss: Tensor, grid: torch.Size) -> RemovalTrace:
    loss = torch.cat([loss.new_zeros(1), loss])
    return RemovalTrace(order[None].cpu(), loss[None].cpu(), (grid[0], grid[1]))
