"""The residual stream's features change places so that columns and rows that matter alike share blocks.

One order serves every layer, so sorting alone does little. Features are sorted, then exchanged between groups as long
as that lowers the sum of the square roots of all blocks' saliencies, which is low where saliency is packed into few.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .layer_statistics import LayerStatistics
from .permutation import entry_saliency
from .structure import ResidualStream

SWEEPS = 8
# Gains below this share of the whole are rounding.
LEAST_GAIN = 1e-6


def choose_order(
    stream: ResidualStream,
    linears: dict[str, nn.Linear],
    statistics: dict[str, LayerStatistics],
    block_shape: tuple[int, int],
) -> Tensor:
    """A good order of the stream's features.

    Args:
        stream: where they are met.
        linears: the Linears that are pruned; others do not matter.
        statistics: theirs.
        block_shape: (rows, cols).

    Returns:
        int64 [features]; feature i of the new stream is feature order[i] of the old one.
    """
    rows, cols = block_shape
    saliency = {name: entry_saliency(linear, statistics[name]).float() for name, linear in linears.items()}
    read = [_group_sums(saliency[name], rows).t() for name in stream.readers if name in linears]
    written = [_group_sums(saliency[name].t(), cols).t() for name in stream.writers if name in linears]
    profiles = [(torch.cat(parts, dim=1), size) for parts, size in ((read, cols), (written, rows)) if parts]
    worth = torch.stack([profile.sum(dim=1) for profile, _ in profiles]).sum(dim=0)
    return pack(worth.argsort(descending=True, stable=True), profiles)


def pack(order: Tensor, profiles: list[tuple[Tensor, int]], sweeps: int = SWEEPS) -> Tensor:
    """Exchange features between groups until no exchange packs saliency better, or `sweeps` times for each feature.

    Args:
        order: the order to begin with, [features].
        profiles: (saliency of each feature in each line of blocks [features, lines], features in a group). A group's
            sums are its blocks' saliencies.
        sweeps: bound on the work.
    """
    order = order.clone()
    profiles = [(profile, size) for profile, size in profiles if 1 < size < len(order)]
    least = LEAST_GAIN * sum(float(_group_sums(profile[order], size).sqrt().sum()) for profile, size in profiles)
    for _ in range(sweeps if profiles else 0):
        exchanged = False
        for i in range(len(order)):
            changes = torch.stack([_changes(profile[order], size, i) for profile, size in profiles]).sum(dim=0)
            j = int(changes.argmin())
            if changes[j] < -least:
                order[[i, j]] = order[[j, i]]
                exchanged = True
        if not exchanged:
            break
    return order


def _changes(ordered: Tensor, size: int, i: int) -> Tensor:
    """How the sum of roots would change if feature i and each other one exchanged places, [features]."""
    group = torch.arange(len(ordered), device=ordered.device) // size
    sums = _group_sums(ordered, size)
    roots = sums.sqrt().sum(dim=1)
    here = (sums[group[i]] - ordered[i] + ordered).clamp(min=0).sqrt().sum(dim=1)
    there = (sums[group] - ordered + ordered[i]).clamp(min=0).sqrt().sum(dim=1)
    return torch.where(group == group[i], 0.0, here + there - roots[group[i]] - roots[group])


def _group_sums(values: Tensor, size: int) -> Tensor:
    """Sums over each `size` following rows, [ceil(rows / size), columns]."""
    group = torch.arange(len(values), device=values.device) // size
    return values.new_zeros(int(group[-1]) + 1, values.shape[1]).index_add_(0, group, values)


@torch.no_grad()
def permute_stream(model: nn.Module, stream: ResidualStream, order: Tensor) -> None:
    """Give a model's residual stream another order, in place; its predictions stay the same."""
    for name, axis in stream.axes.items():
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.index_select(axis, order.to(parameter.device)))


def permute_statistics(
    stream: ResidualStream, statistics: dict[str, LayerStatistics], order: Tensor
) -> dict[str, LayerStatistics]:
    """The statistics that the permuted model would have."""
    moved = dict(statistics)
    for name in set(statistics).intersection(stream.readers):
        s = statistics[name]
        mean, second_moment = s.need("mean")[order], s.need("second_moment")[order][:, order]
        moved[name] = replace(s, mean=mean, second_moment=second_moment)
    for name in set(statistics).intersection(stream.writers):
        s = statistics[name]
        moved[name] = replace(s, output_weight=s.need("output_weight")[order])
    return moved
