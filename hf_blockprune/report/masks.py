"""What masks keep of a model, for its report."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..cost.flops import ModelFlops
from ..hub.blockprune_heads import CutHeads
from ..refit.layerwise import LayerRefit
from ..score.blocks import block_sizes, grid_shape
from .shares import KeptLayer, kept_shares
from .values import LayerReport, MaskReport


def describe_masks(
    targets: dict[str, nn.Linear],
    flops: ModelFlops,
    masks: dict[str, Tensor],
    losses: dict[str, float],
    block_shape: tuple[int, int],
    loss_factors: dict[str, float],
    trace_seconds: dict[str, float],
    dense_shapes: Mapping[str, tuple[int, int]] | None = None,
    heads: Sequence[CutHeads] = (),
) -> MaskReport:
    """What the masks keep, in all and layer by layer.

    Args:
        targets: the Linears by name, as the masks find them: some may be smaller than the dense model's.
        flops: of the model before anything left it but tokens.
        masks: bool [block_rows, block_cols] by name.
        losses: what they are predicted to cost, by name.
        block_shape: (rows, cols).
        loss_factors: true over predicted loss by name, empty where it was not measured; predicted losses hold it.
        trace_seconds: time that each layer's removal traces took, by name; it may lack some.
        dense_shapes: (out_features, in_features) of the dense model's, by name, for those that are smaller.
        heads: what is left of attentions that are smaller.
    """
    layers, kept = [], []
    of_attentions = {name for attention in heads for name in attention.names()}
    for name, mask in masks.items():
        kept_shape = (targets[name].out_features, targets[name].in_features)
        shape = (dense_shapes or {}).get(name, kept_shape)
        weights = int(block_sizes(kept_shape, block_shape)[mask].sum())
        blocks, kept_blocks = math.prod(grid_shape(shape, block_shape)), int(mask.sum())
        tokens, dense_tokens = flops.linear_tokens[name], flops.dense.linear_tokens[name]
        kept.append(KeptLayer(tokens, dense_tokens, shape[0] * shape[1], weights, blocks, kept_blocks))
        layers.append(
            LayerReport(
                name=name,
                shape=list(shape),
                block_shape=list(block_shape),
                kept_blocks=kept_blocks,
                blocks=blocks,
                density=kept_blocks / blocks,
                kept_shape=None if kept_shape == shape else list(kept_shape),
                cut_units=0 if name in of_attentions else shape[0] - kept_shape[0],
                predicted_loss=losses[name],
                loss_factor=loss_factors.get(name),
                seconds=round(trace_seconds.get(name, 0.0), 3),
            )
        )
    cut = sum(attention.dense_features - attention.features for attention in heads)
    return MaskReport(**kept_shares(kept, flops, heads), cut_head_features=cut, layers=layers)


def add_refits(masks: MaskReport, refits: dict[str, LayerRefit]) -> None:
    """Write into the layers what the refit came to, by name."""
    for layer in masks.layers:
        refit = refits.get(layer.name)
        if refit is not None:
            layer.ridge, layer.error_after_refit = refit.ridge, refit.error
            layer.seconds = round((layer.seconds or 0.0) + refit.seconds, 3)


def add_cuts(masks: MaskReport, cuts: dict[str, int]) -> None:
    """Write into the layers how many more of an fc1's outputs were cut, with fc2's inputs, by its name."""
    for layer in masks.layers:
        layer.cut_units += cuts.get(layer.name, 0)
