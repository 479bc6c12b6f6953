"""CORP: hidden units and dimensions of queries and keys go, and what they said is regressed on what stays.

Source: CORP, Closed-Form One-shot Representation-Preserving Structured Pruning for Transformers (Zhang and Yang 2026,
arXiv 2602.05243): its abstract, and what its repository (BOX-LEO/CORP) does, of which no code is here. From it: one
calibration pass through the dense model, without labels or gradients; in each layer the same number of units and
dimensions; units ranked by their energy E[x^2] times the share of tokens on which they are active, or that times their
weights' norms; removed units as affine functions of those that stay, by ridge regression folded into fc2 and its bias;
removed logits q_P k_P' as q_S M k_S', M by ridge regression folded into the weights of queries and keys.

Our reading: the split between MLPs and attention, the ranking and both ridges are chosen on held-back calibration
images; a ridge is a share of the mean variance. For logits the regression is solved exactly over all pairs of tokens of
each image, where the repository takes queries and keys for independent and makes I + M symmetric. Keys are centred over
each image's tokens, since softmax forgives what is the same for all keys; with that the affine part of the logits folds
into the query's bias. A dimension's rank is the energy of its logits. The repository can calibrate anew after each
layer; the paper's single pass is what is here.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.moments import Hidden, Moments
from benchmarks.narrow import bias_of, cut_units, narrow_attention, units_within
from hf_blockprune.cost.flops import count_flops
from hf_blockprune.model.layers import linear_in
from hf_blockprune.model.structure import TransformerLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS = True  # moments of queries and keys are needed
CHOICES: dict[str, tuple[Any, ...]] = {
    "dimensions": (0.5, 1.0, 0.75, 0.625, 0.375, 0.25),  # share of each head's that stays
    "rank": ("active energy", "active energy and weights"),
    "ridge": (1e-3, 1e-5, 1e-2),
    "logit_ridge": (1e-3, 1e-5, 1e-2),
}


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
        ValueError: the budget cannot be met with so many dimensions.
    """
    model = copy.deepcopy(dense)
    if settings["dimensions"] < 1:
        for layer, each in zip(layers, moments, strict=True):
            prune_logits(model, layer, each, settings["dimensions"], settings["logit_ridge"])
    units = units_within(budget, count_flops(model, size), model, layers) // len(layers)
    for layer, each in zip(layers, moments, strict=True):
        prune_units(model, layer, each.hidden, units, settings["rank"], settings["ridge"])
    return model


def prune_units(
    model: "PreTrainedModel", layer: TransformerLayer, hidden: Hidden, units: int, rank: str, ridge: float
) -> None:
    """Leave so many hidden units of a layer, in place."""
    fc1, fc2 = linear_in(model, layer.fc1), linear_in(model, layer.fc2)
    score = hidden.second.diagonal() * hidden.active
    if rank == "active energy and weights":
        score = score * fc1.weight.detach().norm(dim=1) * fc2.weight.detach().norm(dim=0)
    kept, removed = best(score, units)
    weight, bias = fc2.weight.detach().double(), bias_of(fc2).detach().double()
    slope, offset = regression(hidden.covariance, hidden.mean, kept, removed, ridge)
    lost = weight[:, removed]
    cut_units(model, layer, kept, weight[:, kept] + lost @ slope, bias + lost @ offset)


def prune_logits(
    model: "PreTrainedModel", layer: TransformerLayer, moments: Moments, share: float, ridge: float
) -> None:
    """Leave a share of the dimensions of each head's queries and keys of a layer, in place."""
    query, key = linear_in(model, layer.query), linear_in(model, layer.key)
    parts = [part.detach().double() for part in (query.weight, bias_of(query), key.weight, bias_of(key))]
    split = [part.unflatten(0, (layer.heads, -1)) for part in parts]
    made: list[tuple[Tensor, ...]] = []
    for head in range(layer.heads):
        queries, keys = moments.queries[:, head].double(), moments.keys[:, head].double()
        energy = (queries.diagonal(dim1=-2, dim2=-1)[:, :-1] * keys.diagonal(dim1=-2, dim2=-1)).sum(0)
        kept, removed = best(energy, round(share * len(energy)))
        fitted = logit_regression(queries, keys, kept, removed, ridge)
        made.append(fold(fitted, *(part[head][kept] for part in split)))
    weights = [torch.cat(parts) for parts in zip(*made, strict=True)]
    narrow_attention(model, layer, (weights[0], weights[1]), (weights[2], weights[3]))


def best(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(positions of the best, of the others), both in their order."""
    order = score.argsort(descending=True, stable=True)
    return order[:count].sort().values, order[count:].sort().values


def regression(covariance: Tensor, mean: Tensor, kept: Tensor, removed: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Removed inputs as slope times the kept ones plus an offset, with the least squared error plus ridge.

    Args:
        covariance: of all inputs, [inputs, inputs].
        mean: of all inputs, [inputs].
        kept: positions of those that stay.
        removed: positions of those that go.
        ridge: weight of the slope's squared norm, as a share of the mean variance of the kept ones.

    Returns:
        (slope [removed, kept], offset [removed]).
    """
    own = covariance[kept][:, kept]
    own = own + ridge * own.diagonal().mean() * torch.eye(len(kept), dtype=own.dtype)
    slope = torch.linalg.solve(own, covariance[kept][:, removed]).T
    return slope, mean[removed] - slope @ mean[kept]


def logit_regression(queries: Tensor, keys: Tensor, kept: Tensor, removed: Tensor, ridge: float) -> Tensor:
    """The M with the least sum over images of |Q_P K_P' - [Q_S, 1] M K_S'|^2, plus ridge.

    Its normal equations are sum over images of A M B = C, with A of [Q_S, 1] and B of K_S; rows of M one after the
    other make them one system with the matrix sum of A (x) B. The row that meets the 1 is not shrunk.

    Args:
        queries: sums over tokens of [q, 1] [q, 1]', [images, d + 1, d + 1].
        keys: sums over tokens of k k', k centred over tokens, [images, d, d].
        kept: positions of the dimensions that stay.
        removed: positions of those that go.
        ridge: weight of M's squared norm, as a share of the system's mean diagonal.

    Returns:
        [kept + 1, kept].
    """
    with_one = torch.cat([kept, kept.new_tensor([keys.shape[-1]])])
    a, b = queries[:, with_one][:, :, with_one], keys[:, kept][:, :, kept]
    wanted = (queries[:, with_one][:, :, removed] @ keys[:, removed][:, :, kept]).sum(0)
    rows, columns = wanted.shape
    system = (a.flatten(1).T @ b.flatten(1)).view(rows, rows, columns, columns)
    system = system.transpose(1, 2).reshape(rows * columns, rows * columns)
    shrunk = (rows - 1) * columns
    diagonal = system.diagonal()
    diagonal[:shrunk] += ridge * diagonal[:shrunk].mean()
    return torch.cholesky_solve(wanted.view(-1, 1), torch.linalg.cholesky(system)).view(rows, columns)


def fold(
    fitted: Tensor, query: Tensor, query_bias: Tensor, key: Tensor, key_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kept rows of queries and keys with what `logit_regression` found in the queries.

    Args:
        fitted: [kept + 1, kept].
        query, key: weights [kept, width].
        query_bias, key_bias: [kept].

    Returns:
        The four in the same order.
    """
    turn = torch.eye(len(query), dtype=query.dtype) + fitted[:-1]
    return turn.T @ query, turn.T @ query_bias + fitted[-1], key, key_bias
