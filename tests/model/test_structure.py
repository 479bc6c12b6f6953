"""What is known of families of models is true of the models: changes that should leave their function alone do."""

import pytest
import torch

from hf_blockprune.model import families
from hf_blockprune.model.structure import find_transformer_layers
from hf_blockprune.reorder.folding import fold_scales
from hf_blockprune.reorder.hidden import Move, apply_moves
from tests.conftest import ALL_FAMILIES, tiny_model

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LAYERS = {"swin": 4}


def linears_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


@torch.no_grad()
def logits_of(model):
    return model(pixel_values=PIXELS).logits


def shuffled(features, generator):
    return features[torch.randperm(len(features), generator=generator)]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_layer_is_found_with_its_heads(family):
    model = tiny_model(family)
    layers = find_transformer_layers(model, linears_of(model))
    assert len(layers) == LAYERS.get(family, 2)
    assert [layer.heads for layer in layers] == ([3, 3, 6, 6] if family == "swin" else [3, 3])


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_logits_stay_when_hidden_units_and_features_of_heads_change_places(family):
    model, moved = tiny_model(family), tiny_model(family)
    linears, generator = linears_of(moved), torch.Generator().manual_seed(3)
    moves = []
    for layer in find_transformer_layers(moved, linears):
        width = linears[layer.query].out_features
        heads = torch.arange(width).view(layer.heads, -1)
        if not layer.heads_stay:
            heads = heads[torch.randperm(layer.heads, generator=generator)]
        for producers, consumer in (((layer.value,), layer.out), ((layer.query, layer.key), None)):
            order = torch.cat([shuffled(head, generator) for head in heads])
            moves.append(Move(producers, consumer, order))
        units = torch.arange(linears[layer.fc1].out_features)
        moves.append(Move((layer.fc1,), layer.fc2, shuffled(units, generator)))
    changed = [name for move in moves for name in move.producers]
    apply_moves(moves, linears, {name: _Free() for name in linears})
    assert all(not torch.equal(linears[n].weight, model.get_submodule(n).weight) for n in changed)
    torch.testing.assert_close(logits_of(moved), logits_of(model), atol=1e-5, rtol=1e-5)


class _Free:
    """Statistics that nobody reads."""

    def permuted(self, **_):
        return self


@pytest.mark.parametrize(("family", "scales"), [("vit", 0), ("swin", 0), ("beit", 4), ("dinov2", 4)])
def test_folded_scales_leave_the_function_alone(family, scales):
    model, folded = tiny_model(family), tiny_model(family)
    assert fold_scales(folded) == scales
    torch.testing.assert_close(logits_of(folded), logits_of(model), atol=1e-5, rtol=1e-5)
    ones = [p for name, p in folded.named_parameters() if "lambda" in name]
    assert len(ones) == scales
    assert all(torch.equal(p, torch.ones_like(p)) for p in ones)


def test_layers_of_an_unknown_family_are_left_in_their_order(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    model = tiny_model()
    model.config.model_type = "something new"
    assert find_transformer_layers(model, linears_of(model)) == []
    families.register_family("something new", families.Family())
    assert len(find_transformer_layers(model, linears_of(model))) == 2
