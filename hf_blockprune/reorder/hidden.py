"""Free permutations: hidden units change places so that those worth little share blocks; the function stays the same.

Units of the MLP move together in fc1's rows and fc2's columns. Within a head, features of value move with columns of
out, and features of query with those of key; heads move whole. Units are sorted by what the loss would be without them,
so that whole blocks of nearly useless units form at the end, which `choose.coupling` can then remove from both sides,
and then packed. `reorder.stream` does the same for the features between layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.structure import TransformerLayer
from ..score.blocks import block_sums
from ..score.statistics import LayerStatistics
from .changes import Changes
from .order import Profile, pack


@dataclass(frozen=True)
class Move:
    """New order of the features that leave `producers` as rows and, but for query and key, enter `consumer` as columns.

    Attributes:
        order: int64 [features]; feature i of the new model is feature order[i] of the old one.
    """

    producers: tuple[str, ...]
    consumer: str | None
    order: Tensor


def sorting_moves(
    layers: list[TransformerLayer],
    linears: dict[str, nn.Linear],
    statistics: dict[str, LayerStatistics],
    *,
    rotated: bool = False,
) -> list[Move]:
    """The moves that sort each layer's hidden units, its heads, and the features of each head by falling saliency.

    Heads that are rotated have their features in an order already.
    """
    moves = []
    for layer in layers:
        units = _column_saliency(linears[layer.fc2], statistics[layer.fc2])
        moves.append(Move((layer.fc1,), layer.fc2, units.argsort(descending=True, stable=True)))
        features = _column_saliency(linears[layer.out], statistics[layer.out])
        products = _row_saliency(linears[layer.query], statistics[layer.query])
        products = products + _row_saliency(linears[layer.key], statistics[layer.key])
        worth = (features + products).view(layer.heads, -1).sum(dim=1)
        heads = torch.arange(layer.heads, device=worth.device)
        if not layer.heads_stay:
            heads = worth.argsort(descending=True, stable=True)
        for worth, producers, consumer in (
            (features, (layer.value,), layer.out),
            (products, (layer.query, layer.key), None),
        ):
            order = _in_order(len(worth), heads) if rotated else _falling(worth, heads)
            moves.append(Move(producers, consumer, order))
    return moves


def packing_moves(
    layers: list[TransformerLayer],
    linears: dict[str, nn.Linear],
    statistics: dict[str, LayerStatistics],
    block_shape: tuple[int, int],
    *,
    rotated: bool = False,
) -> list[Move]:
    """The moves that pack the saliency of hidden units, and of the features of heads not rotated, into blocks."""
    names = [name for layer in layers for name in layer.names()]
    saliency = {name: entry_saliency(linears[name], statistics[name]).float() for name in names}
    moves = []
    for layer in layers:
        pairs = ((layer.fc1, layer.fc2, 1), (layer.value, layer.out, layer.heads))
        for producer, consumer, heads in pairs[:1] if rotated else pairs:
            sides = [Profile.of_rows(saliency[producer], block_shape), Profile.of_cols(saliency[consumer], block_shape)]
            moves.append(Move((producer,), consumer, _packed(sides, heads)))
        if not rotated:
            both = torch.cat([saliency[layer.query], saliency[layer.key]], dim=1)
            order = _packed([Profile.of_rows(both, block_shape)], layer.heads)
            moves.append(Move((layer.query, layer.key), None, order))
    return moves


def _packed(profiles: list[Profile], heads: int) -> Tensor:
    """An order that packs the features of each head."""
    features = torch.arange(len(profiles[0].saliency), device=profiles[0].saliency.device)
    parts = []
    for head in features.split(len(features) // heads):
        order = torch.arange(len(head), device=head.device)
        parts.append(head[pack(order, [profile.part(head) for profile in profiles])])
    return torch.cat(parts)


def apply_moves(
    moves: list[Move],
    linears: dict[str, nn.Linear],
    statistics: dict[str, LayerStatistics],
    changes: Changes | None = None,
) -> dict[str, LayerStatistics]:
    """Permute the Linears in place.

    Args:
        moves: in their order.
        linears: by name.
        statistics: theirs.
        changes: notes what is done, so that it can be undone.

    Returns:
        The statistics that the permuted model would have.
    """
    moved, changes = dict(statistics), changes or Changes()
    for move in moves:
        for name in move.producers:
            linear, order = linears[name], move.order.to(linears[name].weight.device)
            changes.permute(linear.weight, 0, order)
            if linear.bias is not None:
                changes.permute(linear.bias, 0, order)
            moved[name] = moved[name].permuted(outputs=order)
        if move.consumer is not None:
            linear, order = linears[move.consumer], move.order.to(linears[move.consumer].weight.device)
            changes.permute(linear.weight, 1, order)
            moved[move.consumer] = moved[move.consumer].permuted(inputs=order)
    return moved


def block_saliency_kept(
    linears: dict[str, nn.Linear], statistics: dict[str, LayerStatistics], block_shape: tuple[int, int], share: float
) -> float:
    """Share of all saliency f_r W_rc^2 var(x_c) that the best `share` of blocks hold: how well it is packed."""
    blocks = torch.cat(
        [
            block_sums(entry_saliency(linear, statistics[name]), block_shape).flatten()
            for name, linear in linears.items()
        ]
    )
    best = blocks.sort(descending=True).values[: round(share * len(blocks))]
    return float(best.sum() / blocks.sum().clamp(min=1e-300))


def entry_saliency(linear: nn.Linear, s: LayerStatistics) -> Tensor:
    """f_r W_rc^2 var(x_c) for each weight, float64 [out, in]."""
    return linear.weight.detach().double().square() * s.variance * s.need("output_weight")[:, None]


def _column_saliency(linear: nn.Linear, s: LayerStatistics) -> Tensor:
    return entry_saliency(linear, s).sum(dim=0)


def _row_saliency(linear: nn.Linear, s: LayerStatistics) -> Tensor:
    return s.need("output_weight") * output_variance(linear, s)


def output_variance(linear: nn.Linear, s: LayerStatistics) -> Tensor:
    """Variance of each output, [out]."""
    weight = linear.weight.detach().double()
    return ((weight @ s.covariance) * weight).sum(dim=1).clamp(min=0)


def _in_order(features: int, heads: Tensor) -> Tensor:
    """Features head by head in the given order of heads, those of each as they are."""
    return torch.arange(features, device=heads.device).view(len(heads), -1)[heads].flatten()


def _falling(values: Tensor, heads: Tensor) -> Tensor:
    """Features head by head in the given order of heads, those of each by falling values."""
    grouped = values.view(len(heads), -1)
    order = grouped.argsort(dim=1, descending=True, stable=True)
    return (order + torch.arange(len(heads), device=values.device)[:, None] * grouped.shape[1])[heads].flatten()
