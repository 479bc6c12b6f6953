"""Sums over tokens that moments are made of, apart from what they are summed over."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..score.statistics import about_zero
from .solve import Moments

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class RunningMoments:
    """Weighted sums over tokens of inputs x and targets t that grow by a batch at a time.

    Products are taken in the values' own precision and summed up in float64. They are products of what lies beyond the
    first batch's mean: what single precision rounds off a large mean could be more than a small variance.

    Args:
        inputs: number of values of x.
        outputs: number of values of t.
        device: where they lie.

    Attributes:
        weight: of all tokens, [].
        x, t: weighted sums beyond the origin, [in] and [out].
        xx, tx: weighted sums of x x^T and of t x^T, [in, in] and [out, in].
        tt: weighted sums of squared targets, [out].
        origin: of x and of t, None before the first batch.
    """

    inputs: int
    outputs: int
    device: torch.device
    weight: Tensor = field(init=False)
    x: Tensor = field(init=False)
    t: Tensor = field(init=False)
    xx: Tensor = field(init=False)
    tx: Tensor = field(init=False)
    tt: Tensor = field(init=False)
    origin: tuple[Tensor, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self.device)

        into, out = self.inputs, self.outputs
        self.weight, self.x, self.t = zeros(), zeros(into), zeros(out)
        self.xx, self.tx, self.tt = zeros(into, into), zeros(out, into), zeros(out)

    def add(self, x: Tensor, t: Tensor, weight: Tensor) -> None:
        """Add tokens.

        Args:
            x: [tokens, in], of single precision at least.
            t: [tokens, out], likewise.
            weight: [tokens].
        """
        column = weight[:, None]
        if self.origin is None:
            total = weight.sum().clamp(min=1e-30)
            self.origin = (x * column).sum(0) / total, (t * column).sum(0) / total
        x, t = x - self.origin[0], t - self.origin[1]
        weighted = x * column
        self.weight += weight.sum(dtype=torch.float64)
        self.x += weighted.sum(0, dtype=torch.float64)
        self.t += (t * column).sum(0, dtype=torch.float64)
        self.xx += weighted.t() @ x
        self.tx += t.t() @ weighted
        self.tt += (t.square() * column).sum(0, dtype=torch.float64)

    def over(self, accelerator: "Accelerator") -> "RunningMoments":
        """The sums of all processes together, about zero."""
        every, here = RunningMoments(self.inputs, self.outputs, self.device), self._about_zero()
        for name in ("weight", "x", "t", "xx", "tx", "tt"):
            setattr(every, name, cast(Tensor, accelerator.reduce(getattr(here, name), "sum")))
        return every

    def _about_zero(self) -> "RunningMoments":
        if self.origin is None:
            return self
        about = RunningMoments(self.inputs, self.outputs, self.device)
        (x, t), weight = (origin.double() for origin in self.origin), self.weight
        about.weight, about.t = weight, self.t + weight * t
        about.x, about.xx = about_zero(weight, self.x, self.xx, x)
        about.tx = self.tx + torch.outer(t, self.x) + torch.outer(self.t, x) + weight * torch.outer(t, x)
        about.tt = self.tt + 2 * t * self.t + weight * t.square()
        return about

    def moments(self) -> Moments:
        """Means and covariances of sums about zero; some token must have a weight."""
        x, t = self.x / self.weight, self.t / self.weight
        spread = (self.tt / self.weight - t.square()).sum()
        covariance = self.xx / self.weight - torch.outer(x, x)
        return Moments(x, t, covariance, self.tx / self.weight - torch.outer(t, x), float(spread))
