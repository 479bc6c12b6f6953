"""Schedules of tokens that are searched for."""

import pytest
import torch

from hf_blockprune.choose.divergence import Divergence
from hf_blockprune.choose.token_search import TokenSearch
from hf_blockprune.cost.flops import count_flops, merged_flops
from hf_blockprune.hub.blockprune_tokens import schedule_of, set_schedule
from tests.conftest import tiny_model

PIXELS = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PATCHES = 64


@pytest.fixture(scope="module")
def model():
    model = tiny_model("vit", patch_size=4, num_hidden_layers=3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def flops(model):
    return count_flops(model)


@pytest.fixture
def search(model, flops):
    layers = [[n for n in flops.linear_tokens if n.startswith(f"vit.layers.{i}.")] for i in range(3)]
    return TokenSearch(model, layers, PIXELS, PATCHES, 1, lambda: merged_flops(model, flops).total / flops.total)


@torch.no_grad()
def measured(model, flops, costed):
    """(share, divergence) of a schedule, from whole passes."""
    judge = Divergence(model, [model(pixel_values=PIXELS)])
    set_schedule(model, costed.schedule, flops.linear_tokens.keys() - {"classifier"})
    try:
        share = merged_flops(model, flops).total / flops.total
        return share, judge.of([model(pixel_values=PIXELS)])
    finally:
        set_schedule(model, type(costed.schedule)((0, 0, 0), PATCHES), flops.linear_tokens.keys() - {"classifier"})


@pytest.mark.parametrize("until", [0.9, 0.7, 0.5])
def test_schedules_get_cheaper_and_say_what_they_come_to(model, flops, search, until):
    found = search.run(until)
    assert schedule_of(model) is None
    shares = [costed.share for costed in found]
    assert shares == sorted(set(shares), reverse=True)
    assert shares[-1] <= until < shares[-2]
    for costed in found[1:]:
        assert (costed.share, costed.divergence) == pytest.approx(measured(model, flops, costed), rel=1e-4, abs=1e-7)


def test_the_last_step_goes_no_further_than_it_must(model, flops, search):
    before, last = search.run(0.7)[-2:]
    layer = next(i for i in range(3) if before.schedule.leave[i] != last.schedule.leave[i])
    fewer = list(last.schedule.leave)
    fewer[layer] -= 1
    assert search._share(fewer) > 0.7
    search._share([0, 0, 0])


def test_a_last_layer_that_is_read_at_its_class_token_loses_all_patches_at_once(search):
    assert search.run(0.5)[1].schedule.leave == (0, 0, PATCHES - 1)


@pytest.mark.parametrize("seed", range(3))
def test_exchanges_never_make_it_worse(model, flops, search, seed):
    before = search.run(0.6)[-1]
    after = search.refined(before, seed)
    assert schedule_of(model) is None
    assert after.share <= before.share
    assert after.divergence <= before.divergence
    assert (after.share, after.divergence) == pytest.approx(measured(model, flops, after), rel=1e-4, abs=1e-7)
