"""Which shares of a model's work and weights pruned layers keep: once for all that tell of them."""

from collections.abc import Iterable
from typing import NamedTuple, TypedDict

from ..cost.flops import ModelFlops
from ..hub.blockprune_cost import linear_flops
from ..hub.blockprune_heads import CutHeads


class KeptLayer(NamedTuple):
    """What a pruned Linear keeps.

    Attributes:
        tokens, dense_tokens: rows that it multiplies for one image, and those where no tokens merge.
        weights, kept_weights: entries of its matrix in the dense model, and those in blocks that are kept.
        blocks, kept_blocks: the same, counted in blocks.
    """

    tokens: float
    dense_tokens: float
    weights: int
    kept_weights: int
    blocks: int
    kept_blocks: int


class Shares(TypedDict):
    """What is kept of a model, as shares of the dense one from 0 to 1.

    Attributes:
        flops_ratio: of the whole model's FLOPs.
        linear_flops_ratio: of the pruned layers' alone.
        params_ratio: of the whole model's weights.
        dense_flops: FLOPs of the dense model for one image, no share.
        density: of the pruned layers' blocks.
    """

    flops_ratio: float
    linear_flops_ratio: float
    params_ratio: float
    dense_flops: float
    density: float


def kept_shares(layers: Iterable[KeptLayer], flops: ModelFlops, heads: Iterable[CutHeads] = ()) -> Shares:
    """Add up what layers keep; a model with none of them keeps all.

    Args:
        layers: the pruned ones.
        flops: of the model before anything left it but tokens.
        heads: the attentions from which heads, or features of heads, were cut; their Linears are among the layers.

    Example:
        >>> flops = ModelFlops(total=400.0, parameters=150, linear_tokens={}, image_size=(8, 8))
        >>> shares = kept_shares([KeptLayer(1, 1, weights=100, kept_weights=25, blocks=4, kept_blocks=1)], flops)
        >>> shares["flops_ratio"], shares["linear_flops_ratio"], shares["params_ratio"], shares["density"]
        (0.625, 0.25, 0.5, 0.25)
    """
    dense, kept, removed, removed_weights, blocks, kept_blocks = 0.0, 0.0, 0.0, 0, 0, 0
    for layer in layers:
        gone = layer.weights - layer.kept_weights
        dense += linear_flops(layer.dense_tokens, layer.weights)
        kept += linear_flops(layer.tokens, layer.kept_weights)
        removed += linear_flops(layer.tokens, gone)
        removed_weights += gone
        blocks += layer.blocks
        kept_blocks += layer.kept_blocks
    return {
        "flops_ratio": (flops.total - removed - flops.without_heads(heads)) / flops.dense.total,
        "linear_flops_ratio": kept / dense if dense else 1.0,
        "params_ratio": 1 - removed_weights / flops.parameters,
        "dense_flops": flops.dense.total,
        "density": kept_blocks / blocks if blocks else 1.0,
    }
