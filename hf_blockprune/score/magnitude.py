"""Blocks by the size of their weights, as in Han et al. 2015 (arXiv 1506.02626), taken per block."""

import torch
from torch import Tensor

from .blocks import block_sizes, block_sums
from .trace import RemovalTrace, one_queue


def magnitude_trace(weight: Tensor, block_shape: tuple[int, int]) -> RemovalTrace:
    """Blocks in the order of their mean absolute weight; the loss is the running sum of these means."""
    weight = weight.double()
    sizes = block_sizes((weight.shape[0], weight.shape[1]), block_shape).to(weight.device)
    scores = block_sums(weight.abs(), block_shape) / sizes
    order = scores.flatten().argsort(stable=True)
    loss = torch.cumsum(scores.flatten()[order], dim=0)
    return one_queue(order, loss, scores.shape)
