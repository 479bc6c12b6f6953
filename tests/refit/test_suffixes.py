"""A model that runs from one of its layers on gives just what the whole pass gives."""

import pytest
import torch
from torch import nn

from hf_blockprune.refit.suffixes import Suffixes
from tests.conftest import ALL_FAMILIES, tiny_model

PIXELS = list(torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def linears(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(map(str.isdigit, n.split(".")))]


def whole(model):
    with torch.no_grad():
        return [model(pixel_values=pixels).logits for pixels in PIXELS]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_same_bits_as_a_whole_pass(family):
    model = tiny_model(family)
    names = linears(model)
    suffixes = Suffixes(model, names, PIXELS)
    assert all(torch.equal(a.logits, b) for a, b in zip(suffixes.outputs, whole(model), strict=True))
    for name in names:
        weight = model.get_submodule(name).weight
        before = weight.data
        weight.data = before * 0.5
        wanted = whole(model)
        have = [output.logits for output in suffixes.run([name])]
        assert all(torch.equal(a, b) for a, b in zip(have, wanted, strict=True))
        weight.data = before
    assert all(torch.equal(a, b) for a, b in zip(whole(model), [o.logits for o in suffixes.outputs], strict=True))


def test_layers_before_the_change_do_not_run():
    model = tiny_model("vit")
    suffixes = Suffixes(model, linears(model), PIXELS)
    seen = []
    handles = [
        model.get_submodule(f"vit.layers.{i}.mlp.fc1").register_forward_hook(lambda *_, i=i: seen.append(i))
        for i in range(2)
    ]
    list(suffixes.run(["vit.layers.1.mlp.fc2"]))
    assert seen == [1, 1]
    list(suffixes.run(["vit.layers.1.mlp.fc2", "vit.layers.0.mlp.fc1"]))
    assert seen == [1, 1, 0, 1, 0, 1]
    for handle in handles:
        handle.remove()


def test_a_forward_of_a_modules_own_comes_back():
    model = tiny_model("vit")
    layer = model.get_submodule("vit.layers.0")
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    mine = layer.forward
    list(Suffixes(model, linears(model), PIXELS).run(["vit.layers.1.mlp.fc2"]))
    assert layer.forward is mine


def test_states_that_are_too_many_are_not_held(monkeypatch):
    monkeypatch.setattr("hf_blockprune.refit.suffixes.STATES_BYTES", 0)
    model = tiny_model("vit")
    suffixes = Suffixes(model, linears(model), PIXELS)
    have = [output.logits for output in suffixes.run(["vit.layers.1.mlp.fc2"])]
    assert all(torch.equal(a, b) for a, b in zip(have, whole(model), strict=True))
