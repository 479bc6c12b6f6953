"""What whole input features of a Linear are worth once the weights that survive have adapted: OBS over columns.

With H the damped covariance of the inputs, G = H^-1 and f_r the importance of output r, removing the inputs D costs

    tr(diag(f) W_D (G_DD)^-1 W_D^T)        and leaves        W - W_D (G_DD)^-1 G_D:

with zeros at D. These are the formulas of `score.obs` for blocks that are as high as the matrix.
"""

import torch
from torch import Tensor

from .obs import damped
from .statistics import LayerStatistics


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
        self.cost = (self.weight.t() * importance(s)) @ self.weight  # of errors at the inputs, [in, in]

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
