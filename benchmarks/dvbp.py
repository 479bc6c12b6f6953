"""DVBP + OB2C: hidden units by denoised variance, and the best next weights without them, in closed form.

Source: Denoised Variance-Based Pruning with Optimal Brain Bias Compensation (Lee, Choo and Jeon 2026, arXiv
2608.17657), after Variance-Based Pruning (Berisha, Mehnert and Condurache 2025, arXiv 2507.12988). From it: MLPs alone
are pruned; the covariance C of what fc2 reads, over all tokens; its eigenvalues below the upper edge of a
Marchenko-Pastur law, fitted by the median with units over images as the law's ratio, are noise; a unit's score is
(1 - p) times its variance plus p times the one that is left without noise, p the share that goes; one ranking over all
layers; the update of fc2 and its bias; and damping by a share of the mean variance.

Our reading: the paper's text updates weights by C, its listing by the denoised C, and the size of the damping is not
given, so both are chosen on held-back calibration images. With more units than images the median is that of the law
without its mass at zero, which a covariance of tokens does not show. One unit of each layer stays whatever its score.
The appendix also tries the method on attention, where it loses far more; as in the main results, MLPs pay for it all.
"""

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.moments import Moments
from benchmarks.narrow import bias_of, cut_units, units_within
from hf_blockprune.cost.flops import count_flops
from hf_blockprune.model.layers import linear_in
from hf_blockprune.model.structure import TransformerLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS = False  # moments of queries and keys are not needed
CHOICES: dict[str, tuple[Any, ...]] = {
    "covariance": ("denoised", "sample"),
    "damping": (1e-3, 1e-5, 1e-4, 1e-2, 1e-1, 1.0),
}
STEPS = 20000  # of the integral over the law's density


def prune(
    dense: "PreTrainedModel",
    layers: list[TransformerLayer],
    moments: list[Moments],
    budget: float,
    size: tuple[int, int],
    settings: dict[str, Any],
) -> "PreTrainedModel":
    """A smaller copy.

    Args:
        dense: the model.
        layers: its layers.
        moments: of each layer.
        budget: FLOPs of an image through the whole model.
        size: (height, width) of the image.
        settings: one of each of `CHOICES`.

    Raises:
        ValueError: MLPs alone cannot meet the budget.
    """
    model = copy.deepcopy(dense)
    stay = units_within(budget, count_flops(model, size), model, layers)
    covariances = [each.hidden.covariance for each in moments]
    cleaned = [denoised(each, m.hidden.images) for each, m in zip(covariances, moments, strict=True)]
    share = 1 - stay / sum(map(len, covariances))
    scores = [(1 - share) * c.diagonal() + share * d.diagonal() for c, d in zip(covariances, cleaned, strict=True)]
    used = cleaned if settings["covariance"] == "denoised" else covariances
    for layer, each, mask, covariance in zip(layers, moments, best(scores, stay), used, strict=True):
        fc2 = linear_in(model, layer.fc2)
        removed, kept = (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]
        weight, bias = fc2.weight.detach().double(), bias_of(fc2).detach().double()
        weight, bias = ob2c(weight, bias, each.hidden.mean, covariance, removed, settings["damping"])
        cut_units(model, layer, kept, weight[:, kept], bias)
    return model


def best(scores: list[Tensor], stay: int) -> list[Tensor]:
    """Which units stay, bool [units] of each layer: the best of all layers, and the best of each."""
    raised = [s.index_fill(0, s.argmax(), math.inf) for s in scores]
    order = torch.cat(raised).argsort(descending=True, stable=True)
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:stay]] = True
    return list(mask.split([len(s) for s in scores]))


def ob2c(
    weight: Tensor, bias: Tensor, mean: Tensor, covariance: Tensor, removed: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """The weights that do best without some inputs, and the bias that goes with them; equations 7 and 10.

    Args:
        weight: [out, in].
        bias: [out].
        mean: of the inputs, [in].
        covariance: of the inputs, [in, in].
        removed: positions of the inputs that go.
        damping: added to each variance, as a share of their mean.

    Returns:
        (weight [out, in] with zeros for what is removed, bias [out]).
    """
    ridge = damping * covariance.diagonal().mean()
    inverse = torch.linalg.inv(covariance + ridge * torch.eye(len(mean), dtype=covariance.dtype))
    rows = inverse[removed]
    change = -weight[:, removed] @ torch.linalg.solve(rows[:, removed], rows)
    return (weight + change).index_fill(1, removed, 0.0), bias - change @ mean


def denoised(covariance: Tensor, images: int) -> Tensor:
    """A covariance [units, units] without the eigenvalues that noise alone could have."""
    values, vectors = torch.linalg.eigh(covariance)
    ratio = len(values) / images
    noise = values.median() / marchenko_pastur_median(ratio)
    values = values.where(values > noise * (1 + math.sqrt(ratio)) ** 2, 0.0)
    return vectors * values @ vectors.T


def marchenko_pastur_median(ratio: float) -> float:
    """Median of the continuous part of the law of unit variance, of features over samples."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # x by its angle on the half circle over the law's support, where the density has no pole.
    angle = (torch.arange(STEPS, dtype=torch.float64) + 0.5) * math.pi / STEPS
    x = (low + high) / 2 - (high - low) / 2 * angle.cos()
    mass = (angle.sin().square() / x).cumsum(0)
    return float(x[torch.searchsorted(mass, mass[-1] / 2)])
