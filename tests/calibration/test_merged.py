"""Which tokens merge, layer by layer: told by the states that the model itself gives every patch again."""

import pytest
import torch

from hf_blockprune import ModelError
from hf_blockprune.calibration.merged import merged_layers
from hf_blockprune.hub.blockprune_tokens import TokenSchedule, set_schedule
from tests.conftest import tiny_model

PREFIX = {"vit": 1, "deit": 2, "dinov2": 1}


def merging(family, leave, **changes):
    model = tiny_model(family, num_hidden_layers=len(leave), **changes)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layer" in n]
    set_schedule(model, TokenSchedule(tuple(leave), 16), names)
    return model, torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", PREFIX)
def test_patches_of_one_group_have_one_state(family):
    model, pixels = merging(family, [4, 5, 0])
    last = merged_layers(model, pixels)[-1]
    with torch.no_grad():
        states = model.base_model(pixels).last_hidden_state
    first = PREFIX[family]  # tokens before these are all alike in a new model
    for places, tokens in zip(last.places[:, first:], states[:, first:], strict=True):
        together = places[:, None] == places[None]
        equal = (tokens[:, None] == tokens[None]).all(-1)
        assert torch.equal(together, equal)


def test_tokens_become_fewer_and_what_is_together_stays_together():
    model, pixels = merging("deit", [0, 4, 3])
    found = merged_layers(model, pixels)
    assert [each.tokens for each in found] == [18, 14, 11]
    assert torch.equal(found[0].places, torch.arange(18).expand(3, -1))
    before = torch.eye(18).bool().expand(3, -1, -1)
    for each in found:
        assert [len(places.unique()) for places in each.places] == [each.tokens] * 3
        assert torch.equal(each.places[:, :2], torch.arange(2).expand(3, -1))  # these merge with nothing
        together = each.places[:, :, None] == each.places[:, None]
        assert (together | ~before).all()
        before = together


def test_the_model_is_left_as_it_was():
    model, pixels = merging("vit", [4, 4])
    model.train()
    merged_layers(model, pixels)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_in_which_none_merge_is_refused():
    with pytest.raises(ModelError, match="no tokens merge"):
        merged_layers(tiny_model("vit"), torch.zeros(1, 3, 32, 32))
