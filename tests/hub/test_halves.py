"""Layers whose halves are one call each: they answer as their parts do, and leave it to them where anyone looks."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from hf_blockprune._cpu.halves import CpuHalves
from hf_blockprune._cpu.library import find_library
from hf_blockprune.hub import blockprune_quick_halves
from hf_blockprune.hub.blockprune_halves import has_halves
from hf_blockprune.hub.blockprune_layers import block_sparse_layers
from hf_blockprune.hub.blockprune_rounding import quantize
from hf_blockprune.hub.blockprune_together import fuse, unfuse
from hf_blockprune.hub.blockprune_tokens import TokenSchedule, set_schedule
from tests.conftest import tiny_model
from tests.hub.saved_models import PIXELS, answer, sparse_model

LIBRARY, WHY_NOT = find_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=WHY_NOT)
FAMILIES = ["vit", "deit", "deit-distilled", "dinov2"]
LAYERS = 2


@pytest.fixture
def halves(monkeypatch):
    """Whether each call of a half was taken."""
    seen, kernels = [], CpuHalves(LIBRARY)

    def run(x, half):
        given = kernels(x, half)
        seen.append(given is not None)
        return given

    monkeypatch.setattr(blockprune_quick_halves, "_RUNNERS", {"cpu": run})
    return seen


@pytest.fixture
def model():
    return packed(sparse_model(tiny_model()))


def packed(model):
    for _, layer in block_sparse_layers(model):
        layer.pack_weight()
    return model.eval()


def answer_by_parts(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockprune_quick_halves, "_RUNNERS", {})
        return answer(model)


def taken(halves, call):
    """How many halves a call takes together."""
    halves.clear()
    with torch.no_grad():
        call()
    assert all(halves)
    return len(halves)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_answer_as_their_parts_do(family, halves):
    model = packed(sparse_model(tiny_model(family)))
    together = answer(model)
    assert halves == [True] * 2 * LAYERS
    torch.testing.assert_close(together, answer_by_parts(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_int8_they_do_within_a_step(family, halves):
    model = quantize(sparse_model(tiny_model(family)))
    together, expected = answer(model), answer_by_parts(model)
    assert halves == [True] * 2 * LAYERS
    torch.testing.assert_close(together, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_in_bfloat16_too(family, halves):
    model = packed(sparse_model(tiny_model(family))).bfloat16()
    packed(model)
    with torch.no_grad():
        together = model(PIXELS.bfloat16())[0].float()
        assert halves == [True] * 2 * LAYERS
        blockprune_quick_halves._RUNNERS.clear()
        expected = model(PIXELS.bfloat16())[0].float()
    torch.testing.assert_close(together, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["swin", "beit"])
def test_other_families_are_computed_by_parts(family, halves):
    model = packed(sparse_model(tiny_model(family)))
    answer(model)
    assert halves == []


@pytest.mark.parametrize("int8", [False, True])
def test_merging_tokens_come_between_the_halves(int8, halves):
    model = tiny_model()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    patches = (model.config.image_size // model.config.patch_size) ** 2
    model = packed(sparse_model(model))
    set_schedule(model, TokenSchedule((3, 2), patches), names)
    model = quantize(model) if int8 else model
    together, expected = answer(model), answer_by_parts(model)
    assert halves == [True] * 2 * LAYERS
    torch.testing.assert_close(together, expected, rtol=0, atol=(0.03 if int8 else 1e-5) * float(expected.abs().max()))


WATCHERS = {
    "a hook on the attention": lambda layer: layer.attention.register_forward_hook(lambda *_: None),
    "a hook on a projection": lambda layer: layer.attention.v_proj.register_forward_pre_hook(lambda *_: None),
    "a hook on the norm": lambda layer: layer.layernorm_before.register_forward_hook(lambda *_: None),
    "a hook on the dropout": lambda layer: layer.dropout.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("watch", WATCHERS)
def test_nothing_is_skipped_that_somebody_watches(watch, model, halves):
    handle = WATCHERS[watch](model.vit.layers[0])
    count = taken(halves, lambda: answer(model))
    assert count == 2 * LAYERS - (2 if "dropout" in watch else 1)
    handle.remove()
    assert taken(halves, lambda: answer(model)) == 2 * LAYERS


def test_a_hook_on_all_modules_sees_them_all(model, halves):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        assert taken(halves, lambda: answer(model)) == 0
    finally:
        handle.remove()
    assert seen.count("GELUActivation") == LAYERS


def test_parts_that_are_replaced_take_part(model, halves):
    expected = answer(model)
    layer = model.vit.layers[0]
    layer.dropout = nn.Hardtanh(-0.01, 0.01)
    assert taken(halves, lambda: answer(model)) == 2 * LAYERS - 2
    assert not torch.allclose(answer(model), expected, atol=1e-4)
    layer.dropout = nn.Identity()
    assert taken(halves, lambda: answer(model)) == 2 * LAYERS
    torch.testing.assert_close(answer(model), expected)
    layer.attention.o_proj = layer.attention.o_proj.to_dense()
    assert taken(halves, lambda: answer(model)) == 2 * LAYERS - 1
    torch.testing.assert_close(answer(model), expected, rtol=1e-4, atol=1e-5)


def test_weights_that_change_count_at_once(model, halves):
    before = answer(model)
    for tensor in (
        model.vit.layers[0].attention.q_proj.weight,
        model.vit.layers[1].layernorm_after.bias,
        model.vit.layers[1].mlp.fc2.bias,
    ):
        tensor.data.mul_(3)
        after = answer(model)
        assert not torch.allclose(after, before, atol=1e-5)
        torch.testing.assert_close(after, answer_by_parts(model), rtol=1e-4, atol=1e-4)
        before = after


def test_attributes_of_attentions_count_at_once(model):
    before = answer(model)
    model.vit.layers[0].attention.scaling *= 3
    after = answer(model)
    assert not torch.allclose(after, before, atol=1e-6)
    torch.testing.assert_close(after, answer_by_parts(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["grad", "train", "autocast", "profiler", "compile"])
def test_others_see_the_parts(how, model, halves):
    if how == "grad":
        model(PIXELS).logits.sum().backward()
        assert model.vit.layers[0].attention.q_proj.weight.grad.abs().sum() > 0
    elif how == "train":
        with torch.no_grad():
            model.train()(PIXELS)
    elif how == "autocast":
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(PIXELS)
    elif how == "profiler":
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(PIXELS)
        assert any("scaled_dot_product" in event.key for event in profile.key_averages())
    else:
        torch._dynamo.reset()  # other tests' models, of which it keeps no more than a few
        with torch.no_grad():
            torch.compile(model, fullgraph=True, backend="eager")(PIXELS)
    assert halves == []


def test_attentions_are_given_where_they_are_asked_for(model, halves):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(PIXELS, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == LAYERS
    assert output.attentions[0].sum(-1).allclose(torch.ones(1))
    assert len(output.hidden_states) == LAYERS + 1
    torch.testing.assert_close(output.logits, answer(model), rtol=1e-4, atol=1e-5)


def test_an_attention_that_does_something_else_is_left_alone(model, halves):
    layer = model.vit.layers[0]

    class Doubled(type(layer.attention)):
        def forward(self, *args, **kwargs):
            states, weights = super().forward(*args, **kwargs)
            return 2 * states, weights

    expected = answer(model)
    layer.attention.__class__ = Doubled
    assert taken(halves, lambda: answer(model)) == 2 * LAYERS - 1
    assert not torch.allclose(answer(model), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["reference", "dense"])
def test_a_backend_that_is_named_runs(name, model, halves, monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", name)
    assert taken(halves, lambda: answer(model)) == 0


def test_copies_work_the_same_way_and_unfusing_ends_it(model, halves):
    expected, own = answer(model), type(model.vit.layers[0])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert taken(halves, lambda copied=copied: answer(copied)) == 2 * LAYERS
        assert torch.equal(answer(copied), expected)
    unfuse(model)
    assert taken(halves, lambda: answer(model)) == 0
    assert type(model.vit.layers[0]) is not own
    assert has_halves(model.vit.layers[0])
    fuse(model)
    assert type(model.vit.layers[0]) is own


def test_dense_models_of_the_class_stay_as_they_are(model):
    assert type(tiny_model().vit.layers[0]).__mro__[1] is not type(model.vit.layers[0])
    assert type(model.dequantize().vit.layers[0]) is type(tiny_model().vit.layers[0])


def test_several_threads_call_one_model(model):
    expected = answer(model)
    found = []
    workers = [threading.Thread(target=lambda: found.append(answer(model))) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 6
    assert all(torch.equal(each, expected) for each in found)


def test_inputs_and_hidden_states_stay_as_they_are(model, halves):
    states = torch.randn(2, 17, 48)
    before = states.clone()
    assert taken(halves, lambda: model.vit.layers[0](states)) == 2
    assert torch.equal(states, before)
    with torch.no_grad():
        hidden = model(PIXELS, output_hidden_states=True).hidden_states
        blockprune_quick_halves._RUNNERS.clear()
        expected = model(PIXELS, output_hidden_states=True).hidden_states
    for have, want in zip(hidden, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_loaded_models_work_that_way(model, halves, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = packed(AutoModelForImageClassification.from_pretrained(tmp_path))
    assert taken(halves, lambda: answer(loaded)) == 2 * LAYERS
    assert torch.equal(answer(loaded), answer(model))
