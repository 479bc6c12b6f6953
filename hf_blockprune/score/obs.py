"""Blocks by what their loss is once the weights that survive have adapted: block Optimal Brain Surgeon."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import grid_shape
from .trace import RemovalTrace

REFRESH = 16  # removals between two solutions from scratch in single precision
SHRINK = 0.75  # of the blocks left: those that are gone are let go of


def obs_trace(
    weight: Tensor,
    covariance: Tensor,
    output_weight: Tensor,
    block_shape: tuple[int, int],
    *,
    damping: float = 1e-2,
    memory_bytes: int = 1 << 30,
    dtype: torch.dtype | None = None,
) -> RemovalTrace:
    """Block Optimal Brain Surgeon: the loss of removing blocks when the weights that survive may adapt.

    With H the damped covariance and G = H^-1, the block J of block row R with the least

        s_J = tr(diag(f_R) W_RJ (G_JJ)^-1 W_RJ^T)

    goes next; the surviving weights take over what they can, W_R -= W_RJ (G_JJ)^-1 G_J:, and G is reduced to the
    surviving inputs, G -= G_:J (G_JJ)^-1 G_J:. With f = 1 and no damping the running sum of s_J is the exact
    least-squares error of the best refit of what remains. Each block row is a queue of the trace.

    Sources: Hassibi and Stork 1993; Frantar and Alistarh 2022 (arXiv 2208.11580); Kurtic et al. 2023 (2302.04089).

    Args:
        weight: [out_features, in_features].
        covariance: second moment of the centred inputs, [in_features, in_features].
        output_weight: importance f of each output, [out_features].
        block_shape: (rows, cols).
        damping: added to the diagonal, relative to each entry, so that large and small channels are damped alike.
        memory_bytes: bound on the working memory; block rows are taken in chunks that fit, and in smaller ones where
            the device has less to give.
        dtype: to compute in; by default float64 on a CPU and float32 on a GPU, where G and W are solved for anew every
            `REFRESH` steps, so that rounding does not add up.

    Returns:
        A trace with one queue for each block row.

    Raises:
        torch.linalg.LinAlgError: the covariance cannot be factorised.
    """
    dtype = dtype or (torch.float64 if weight.device.type == "cpu" else torch.float32)
    rows, cols = block_shape
    block_rows, block_cols = grid_shape((weight.shape[0], weight.shape[1]), block_shape)
    pad_rows, pad_cols = block_rows * rows - weight.shape[0], block_cols * cols - weight.shape[1]
    hessian = damped(covariance.double(), damping)
    # With every diagonal entry 1 scores stay the same and rounding treats large and small inputs alike.
    scale = hessian.diagonal().sqrt()
    scaled, hessian = weight.double() * scale, hessian / torch.outer(scale, scale)
    # Padding rows weigh nothing; padding columns are zero and independent of all others: neither changes a score.
    hessian = torch.block_diag(hessian, torch.eye(pad_cols).to(hessian))
    padded = F.pad(scaled, (0, pad_cols, 0, pad_rows)).view(block_rows, rows, -1).to(dtype)
    importance = F.pad(output_weight.double(), (0, pad_rows)).view(block_rows, rows).to(dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).to(dtype)
    refresh = hessian if dtype != torch.float64 else None
    copies = 1 if refresh is None else 9  # in units of `dtype`; what is solved anew is in double precision
    at_once = max(1, memory_bytes // (copies * inverse.numel() * inverse.element_size()))
    columns, loss = _in_chunks(padded, importance, inverse, refresh, cols, at_once)
    order = columns + torch.arange(block_rows, device=columns.device)[:, None] * block_cols
    return RemovalTrace(order.cpu(), loss.cpu(), (block_rows, block_cols))


def _in_chunks(
    weight: Tensor, importance: Tensor, inverse: Tensor, refresh: Tensor | None, cols: int, at_once: int
) -> tuple[Tensor, Tensor]:
    """`_eliminate` for all block rows, so many at once; half as many where that is more than memory holds."""
    done: list[tuple[Tensor, Tensor]] = []
    start = 0
    while start < len(weight):
        chunk = slice(start, start + at_once)
        w = weight[chunk].clone()
        try:
            done.append(_eliminate(w, importance[chunk], inverse, refresh, cols))
        except (MemoryError, RuntimeError) as error:
            if at_once == 1 or not _out_of_memory(error):
                raise
            at_once = max(1, min(at_once, len(w)) // 2)
            continue
        start += at_once
    columns, loss = (torch.cat(part) for part in zip(*done, strict=True))
    return columns, loss


def _out_of_memory(error: Exception) -> bool:
    """The CPU's allocator says so in a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error)


def damped(covariance: Tensor, damping: float) -> Tensor:
    """A covariance with `damping` of each entry added to its diagonal."""
    diagonal = covariance.diagonal()
    # The floor keeps inputs that never vary from making H singular; it is far below anything that varies.
    floor = 1e-10 * diagonal.mean() if diagonal.mean() > 0 else 1.0
    return covariance + torch.diag(damping * diagonal + floor)


def _eliminate(
    weight: Tensor, importance: Tensor, inverse: Tensor, refresh: Tensor | None, cols: int
) -> tuple[Tensor, Tensor]:
    """Remove all block columns one by one, in a batch of block rows that each go their own way.

    Args:
        weight: [batch, rows, n]; overwritten.
        importance: [batch, rows].
        inverse: H^-1, [n, n].
        refresh: H [n, n], to solve anew from now and then; None goes on with the updates alone.
        cols: columns of a block.

    Returns:
        (block column removed at each step [batch, n / cols], loss after 0, 1, ... removals [batch, n / cols + 1]).
    """
    batch, blocks = len(weight), weight.shape[2] // cols
    removed = torch.empty(batch, blocks, dtype=torch.int64, device=weight.device)
    loss = torch.zeros(batch, blocks + 1, dtype=torch.float64, device=weight.device)
    right = None if refresh is None else weight.double() @ refresh
    rest = _Rest(weight, inverse, cols)
    for step in range(blocks):
        chosen, score = rest.cheapest(importance)
        loss[:, step + 1] = loss[:, step] + score.clamp(min=0)
        removed[:, step] = rest.remove(chosen)
        if refresh is not None and right is not None and step % REFRESH == REFRESH - 1:
            rest.solve_anew(refresh, right)
        elif (rest.alive.shape[1] - rest.gone) <= SHRINK * rest.alive.shape[1]:
            rest.compact()
    return removed, loss


class _Rest:
    """What is left of each block row of a batch: weights W, and H^-1 of the inputs that they still have.

    Removing a block c takes (H^-1)_:c ((H^-1)_cc)^-1 (H^-1)_c: from H^-1. These products are kept as their factors, for
    only the diagonal blocks of H^-1 and the rows of removed blocks are ever read: a sixth of the work, and no copy of
    H^-1 for each block row.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, cols: int) -> None:
        batch, self.rows, n = weight.shape
        self.cols, blocks = cols, n // cols
        self.each = torch.arange(batch, device=weight.device)
        self.within = torch.arange(cols, device=weight.device)
        self.identity = torch.eye(cols, dtype=weight.dtype, device=weight.device)
        self.weight = weight  # [batch, rows, held features]
        self.blocks = torch.arange(blocks, device=weight.device).expand(batch, -1)  # those held, [batch, held]
        self.base = inverse[None]  # H^-1 that the factors are subtracted from, [1 or batch, m, m]
        self.places = self._features(self.blocks)  # of held features in the base, [batch, held features]
        diagonal = inverse.view(blocks, cols, blocks, cols).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        self.corners = diagonal.expand(batch, -1, -1, -1).clone()  # diagonal blocks of H^-1, [batch, held, cols, cols]
        self._start()

    def _start(self, used: int = 0) -> None:
        """Nothing is gone of the blocks that are held; there is room for the factors until `compact` is called."""
        batch, held = self.blocks.shape
        room = used + held - int(SHRINK * held)
        self.alive = torch.ones(batch, held, dtype=torch.bool, device=self.weight.device)
        self.gone = 0
        self.used, self.centres = used, self.corners.new_empty(batch, room, self.cols, self.cols)
        self.factors = self.corners.new_empty(batch, room * self.cols, held * self.cols)

    def _features(self, blocks: Tensor) -> Tensor:
        """Features of block columns, [batch, count] -> [batch, count * cols]."""
        return (blocks[:, :, None] * self.cols + self.within).flatten(1)

    def cheapest(self, importance: Tensor) -> tuple[Tensor, Tensor]:
        """(which of the held blocks costs least [batch], its loss [batch])."""
        corners = torch.where(self.alive[:, :, None, None], self.corners, self.identity)
        self.inverses = corners.reciprocal() if self.cols == 1 else torch.linalg.inv(corners)
        by_block = self._by_block()
        scores = (((by_block @ self.inverses) * by_block).sum(-1) * importance[:, None]).sum(-1)
        scores = scores.masked_fill(~self.alive, torch.inf)
        chosen = scores.argmin(dim=1)
        return chosen, scores[self.each, chosen]

    def _by_block(self) -> Tensor:
        """Weights, [batch, held, rows, cols]."""
        return self.weight.unflatten(2, (-1, self.cols)).transpose(1, 2)

    def remove(self, chosen: Tensor) -> Tensor:
        """Take one of the held blocks from each block row; its block column [batch]."""
        columns = self._features(chosen[:, None])  # [batch, cols]
        centre = self.inverses[self.each, chosen]
        row = self._inverse_rows(columns)
        update = centre @ row  # [batch, cols, held features]
        self.weight.baddbmm_(self._by_block()[self.each, chosen], update, alpha=-1)
        parts = [x.unflatten(2, (-1, self.cols)).transpose(1, 2) for x in (row, update)]  # [batch, held, cols, cols]
        self.corners -= parts[0].transpose(2, 3) @ parts[1]
        self.factors[:, self.used * self.cols : (self.used + 1) * self.cols] = row
        self.centres[:, self.used] = centre
        self.used, self.gone = self.used + 1, self.gone + 1
        self.alive[self.each, chosen] = False
        # What rounding left of the removed rows and columns must not leak back.
        self.weight.scatter_(2, columns[:, None].expand(-1, self.rows, -1), 0)
        return self.blocks[self.each, chosen]

    def _inverse_rows(self, columns: Tensor) -> Tensor:
        """Rows of H^-1 as it is now, at held features [batch, cols]; zero for features that are gone."""
        batch = self.each if len(self.base) > 1 else torch.zeros_like(self.each)
        rows = self.base[batch[:, None, None], self.places.gather(1, columns)[:, :, None], self.places[:, None]]
        if self.used:
            factors = self.factors[:, : self.used * self.cols]
            picked = factors.gather(2, columns[:, None].expand(-1, factors.shape[1], -1))
            picked = self.centres[:, : self.used].transpose(2, 3) @ picked.unflatten(1, (-1, self.cols))
            rows.baddbmm_(picked.flatten(1, 2).transpose(1, 2), factors, alpha=-1)
        return rows.masked_fill_(~self.alive.repeat_interleave(self.cols, dim=1)[:, None], 0)

    def compact(self) -> None:
        """Let go of what belongs to removed blocks."""
        held = self.alive.nonzero()[:, 1].view(len(self.each), -1)
        if not held.shape[1]:
            return
        features = self._features(held)
        used, factors, centres = self.used, self.factors[:, : self.used * self.cols], self.centres[:, : self.used]
        self._hold(held, features)
        self._start(used)
        self.centres[:, :used] = centres
        torch.gather(
            factors,
            2,
            features[:, None].expand(-1, factors.shape[1], -1),
            out=self.factors[:, : used * self.cols],
        )

    def _hold(self, held: Tensor, features: Tensor) -> None:
        self.blocks, self.places = self.blocks.gather(1, held), self.places.gather(1, features)
        self.weight = self.weight.gather(2, features[:, None].expand(-1, self.rows, -1))
        self.corners = self.corners[self.each[:, None], held]

    def solve_anew(self, hessian: Tensor, right: Tensor) -> None:
        """Weights and H^-1 from scratch: W_S = (W H)_S (H_SS)^-1, the surviving weights as least squares has them.

        Args:
            hessian: H [n, n] in double precision.
            right: W H, [batch, rows, n] in double precision.
        """
        held = self.alive.nonzero()[:, 1].view(len(self.each), -1)
        if not held.shape[1]:
            return
        self._hold(held, self._features(held))
        here = self._features(self.blocks)
        exact = torch.cholesky_inverse(torch.linalg.cholesky(hessian[here[:, :, None], here[:, None]]))
        weight = right.gather(2, here[:, None].expand(-1, self.rows, -1)) @ exact
        self.weight, self.base = weight.to(self.weight.dtype), exact.to(self.weight.dtype)
        self.places = torch.arange(here.shape[1], device=here.device).expand(len(here), -1)
        blocks = exact.unflatten(2, (-1, self.cols)).unflatten(1, (-1, self.cols))
        self.corners = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).to(self.weight.dtype)
        self._start()
