"""Batches in parts."""

import copy
import pickle

import pytest
import torch
from transformers import pipeline

from hf_blockprune import ConfigError, micro_batch
from hf_blockprune.measure.microbatch import whole_batches
from tests.conftest import TINY_MODELS, tiny_model


def pixels(count):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def sizes_seen(model):
    seen = []
    model.base_model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("family", TINY_MODELS)
def test_outputs_are_those_of_the_whole_batch(family):
    model = tiny_model(family)
    options = {"output_hidden_states": True}
    with torch.no_grad():
        expected = model(pixel_values=pixels(11), **options)
        actual = micro_batch(model, 4)(pixel_values=pixels(11), **options)
    assert type(actual) is type(expected)
    assert list(actual.keys()) == list(expected.keys())
    torch.testing.assert_close(actual.logits, expected.logits)
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_parts_have_at_most_so_many_images():
    model = tiny_model()
    seen = sizes_seen(model)
    with torch.no_grad():
        micro_batch(model, 4)(pixels(11))
        micro_batch(model, 20)(pixels(11))
    assert seen == [4, 4, 3, 11]


def test_losses_and_training_see_whole_batches():
    model = tiny_model()
    seen = sizes_seen(model)
    micro_batch(model, 2)
    with torch.no_grad():
        labelled = model(pixel_values=pixels(5), labels=torch.zeros(5, dtype=torch.long))
    model.train()(pixel_values=pixels(5)).logits.sum().backward()
    assert labelled.loss.shape == ()
    assert seen == [5, 5]


def test_tuples_are_joined_too():
    model = tiny_model()
    with torch.no_grad():
        (expected,) = model(pixel_values=pixels(5), return_dict=False)
        (actual,) = micro_batch(model, 2)(pixel_values=pixels(5), return_dict=False)
    torch.testing.assert_close(actual, expected)


def test_auto_measures_a_batch_size_once_and_keeps_a_size_that_was_tried():
    model = tiny_model()
    seen = sizes_seen(model)
    with torch.no_grad():
        expected = model(pixel_values=pixels(20)).logits
        micro_batch(model)
        torch.testing.assert_close(model(pixel_values=pixels(20)).logits, expected)
        tried = len(seen)
        model(pixel_values=pixels(20))
        assert len(seen) - tried in (1, 2, 3)  # whole, in 16 and 4, or in 8, 8 and 4
        assert {20, 16, 8} <= set(seen)


def test_it_is_undone():
    model = tiny_model()
    seen = sizes_seen(model)
    micro_batch(micro_batch(model, 2), 3)
    whole_batches(model)
    with torch.no_grad():
        model(pixel_values=pixels(5))
    assert seen == [5]
    assert "forward" not in vars(model)


def test_compiled_models_run_in_parts():
    torch._dynamo.reset()
    model = tiny_model()
    with torch.no_grad():
        expected = model(pixel_values=pixels(6)).logits
        compiled = micro_batch(torch.compile(model, backend="aot_eager"), 3)
        torch.testing.assert_close(compiled(pixel_values=pixels(6)).logits, expected)


def test_pipelines_run_in_parts(processor):
    from PIL import Image

    model = tiny_model()
    images = [Image.new("RGB", (40, 40), (10 * i, 100, 200 - 10 * i)) for i in range(6)]
    classify = pipeline("image-classification", model=model, image_processor=processor)
    expected = classify(images, batch_size=6)
    seen = sizes_seen(model)
    micro_batch(model, 2)
    actual = classify(images, batch_size=6)
    assert seen == [2, 2, 2]
    for ours, theirs in zip(actual, expected, strict=True):
        assert [row["label"] for row in ours] == [row["label"] for row in theirs]
        assert [row["score"] for row in ours] == pytest.approx([row["score"] for row in theirs], abs=1e-6)


def test_models_in_parts_are_copied_and_saved(tmp_path):
    model = micro_batch(tiny_model(), 2)
    with torch.no_grad():
        expected = model(pixel_values=pixels(5)).logits
        twin = copy.deepcopy(model)
        next(model.parameters()).mul_(2)  # the copy must not run the original's layers
        torch.testing.assert_close(twin(pixel_values=pixels(5)).logits, expected)
        again = pickle.loads(pickle.dumps(twin))
        torch.testing.assert_close(again(pixel_values=pixels(5)).logits, expected)


@pytest.mark.parametrize("images", [0, -1, 1.5, True, "all"])
def test_impossible_sizes_are_refused(images):
    with pytest.raises(ConfigError, match="at least 1"):
        micro_batch(tiny_model(), images)
