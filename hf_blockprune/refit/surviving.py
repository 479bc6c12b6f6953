"""One Linear to solve for, on all processes."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..score.blocks import expand_mask
from .solve import RIDGES, Moments, Refit, refit

if TYPE_CHECKING:
    from accelerate import Accelerator


def inputs_used(linear: nn.Linear, mask: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """Indices of the inputs that some kept block reads."""
    entries = expand_mask(mask.any(dim=0, keepdim=True), (1, linear.in_features), (1, block_shape[1]))
    return entries[0].nonzero().squeeze(1).to(linear.weight.device)


@dataclass
class SurvivingWeights:
    """A Linear to solve for, its mask, and the inputs that its moments hold."""

    name: str
    module: nn.Linear
    mask: Tensor
    block_shape: tuple[int, int]
    inputs: Tensor

    def refit(self, fitted: Moments, held_back: Moments | None, accelerator: "Accelerator") -> Refit:
        """Solve on all processes, each with some of the ridges, and write the best solution into the module."""
        from accelerate.utils import broadcast, gather_object

        ranks, rank = accelerator.num_processes, accelerator.process_index
        ridges = RIDGES[rank::ranks] if held_back is not None else RIDGES
        result = self._solve(fitted, held_back, ridges) if ridges else None
        mine = (math.inf, 0.0) if result is None else (result.error, result.ridge)
        every = gather_object([mine]) if ranks > 1 else [mine]
        error, ridge = best = min(every)
        if math.isinf(error):
            raise ModelError(f"{self.name}: its inputs are too dependent to refit; use more calibration images")
        solution = [self.module.weight.detach().clone(), self.module.weight.new_zeros(self.module.out_features)]
        if result is not None:
            solution = [result.weight, result.bias]
        if ranks > 1:
            solution = [cast(Tensor, broadcast(part.contiguous(), every.index(best))) for part in solution]
        weight, bias = solution
        self._write(weight, bias)
        return Refit(weight, bias, ridge, error)

    def _solve(self, fitted: Moments, held_back: Moments | None, ridges: tuple[float, ...]) -> Refit | None:
        weight, columns = self.module.weight.detach(), self.mask.any(dim=0)
        mask = self.mask[:, columns].to(weight.device)
        try:
            found = refit(weight[:, self.inputs], mask, self.block_shape, fitted, held_back, ridges)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            return None
        whole = torch.zeros_like(weight)
        whole[:, self.inputs] = found.weight
        return Refit(whole, found.bias, found.ridge, found.error)

    def _write(self, weight: Tensor, bias: Tensor) -> None:
        self.module.weight.data.copy_(weight)
        if self.module.bias is None:
            self.module.bias = nn.Parameter(torch.empty_like(bias))
        self.module.bias.data.copy_(bias)
