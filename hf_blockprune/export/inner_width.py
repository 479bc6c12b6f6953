"""How wide MLPs and attentions are in other forms of a model whose hidden units or heads were cut out.

`model.dequantize()` fills a layer up to its `dense_shape`, so what stands there decides.
"""

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ..hub.blockprune_heads import cut_heads, forget_heads
from ..hub.blockprune_layers import block_sparse_layers
from ..model.layers import linear_in
from ..model.loading import build, model_class_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.configuration_utils import PreTrainedConfig

    from ..hub.blockprune_linear import BlockSparseLinear

# Settings of all layers: an MLP's hidden units, and their ratio to its inputs.
WIDTH, RATIO = "intermediate_size", "mlp_ratio"


class CutLayer(NamedTuple):
    """A block-sparse layer that lacks units, and the (outputs, inputs) that `dequantize` fills it up to."""

    layer: "BlockSparseLinear"
    dense_shape: tuple[int, int]


def cut_units(model: nn.Module) -> int:
    """Hidden units that the layers of a block-sparse model lack of what `dequantize` fills them up to."""
    return sum(cut.dense_shape[0] - cut.layer.out_features for cut in _cut_mlps(model).values())


def cut_head_features(model: nn.Module) -> int:
    """Features of heads that attentions of a block-sparse model lack of what `dequantize` fills them up to."""
    return sum(cut.dense_features - cut.features for cut in cut_heads(model))


def leave_cuts_out(model: nn.Module) -> None:
    """Let `dequantize` keep every layer as small as it is, for forms in which each may have another width."""
    for _, layer in block_sparse_layers(model):
        layer.dense_shape = None
    forget_heads(model)


def narrow(model: "PreTrainedModel") -> None:
    """Let the config, and so `dequantize`, make all MLPs as wide as the widest of a block-sparse model, in place.

    Nothing changes where one is whole, or other parts of the model would change too. Attentions stay as they are: their
    heads come back.
    """
    layers = _cut_mlps(model)
    for holder, setting, value in _settings(model.config, list(layers.values())):
        changed = copy.deepcopy(model.config)
        setattr(getattr(changed, holder) if holder else changed, setting, value)
        with torch.device("meta"):
            made = build(model_class_of(changed), changed, model.state_dict())
        if _holds(made, model):
            setattr(getattr(model.config, holder) if holder else model.config, setting, value)
            for name, cut in layers.items():
                linear = linear_in(made, name)  # _holds saw to it
                cut.layer.dense_shape = linear.out_features, linear.in_features
            return


def _cut_mlps(model: nn.Module) -> dict[str, CutLayer]:
    """Those from which hidden units were cut, by name."""
    of_attentions = {name for cut in cut_heads(model) for name in cut.names()}
    return {
        name: CutLayer(layer, layer.dense_shape)
        for name, layer in block_sparse_layers(model)
        if layer.dense_shape is not None and name not in of_attentions
    }


def _settings(config: "PreTrainedConfig", layers: list[CutLayer]) -> Iterator[tuple[str, str, int | float]]:
    """(name of the config within the config, or nothing; name; value) that give room for just the widest layer."""
    writers = [cut.layer for cut in layers if cut.layer.out_features < cut.dense_shape[0]]
    if not writers:
        return
    width = max(layer.out_features for layer in writers)
    ratio = max(layer.out_features / layer.in_features for layer in writers)
    for holder in ("", "vision_config"):
        part = getattr(config, holder, None) if holder else config
        if isinstance(getattr(part, WIDTH, None), int):
            yield holder, WIDTH, width
        if isinstance(getattr(part, RATIO, None), int):
            yield holder, RATIO, math.ceil(ratio)
        elif hasattr(part, RATIO):
            # Models round ratio * inputs down, and the ratio itself is rounded.
            yield from ((holder, RATIO, value) for value in (ratio, math.nextafter(ratio, math.inf)))


def _holds(made: nn.Module, model: nn.Module) -> bool:
    """Whether a new model has a place for all that a block-sparse one holds, with less to fill up, and nothing else."""
    linears = {name: tuple(m.weight.shape) for name, m in made.named_modules() if isinstance(m, nn.Linear)}
    sizes = {name: (layer.out_features, layer.in_features) for name, layer in block_sparse_layers(model)}
    before = {name: layer.dense_shape or sizes[name] for name, layer in block_sparse_layers(model)}
    if not all(
        name in linears and all(a <= b <= c for a, b, c in zip(size, linears[name], before[name], strict=True))
        for name, size in sizes.items()
    ):
        return False
    if all(linears[name] == shape for name, shape in before.items()):  # a setting that the model does not read
        return False
    others = {name: t.shape for name, t in model.state_dict().items() if name.rpartition(".")[0] not in sizes}
    return others == {name: t.shape for name, t in made.state_dict().items() if name.rpartition(".")[0] not in sizes}
