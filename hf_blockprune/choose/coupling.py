"""What blocks of one Linear are worth once blocks of its neighbour are gone.

Each Linear's removal trace is taken with its neighbours dense. But a hidden unit that fc2 no longer reads need not be
computed by fc1, one that fc1 no longer computes is a constant that fc2's bias can hold, and a feature of query matters
as far as key still has it. After an allocation, importances are therefore corrected:

    f_u of fc1, value      times the share of the consumer's column u that is kept
    inputs of fc2, out     taken as constant where the producer's row is gone
    f_d of query           times the share of key's row d that is kept
    f_d of key             times the share of E[query_d^2] that is kept, its mean counting as kept

with shares of sum f W^2 var(x). Traces are taken again and blocks allocated anew; a few rounds settle.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..model.layers import shape_of
from ..model.structure import TransformerLayer
from ..reorder.hidden import entry_saliency, output_variance
from ..score.blocks import expand_mask
from ..score.statistics import LayerStatistics


def correct(
    layers: list[TransformerLayer],
    linears: dict[str, nn.Linear],
    statistics: dict[str, LayerStatistics],
    masks: dict[str, Tensor],
    block_shape: tuple[int, int],
) -> dict[str, LayerStatistics]:
    """Statistics of the coupled Linears as the masks make them.

    Args:
        layers: who feeds whom.
        linears: the dense Linears.
        statistics: of the dense model, for every Linear of the layers.
        masks: bool [block_rows, block_cols] by name, the allocation so far.
        block_shape: (rows, cols).

    Returns:
        New statistics of the Linears in `layers`, by name.
    """
    corrected: dict[str, LayerStatistics] = {}

    def saliency(name: str) -> tuple[Tensor, Tensor]:
        """Of all and of the kept entries."""
        every = entry_saliency(linears[name], statistics[name])
        entries = expand_mask(masks[name], (every.shape[0], every.shape[1]), block_shape).to(every.device)
        return every, every * entries

    def scale(name: str, share: Tensor) -> None:
        s = statistics[name]
        corrected[name] = replace(s, output_weight=s.need("output_weight") * share)

    for layer in layers:
        for producer, consumer in ((layer.fc1, layer.fc2), (layer.value, layer.out)):
            scale(producer, _share(*saliency(consumer), dim=0))
            alive = expand_mask(masks[producer], shape_of(linears[producer]), block_shape).any(dim=1)
            corrected[consumer] = _without_inputs(statistics[consumer], alive)
        scale(layer.query, _share(*saliency(layer.key), dim=1))
        scale(layer.key, _share_with_mean(linears[layer.query], statistics[layer.query], *saliency(layer.query)))
    return corrected


def drop_unused(
    layers: list[TransformerLayer],
    masks: dict[str, Tensor],
    linears: dict[str, nn.Linear],
    block_shape: tuple[int, int],
) -> dict[str, Tensor]:
    """The masks without blocks that are worth nothing, their neighbour being what it is.

    Those are rows of fc1 and value that nobody reads; columns of fc2 and out whose inputs are constant, which a bias
    can hold; and rows of query whose key is constant, which adds the same to all scores of a token.
    """
    used = {name: mask.clone() for name, mask in masks.items()}
    rows, cols = block_shape
    for layer in layers:
        for producer, consumer in ((layer.fc1, layer.fc2), (layer.value, layer.out)):
            features = linears[producer].out_features
            made = _of_features(masks[producer].any(dim=1), rows, features)
            read = _of_features(masks[consumer].any(dim=0), cols, features)
            used[producer] &= _of_blocks(read, rows)[:, None]
            used[consumer] &= _of_blocks(made, cols)
        used[layer.query] &= masks[layer.key].any(dim=1)[:, None]
    return used


def _of_features(blocks: Tensor, size: int, features: int) -> Tensor:
    """Each block's value for each of its features."""
    return blocks.repeat_interleave(size)[:features]


def _of_blocks(features: Tensor, size: int) -> Tensor:
    """Whether any feature of each block is true."""
    return torch.nn.functional.pad(features, (0, -len(features) % size)).view(-1, size).any(dim=1)


def _share(every: Tensor, kept: Tensor, *, dim: int) -> Tensor:
    """kept / every, and 1 where there is nothing."""
    total = every.sum(dim)
    return torch.where(total > 0, kept.sum(dim) / total.clamp(min=1e-300), 1.0)


def _share_with_mean(linear: nn.Linear, s: LayerStatistics, every: Tensor, kept: Tensor) -> Tensor:
    mean = linear.weight.detach().double() @ s.need("mean")
    if linear.bias is not None:
        mean = mean + linear.bias.detach().double()
    power, spread = mean.square(), output_variance(linear, s)
    total = power + spread
    kept_power = power + _share(every, kept, dim=1) * spread
    return torch.where(total > 0, kept_power / total.clamp(min=1e-300), 1.0)


def _without_inputs(s: LayerStatistics, alive: Tensor) -> LayerStatistics:
    """The statistics with inputs that are not alive held at their mean."""
    mean = s.need("mean")
    both = torch.outer(alive, alive).to(mean.device)
    return replace(s, second_moment=torch.where(both, s.need("second_moment"), torch.outer(mean, mean)))
