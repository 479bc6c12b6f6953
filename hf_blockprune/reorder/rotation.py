"""Free rotations of attention's heads: features of a head mix so that the first ones carry most; the function stays.

A head's query and key may be multiplied by A and A^-T, its value by B and the output projection's columns by B^-1: what
attention computes is the same, for models without rotary position embeddings. With C_q the second moment of the head's
queries, C_k the covariance of its keys (a constant key adds the same to all of a token's logits, which softmax
forgives), C_q = L_q L_q^T, C_k = L_k L_k^T and L_q^T L_k = U S V^T, the rotation

    A = S^1/2 U^T L_q^-1      makes both S, so that the features that are dropped last to first cost the logits least

(the best approximation of q k^T of lower rank). With C the covariance of what the output projection reads of a head,
C = L L^T, F the importance of its outputs and L^T W_o^T F W_o L = V D V^T,

    B = D^1/4 V^T L^-1        makes both C and W_o^T F W_o equal to D^1/2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.structure import TransformerLayer
from ..score.statistics import LayerStatistics
from .changes import Changes

# Below this share of the largest, a feature carries nothing but rounding; its scale is not made any smaller.
LEAST = 1e-8


@dataclass(frozen=True)
class Rotation:
    """New features of an attention's heads, float64 [heads, features, features] each.

    Attributes:
        products: query' = A query in each head; key' = A^-T key.
        values: value' = B value.
    """

    products: Tensor
    values: Tensor


def choose_rotation(
    layer: TransformerLayer, linears: dict[str, nn.Linear], statistics: dict[str, LayerStatistics]
) -> Rotation:
    """The rotation that sorts the features of each head by what it would cost to drop them.

    Args:
        layer: whose attention.
        linears: by name.
        statistics: theirs, with Fisher parts.
    """
    query = _outputs(linears[layer.query], statistics[layer.query], centred=False)
    key = _outputs(linears[layer.key], statistics[layer.key], centred=True)
    weight, read = linears[layer.out].weight.detach().double(), statistics[layer.out]
    cost = (weight.t() * read.need("output_weight")) @ weight
    heads = zip(*(_heads(matrix, layer.heads) for matrix in (query, key, read.safe_covariance, cost)), strict=True)
    chosen = [(_for_products(q, k), _for_values(v, c)) for q, k, v, c in heads]
    products, values = (torch.stack(side) for side in zip(*chosen, strict=True))
    return Rotation(products, values)


def _outputs(linear: nn.Linear, s: LayerStatistics, *, centred: bool) -> Tensor:
    """Second moment of a Linear's outputs, [out, out]; of what varies of them where it is centred."""
    weight = linear.weight.detach().double()
    moment = weight @ s.covariance @ weight.t()
    if centred:
        return moment
    mean = weight @ s.need("mean")
    if linear.bias is not None:
        mean = mean + linear.bias.detach().double()
    return moment + torch.outer(mean, mean)


def _heads(matrix: Tensor, heads: int) -> list[Tensor]:
    """The blocks on the diagonal that belong to each head."""
    size = len(matrix) // heads
    return [matrix[i : i + size, i : i + size] for i in range(0, len(matrix), size)]


def _root(moment: Tensor) -> Tensor:
    """L with L L^T the moment, of full rank."""
    values, vectors = torch.linalg.eigh(moment)
    return _signed(vectors) * values.clamp(min=LEAST * float(values[-1].clamp(min=1e-300))).sqrt()


def _for_products(query: Tensor, key: Tensor) -> Tensor:
    """A of one head, from the moments of its queries and keys."""
    root = _root(query)
    u, s, _ = torch.linalg.svd(root.t() @ _root(key))
    return s.clamp(min=LEAST * float(s[0])).sqrt()[:, None] * torch.linalg.solve(root, _signed(u).t(), left=False)


def _for_values(moment: Tensor, cost: Tensor) -> Tensor:
    """B of one head, from the covariance of what is read of it and what its features cost the loss."""
    root = _root(moment)
    values, vectors = torch.linalg.eigh(root.t() @ cost @ root)
    values = values.clamp(min=LEAST * float(values[-1].clamp(min=1e-300)))
    return (values.pow(0.25)[:, None] * torch.linalg.solve(root, _signed(vectors).t(), left=False)).flip(0)


def _signed(vectors: Tensor) -> Tensor:
    """Vectors [features, vectors] with their largest entry positive: else rounding would decide on signs."""
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


@torch.no_grad()
def apply_rotation(
    layer: TransformerLayer,
    rotation: Rotation,
    linears: dict[str, nn.Linear],
    statistics: dict[str, LayerStatistics],
    changes: Changes | None = None,
) -> dict[str, LayerStatistics]:
    """Rotate the heads of a layer's attention in place.

    Args:
        layer: whose attention.
        rotation: for each of its heads.
        linears: by name.
        statistics: theirs.
        changes: notes what is done, so that it can be undone.

    Returns:
        The statistics that the rotated layer would have, by name.
    """
    changes = changes or Changes()
    products, values = (torch.block_diag(*side) for side in (rotation.products, rotation.values))
    inverse = torch.linalg.inv(values)
    moved = {}
    for name, matrix in (
        (layer.query, products),
        (layer.key, torch.linalg.inv(products).t()),
        (layer.value, values),
    ):
        linear = linears[name]
        _overwrite(changes, linear.weight, lambda weight, matrix=matrix: matrix @ weight)
        if linear.bias is not None:
            _overwrite(changes, linear.bias, lambda bias, matrix=matrix: matrix @ bias)
        moved[name] = statistics[name].transformed(outputs=matrix)
    _overwrite(changes, linears[layer.out].weight, lambda weight: weight @ inverse)
    moved[layer.out] = statistics[layer.out].transformed(inputs=values)
    return moved


def _overwrite(changes: Changes, parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    changes.overwrite(parameter, change(parameter.detach().double()).to(parameter.dtype))
