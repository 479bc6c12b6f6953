"""How blocks leave a layer: in which order, and the loss after each removal. Pure functions of tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RemovalTrace:
    """How blocks leave a layer.

    A layer has one or more queues; blocks of a queue leave in a fixed order, and queues are independent of each other.

    Attributes:
        order: int64 [queues, n], flat index (block_row * block_cols + block_col) of the block removed at each step.
        loss: float64 [queues, n + 1], loss after 0, 1, ... n removals; starts at 0 and never decreases.
        grid: (block_rows, block_cols).
    """

    order: Tensor
    loss: Tensor
    grid: tuple[int, int]


def gone_first(trace: RemovalTrace, gone: Tensor) -> RemovalTrace:
    """The trace of a layer of which some blocks are gone: these leave first, the others in their order.

    Each gone block lowers the loss by next to nothing, so that none stays while a block leaves that costs nothing.

    Args:
        trace: made from a weight with zeros for what is gone, so that these blocks added nothing to its losses.
        gone: bool [block_rows, block_cols].
    """
    left = gone.to(trace.order.device).flatten()[trace.order]  # [queues, steps]
    places = (~left).to(torch.uint8).argsort(dim=1, stable=True)
    last = left.sum(dim=1, keepdim=True)
    step = torch.arange(left.shape[1] + 1, device=left.device)
    loss = torch.cat([trace.loss[:, :1], trace.loss[:, 1:].gather(1, places)], dim=1)
    loss = loss.masked_fill(step <= last, 0.0)
    gain = max(float(loss.max()), 1e-30) * 1e-12
    return RemovalTrace(trace.order.gather(1, places), loss - gain * torch.minimum(step, last), trace.grid)


def one_queue(order: Tensor, loss: Tensor, grid: torch.Size) -> RemovalTrace:
    """The trace of a layer whose blocks leave in one order.

    Args:
        order: flat index of the block removed at each step, int64 [blocks].
        loss: after each removal, float64 [blocks].
        grid: (block_rows, block_cols).
    """
    loss = torch.cat([loss.new_zeros(1), loss])
    return RemovalTrace(order[None].cpu(), loss[None].cpu(), (grid[0], grid[1]))
