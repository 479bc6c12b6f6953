"""The residual stream's features change places, in all layers at once, so that those that matter alike share blocks."""

import torch
from torch import Tensor, nn

from ..model.structure import ResidualStream
from ..score.statistics import LayerStatistics
from .changes import Changes
from .hidden import entry_saliency
from .order import Profile, pack


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
    saliency = {name: entry_saliency(linear, statistics[name]).float() for name, linear in linears.items()}
    read = [Profile.of_cols(saliency[name], block_shape) for name in stream.readers if name in linears]
    written = [Profile.of_rows(saliency[name], block_shape) for name in stream.writers if name in linears]
    profiles = [
        Profile(torch.cat([profile.saliency for profile in side], dim=1), side[0].size)
        for side in (read, written)
        if side
    ]
    worth = torch.stack([profile.saliency.sum(dim=1) for profile in profiles]).sum(dim=0)
    return pack(worth.argsort(descending=True, stable=True), profiles)


def permute_stream(model: nn.Module, stream: ResidualStream, order: Tensor, changes: Changes | None = None) -> None:
    """Give a model's residual stream another order, in place; its predictions stay the same.

    Args:
        model: any with such a stream.
        stream: where its features are met.
        order: int64 [features]; feature i of the new stream is feature order[i] of the old one.
        changes: notes what is done, so that it can be undone.
    """
    changes = changes or Changes()
    for name, axis in stream.axes.items():
        parameter = model.get_parameter(name)
        times = torch.arange(parameter.shape[axis] // stream.width)
        index = (times[:, None] * stream.width + order.cpu()).flatten()
        changes.permute(parameter, axis, index)


def permute_statistics(
    stream: ResidualStream, statistics: dict[str, LayerStatistics], order: Tensor
) -> dict[str, LayerStatistics]:
    """The statistics that the permuted model would have."""
    return {
        name: s.permuted(
            inputs=order if name in stream.readers else None, outputs=order if name in stream.writers else None
        )
        for name, s in statistics.items()
    }
