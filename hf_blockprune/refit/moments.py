"""Sums over tokens that moments are made of, apart from what they are summed over."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .solve import Moments

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class RunningMoments:
    """Weighted sums over tokens of inputs x and targets t, float64, that grow by a batch at a time.

    Args:
        inputs: number of values of x.
        outputs: number of values of t.
        device: where they lie.

    Attributes:
        weight: of all tokens, [].
        x, t: weighted sums, [in] and [out].
        xx, tx: weighted sums of x x^T and of t x^T, [in, in] and [out, in].
        tt: weighted sums of squared targets, [out].
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

    def __post_init__(self) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self.device)

        into, out = self.inputs, self.outputs
        self.weight, self.x, self.t = zeros(), zeros(into), zeros(out)
        self.xx, self.tx, self.tt = zeros(into, into), zeros(out, into), zeros(out)

    def add(self, x: Tensor, t: Tensor, weight: Tensor) -> None:
        """Add tokens.

        Args:
            x: [tokens, in].
            t: [tokens, out].
            weight: [tokens].
        """
        weighted = x * weight[:, None]
        self.weight += weight.sum()
        self.x += weighted.sum(0)
        self.t += (t * weight[:, None]).sum(0)
        self.xx += weighted.t() @ x
        self.tx += t.t() @ weighted
        self.tt += (t.square() * weight[:, None]).sum(0)

    def over(self, accelerator: "Accelerator") -> "RunningMoments":
        """The sums of all processes together."""
        every = RunningMoments(self.inputs, self.outputs, self.device)
        for name in ("weight", "x", "t", "xx", "tx", "tt"):
            setattr(every, name, cast(Tensor, accelerator.reduce(getattr(self, name), "sum")))
        return every

    def moments(self) -> Moments:
        """Means and covariances; some token must have a weight."""
        x, t = self.x / self.weight, self.t / self.weight
        spread = (self.tt / self.weight - t.square()).sum()
        covariance = self.xx / self.weight - torch.outer(x, x)
        return Moments(x, t, covariance, self.tx / self.weight - torch.outer(t, x), float(spread))
