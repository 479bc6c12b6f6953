"""What calibration learns of a layer, for the modules that decide what goes."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

ROUNDING = 1e-5


def at_least_float32(x: Tensor) -> Tensor:
    """x, in single precision where it was in half: sums over tokens need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def about_zero(weight: Tensor | int, first: Tensor, second: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sums of x and of x x^T, from those of what lies beyond an origin: float64 [in] and [in, in] each."""
    cross = torch.outer(origin, first)
    return first + weight * origin, second + (cross + cross.t() + weight * torch.outer(origin, origin))


@dataclass(frozen=True)
class LayerStatistics:
    """What is known of one Linear y = W x + b on the calibration images. Absent parts were not asked for.

    Attributes:
        num_tokens: tokens seen.
        num_images: images seen.
        mean: E[x], float64 [in]; with `fisher`, tokens are weighted by their squared output gradient.
        second_moment: E[x x^T], float64 [in, in], not centred; weighted likewise.
        output_weight: mean over tokens of (dLoss/dy)^2, float64 [out]; the loss is summed over images.
        gradient_moment: mean over tokens of dLoss/dy dLoss/dy^T, float64 [out, out]; its diagonal is `output_weight`.
        token_weight: mean squared output gradient of each token position, scaled to mean 1, float64 [tokens].
        gradient: mean over images of dLoss/dW, float64 [out, in].
        block_gradients: float32 [rows, block_rows, block_cols]; row n holds <dLoss_n/dW, W> over each block, scaled so
            that mean over rows of the outer product is the empirical Fisher between blocks. Exact up to as many
            images as rows; beyond them images share rows with random signs, which keeps the estimate unbiased.
    """

    num_tokens: int
    num_images: int
    mean: Tensor | None = None
    second_moment: Tensor | None = None
    output_weight: Tensor | None = None
    token_weight: Tensor | None = None
    gradient_moment: Tensor | None = None
    gradient: Tensor | None = None
    block_gradients: Tensor | None = None

    def need(self, part: str) -> Tensor:
        """A part that may be absent.

        Raises:
            ValueError: it was not collected.
        """
        value = getattr(self, part)
        if value is None:
            raise ValueError(f"statistics hold no {part}; collect them with the setting that gives it")
        return value

    @cached_property
    def covariance(self) -> Tensor:
        """E[x x^T] - E[x] E[x]^T, float64 [in, in]."""
        mean = self.need("mean")
        return self.need("second_moment") - torch.outer(mean, mean)

    @cached_property
    def safe_covariance(self) -> Tensor:
        """The covariance with what single-precision products may have rounded off added to its diagonal.

        Damping relative to a variance that rounding made negative would not help.
        """
        return self.covariance + torch.diag(ROUNDING * self.need("second_moment").diagonal())

    @property
    def variance(self) -> Tensor:
        """Of each input, float64 [in]; never negative."""
        return self.covariance.diagonal().clamp(min=0)

    def permuted(self, *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> "LayerStatistics":
        """The statistics of the Linear whose feature i is this one's feature order[i], on either side.

        Only what second-order pruning reads moves with it: the mean and the second moment of inputs, and the weight and
        the gradient moment of outputs. An order may leave features out.
        """
        moved = self
        if inputs is not None:
            mean, second_moment = self.need("mean")[inputs], self.need("second_moment")[inputs][:, inputs]
            moved = replace(moved, mean=mean, second_moment=second_moment)
        if outputs is not None:
            moment = self.gradient_moment
            moment = None if moment is None else moment[outputs][:, outputs]
            moved = replace(moved, output_weight=self.need("output_weight")[outputs], gradient_moment=moment)
        return moved

    def transformed(self, *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> "LayerStatistics":
        """The statistics of the Linear whose features are new ones, T times the old ones, on either side.

        Where there is no `gradient_moment`, gradients of different outputs are taken for uncorrelated.

        Args:
            inputs: T, float64 [in, in].
            outputs: T, float64 [out, out], of full rank.
        """
        moved = self
        if inputs is not None:
            # What single precision rounded off is made good first: new features may be small ones alone.
            second_moment = self.need("second_moment") + torch.diag(ROUNDING * self.need("second_moment").diagonal())
            mean, second_moment = inputs @ self.need("mean"), inputs @ second_moment @ inputs.t()
            moved = replace(moved, mean=mean, second_moment=second_moment)
        if outputs is not None:
            moment = self.gradient_moment
            moment = torch.diag(self.need("output_weight")) if moment is None else moment
            back = torch.linalg.inv(outputs)
            moment = back.t() @ moment @ back
            moved = replace(moved, output_weight=moment.diagonal().clamp(min=0), gradient_moment=moment)
        return moved
