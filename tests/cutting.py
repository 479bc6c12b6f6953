"""Models whose attentions lack heads, or features of each, made as the pruner makes them."""

import torch
from torch import nn

from hf_blockprune import sparsify
from hf_blockprune.hub.blockprune_heads import CutHeads, dense_heads_of
from hf_blockprune.model.structure import find_transformer_layers
from hf_blockprune.score.blocks import grid_shape
from tests.conftest import OTHER_MODELS

# (heads, features of each) that the attentions of each family's tiny model keep; heads with a bias of positions stay.
KEPT = {
    "vit": ((2, 10), (3, 7)),
    "deit": ((1, 16), (3, 5)),
    "deit-distilled": ((2, 16), (1, 3)),
    "dinov2": ((2, 12), (1, 16)),
    "beit": ((3, 10), (3, 7)),
    "swin": ((3, 5), (3, 4), (6, 3), (6, 7)),
}
assert set(OTHER_MODELS) < set(KEPT)


def linears_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def attentions(model, kept):
    """What is left of each attention of a dense model that is to keep so many (heads, features of each)."""
    layers = find_transformer_layers(model, linears_of(model))
    return [
        CutHeads(layer.query, layer.key, layer.value, layer.out, *sizes, *dense_heads_of(model, layer.query))
        for layer, sizes in zip(layers, kept, strict=True)
    ]


@torch.no_grad()
def shrink(model, cut):
    """Replace the Linears of an attention by smaller ones, in place; the dense (outputs, inputs) of each by name."""
    places, sizes = cut.places(), {}
    for name in cut.names():
        dense = model.get_submodule(name)
        sizes[name] = (dense.out_features, dense.in_features)
        weight = dense.weight[:, places] if name == cut.out else dense.weight[places]
        small = nn.Linear(weight.shape[1], weight.shape[0], bias=dense.bias is not None, dtype=weight.dtype)
        small.weight.copy_(weight)
        if dense.bias is not None:
            small.bias.copy_(dense.bias if name == cut.out else dense.bias[places])
        model.set_submodule(name, small.train(dense.training))
    return sizes


def cut_model(model, kept, *, share=1.0, shape=(8, 8), others=False):
    """A model whose attentions keep so many heads, and a random share of their blocks.

    Args:
        model: dense; changed in place.
        kept: (heads, features of each) by layer.
        share: of the blocks.
        shape: of the blocks.
        others: whether MLPs lose blocks too.
    """
    found, sizes = attentions(model, kept), {}
    layers = find_transformer_layers(model, linears_of(model))
    for cut in found:
        sizes |= shrink(model, cut)
    names = [*sizes, *(name for layer in layers for name in (layer.fc1, layer.fc2) if others)]
    generator = torch.Generator().manual_seed(0)
    grids = {name: grid_shape(tuple(model.get_submodule(name).weight.shape), shape) for name in names}
    masks = {name: torch.rand(grid, generator=generator) < share for name, grid in grids.items()}
    return sparsify(model, masks, shape, cut=sizes, heads=found)
