"""What else multiplies with a sparse matrix on a GPU: NVIDIA's 2:4 pattern and torch's own BSR, through torch."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import random_mask, recorded
from hf_blockprune.measure.stopwatch import by_turns, ratio

BSR_BLOCK = 64
SPARSITIES = (0.5, 0.7)


@torch.no_grad()
def rivals(x: Tensor, out_features: int, *, seconds: float, device: str) -> dict[str, Any]:
    """Ratios to `F.linear` by name; a text where one does not run here.

    Args:
        x: [tokens, in_features].
        out_features: of the random weight.
        seconds: about how long each takes to time.
        device: "cuda" or "cpu".
    """
    weight = torch.randn(out_features, x.shape[1], device=x.device, dtype=x.dtype)
    whole = -len(x) % BSR_BLOCK  # both need a number of tokens that they can divide
    padded = F.pad(x, (0, 0, 0, whole))
    makers: dict[str, Callable[[], Tensor]] = {"semi_structured": lambda: two_in_four(weight)}
    for sparsity in SPARSITIES:
        makers[f"torch_bsr_{sparsity:.0%}".replace("%", "")] = lambda sparsity=sparsity: bsr(weight, sparsity)
    row: dict[str, Any] = {}
    for name, make in makers.items():
        try:
            other = make()
            runs = {"dense": lambda: F.linear(x, weight), name: lambda other=other: F.linear(padded, other)}
            runs = {key: recorded(run, device) for key, run in runs.items()}
            times = by_turns(runs, seconds=seconds, device=device)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            row[f"{name}_ratio_to_dense"] = f"does not run: {str(error).splitlines()[0][:100]}"
            continue
        row[f"{name}_ratio_to_dense"] = ratio(times, "dense", name)[0]
    return row


def two_in_four(weight: Tensor) -> Tensor:
    """The weight with the smaller two of every four neighbours removed, in the format of sparse tensor cores."""
    groups = weight.view(-1, 4)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, dim=1).indices, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it a prototype
        return torch.sparse.to_sparse_semi_structured((groups * kept).view_as(weight))


def bsr(weight: Tensor, sparsity: float) -> Tensor:
    """The weight without a share of its blocks, in torch's block-sparse format."""
    grid = weight.shape[0] // BSR_BLOCK, weight.shape[1] // BSR_BLOCK
    mask = random_mask(grid, sparsity, torch.Generator().manual_seed(0)).to(weight.device)
    full = mask.repeat_interleave(BSR_BLOCK, 0).repeat_interleave(BSR_BLOCK, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (weight * full).to_sparse_bsr((BSR_BLOCK, BSR_BLOCK))
