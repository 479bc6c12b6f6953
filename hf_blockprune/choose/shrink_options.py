"""How far the parts of a layer may shrink, and what each way costs the loss: hidden units, heads, features of heads.

An option says what stays of an attention or of an MLP as a whole. Its loss is that of the inputs that leave the reader
(out or fc2), once the reader's surviving weights have adapted (`score.shrink`), and, for features of query and key that
heads lose, that of the logits: with rotated heads (`reorder.rotation`) features of a head are uncorrelated on both
sides, so that feature d costs what query and key, each by itself, lose with it,

    1/2 (f_q,d E[q_d^2] + f_k,d var(k_d))      the mean of two estimates of the same, in units of `score.shrink`
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from ..hub.blockprune_heads import dense_heads_of
from ..hub.blockprune_layout import BlockSparseFormatError
from ..model.shrunk import LayerShape
from ..model.structure import TransformerLayer
from ..reorder.hidden import output_variance
from ..score.shrink import Columns, importance
from ..score.statistics import LayerStatistics
from ..score.trace import RemovalTrace

HEAD_STEP, HEAD_STEP_OF_BLOCKS = 8, 16  # features; what attention kernels like, and what fills blocks


@dataclass(frozen=True)
class Option:
    """What may stay of an attention or an MLP.

    Attributes:
        size: (heads, features of each) of an attention, (hidden units,) of an MLP.
        heads: which heads stay, of an attention; none of an MLP.
        loss: by name of the Linear whose factor of true over predicted loss holds for it.
    """

    size: tuple[int, ...]
    loss: dict[str, float]
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class UnitOptions:
    """Those of an MLP, the whole one first.

    Attributes:
        layer: of the MLP.
        options: with falling numbers of units.
        order: hidden units in the order in which they leave.
    """

    layer: TransformerLayer
    options: list[Option]
    order: tuple[int, ...]

    def units(self, option: Option) -> tuple[int, ...]:
        """Units that stay, rising."""
        return tuple(sorted(self.order[len(self.order) - option.size[0] :]))


def unit_options(layer: TransformerLayer, trace: RemovalTrace, step: int, least: float) -> UnitOptions:
    """The ways to shrink an MLP.

    Args:
        layer: of the MLP.
        trace: of fc2's columns, see `score.shrink.column_trace`.
        step: what numbers of units that stay are multiples of, but for the whole.
        least: share of the units that stay at least.
    """
    units = trace.grid[1]
    least_units = max(1, int(np.ceil(least * units)))
    sizes = [units, *range((units - 1) // step * step, 0, -step)]
    loss, at_once = trace.loss[0], trace.order.shape[-1]
    gone = {n: (units - n) // at_once for n in sizes if n >= least_units and (units - n) % at_once == 0}
    options = [Option((n,), {layer.fc1: float(loss[steps])}) for n, steps in gone.items()]
    return UnitOptions(layer, options, tuple(trace.order.flatten().tolist()))


def head_step(block_shape: tuple[int, int] | None) -> int:
    """What sizes of heads are multiples of; `block_shape` is (rows, cols) where blocks may leave too."""
    blocks = block_shape is not None and any(size % HEAD_STEP_OF_BLOCKS == 0 for size in block_shape)
    return HEAD_STEP_OF_BLOCKS if blocks else HEAD_STEP


def can_cut_heads(model: nn.Module, layer: TransformerLayer) -> bool:
    """Whether a layer's attention runs with smaller heads."""
    try:
        return dense_heads_of(model, layer.query)[0] == layer.heads
    except BlockSparseFormatError:
        return False


def head_options(
    layer: TransformerLayer,
    linears: dict[str, nn.Linear],
    statistics: dict[str, LayerStatistics],
    *,
    step: int | None,
    damping: float,
) -> list[Option]:
    """The ways to shrink an attention, the whole one first: some of its heads, with some first features of each.

    Args:
        layer: of the attention.
        linears: by name.
        statistics: theirs.
        step: what sizes of heads are multiples of, but for the whole; None where heads, not being rotated, leave as a
            whole or not at all.
        damping: relative, of the covariance.
    """
    columns = Columns(linears[layer.out].weight, statistics[layer.out], damping)
    products = _product_losses(layer, linears, statistics).cpu()
    size = linears[layer.query].out_features // layer.heads
    sizes = [size] if step is None else [size, *range((size - 1) // step * step, 0, -step)]
    options = []
    for heads in _some_heads(layer, columns, size):
        for n in sizes:
            shape = LayerShape(layer, heads, n, size, (), 0)
            gone = shape.gone_features()
            lacking = [h * size + d for h in heads for d in range(n, size)]
            losses = {
                layer.value: columns.loss(gone.to(columns.weight.device)),
                layer.query: float(products[lacking].sum()),
            }
            options.append(Option((len(heads), n), losses, heads))
    return options


def _some_heads(layer: TransformerLayer, columns: Columns, size: int) -> Iterator[tuple[int, ...]]:
    """All heads, then without the one that costs least, and so on; one stays."""
    heads = tuple(range(layer.heads))
    yield heads
    while len(heads) > 1 and not layer.heads_stay:
        fewer = [tuple(h for h in heads if h != gone) for gone in heads]
        heads = min(fewer, key=lambda kept: _loss_of_heads(layer, columns, size, kept))
        yield heads


def _loss_of_heads(layer: TransformerLayer, columns: Columns, size: int, kept: tuple[int, ...]) -> float:
    gone = LayerShape(layer, kept, size, size, (), 0).gone_features()
    return columns.loss(gone.to(columns.weight.device))


def _product_losses(
    layer: TransformerLayer, linears: dict[str, nn.Linear], statistics: dict[str, LayerStatistics]
) -> Tensor:
    """What the logits lose with each feature of query and key, float64 [features]."""
    query, key = linears[layer.query], linears[layer.key]
    mean = query.weight.detach().double() @ statistics[layer.query].need("mean")
    if query.bias is not None:
        mean = mean + query.bias.detach().double()
    asked = importance(statistics[layer.query]) * (output_variance(query, statistics[layer.query]) + mean.square())
    answered = importance(statistics[layer.key]) * output_variance(key, statistics[layer.key])
    return (asked + answered) / 2
