"""What whole input features of a Linear are worth once the weights that survive have adapted: OBS over columns.

With H the damped covariance of the inputs, G = H^-1 and f_r the importance of output r, removing the inputs D costs

    tr(diag(f) W_D (G_DD)^-1 W_D^T)        and leaves        W - W_D (G_DD)^-1 G_D:

with zeros at D. These are the formulas of `score.obs` for blocks that are as high as the matrix. Then all rows share G,
and of W nothing is needed but K = W^T diag(f) W, which the removal of D changes to

    K - K_:D g - g^T K_D: + g^T K_DD g        with g = (G_DD)^-1 G_D:
"""

from functools import cached_property

import torch
from torch import Tensor

from .obs import SHRINK, damped
from .statistics import LayerStatistics
from .trace import RemovalTrace

AT_ONCE = 4  # columns that leave in one step of a trace; more are faster, and chosen less carefully


def importance(s: LayerStatistics) -> Tensor:
    """What a squared error of each output costs the loss of an image, float64 [out]: half the Fisher quadratic."""
    return s.need("output_weight") * (0.5 * s.num_tokens / s.num_images)


class Columns:
    """A Linear whose input features may leave.

    Args:
        weight: [out, in].
        s: its statistics, with Fisher parts.
        damping: relative to each diagonal entry of the covariance.

    Raises:
        torch.linalg.LinAlgError: the covariance cannot be factorised.
    """

    def __init__(self, weight: Tensor, s: LayerStatistics, damping: float) -> None:
        self.weight = weight.detach().double()
        self.mean = s.need("mean")
        hessian = damped(s.safe_covariance, damping)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        self.importance = importance(s)

    @cached_property
    def cost(self) -> Tensor:
        """Of errors at the inputs, [in, in]; losses alone ask for it."""
        return (self.weight.t() * self.importance) @ self.weight

    def loss(self, gone: Tensor) -> float:
        """What it costs the loss that some inputs leave, int64 [gone]."""
        if not len(gone):
            return 0.0
        factor = torch.linalg.cholesky(self.inverse[gone][:, gone])
        return float(torch.cholesky_solve(self.cost[gone][:, gone], factor).diagonal().sum())

    def without(self, gone: Tensor) -> tuple[Tensor, Tensor]:
        """(the weights [out, in] once some inputs left, zeros there; what makes good their mean, a bias [out])."""
        if not len(gone):
            return self.weight, torch.zeros_like(self.weight[:, 0])
        factor = torch.linalg.cholesky(self.inverse[gone][:, gone])
        weight = self.weight - self.weight[:, gone] @ torch.cholesky_solve(self.inverse[gone], factor)
        weight[:, gone] = 0
        return weight, (self.weight - weight) @ self.mean


def column_trace(weight: Tensor, s: LayerStatistics, damping: float, step: int = 1) -> RemovalTrace:
    """How input features leave: in each step those that cost least by themselves, with the loss of all that are gone.

    Args:
        weight: [out, in].
        s: its statistics, with Fisher parts.
        damping: relative to each diagonal entry of the covariance.
        step: features of a step, or a divisor of it: at most `AT_ONCE`, and so many that all steps are alike.

    Returns:
        One queue; `order` [1, steps, features of a step].

    Raises:
        torch.linalg.LinAlgError: the covariance cannot be factorised.
    """
    columns, features = Columns(weight, s, damping), weight.shape[1]
    size = next(n for n in range(min(step, AT_ONCE), 0, -1) if step % n == 0 and features % n == 0)
    inverse, cost = columns.inverse.clone(), columns.cost.clone()
    held = torch.arange(features, device=weight.device)
    alive, order, loss = torch.ones_like(held, dtype=torch.bool), [], [0.0]
    for _ in range(features // size):
        if int(alive.sum()) <= SHRINK * len(held):
            left = alive.nonzero().squeeze(1)
            held, inverse, cost = held[left], inverse[left][:, left], cost[left][:, left]
            alive = torch.ones_like(held, dtype=torch.bool)
        scores = (cost.diagonal() / inverse.diagonal().clamp(min=1e-300)).masked_fill(~alive, torch.inf)
        gone = scores.topk(size, largest=False).indices
        factor = torch.linalg.cholesky(inverse[gone][:, gone])
        update = torch.cholesky_solve(inverse[gone], factor)  # g, [size, held]
        left_over = torch.cholesky_solve(cost[gone][:, gone], factor).diagonal().sum()
        loss.append(loss[-1] + max(float(left_over), 0.0))
        order.append(held[gone])
        change = update.t() @ (cost[gone] - (cost[gone][:, gone] @ update) / 2)
        cost -= change + change.t()
        inverse -= inverse[gone].t() @ update
        alive[gone] = False
        # What rounding left of the removed rows and columns must not leak back.
        inverse[gone] = inverse[:, gone] = cost[gone] = cost[:, gone] = 0
        inverse[gone, gone] = 1
    losses = torch.tensor([loss], dtype=torch.float64)
    return RemovalTrace(torch.stack(order)[None].cpu(), losses, (1, features))
