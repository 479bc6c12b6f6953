"""Accuracy, and its change between two models, against numbers worked out by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from hf_blockprune import BlockPruner, DataError
from hf_blockprune.data.batches import decode_image, load_images
from hf_blockprune.evaluate.accuracy import Predictions, predict, summarise
from hf_blockprune.evaluate.metrics import TopKAccuracy
from hf_blockprune.evaluate.paired import paired_change
from tests.conftest import NUM_LABELS, tiny_model, write_images

ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def columns(answers):
    return tuple(np.array(column) for column in zip(*answers, strict=True))


def repeat(right_right, to_wrong, to_right, wrong_wrong):
    cells = [(True, True)] * right_right + [(True, False)] * to_wrong
    return columns(cells + [(False, True)] * to_right + [(False, False)] * wrong_wrong)


@given(answers=ANSWERS)
def test_paired_change_counts_what_flipped(answers):
    change = paired_change(*columns(answers))
    assert change.flipped_to_wrong == sum(b and not a for b, a in answers)
    assert change.flipped_to_right == sum(a and not b for b, a in answers)
    assert change.delta == pytest.approx(
        sum(a for _, a in answers) / len(answers) - sum(b for b, _ in answers) / len(answers)
    )


@given(answers=ANSWERS)
def test_paired_interval_is_ordered_bounded_and_near_the_change(answers):
    change = paired_change(*columns(answers))
    low, high = change.interval
    assert -1 <= low < high <= 1
    centre = change.delta * len(answers) / (len(answers) + 2)
    assert low <= centre <= high


@given(answers=ANSWERS)
def test_swapping_the_models_mirrors_the_change(answers):
    before, after = columns(answers)
    forth, back = paired_change(before, after), paired_change(after, before)
    assert back.delta == -forth.delta
    assert back.interval == pytest.approx((-forth.interval[1], -forth.interval[0]))
    assert (back.flipped_to_wrong, back.flipped_to_right) == (forth.flipped_to_right, forth.flipped_to_wrong)


@pytest.mark.parametrize(
    ("cells", "delta", "centre", "spread"),
    [
        # b = 12.5, c = 3.5, m = 102: variance b + c - (c - b)^2 / m
        ((80, 12, 3, 5), -0.09, -9 / 102, math.sqrt(16 - 81 / 102) / 102),
        ((50, 0, 0, 50), 0.0, 0.0, 1 / 102),
        ((0, 0, 10, 0), 1.0, 10 / 12, math.sqrt(11 - 100 / 12) / 12),
    ],
)
def test_paired_interval_by_hand(cells, delta, centre, spread):
    change = paired_change(*repeat(*cells))
    assert change.delta == pytest.approx(delta)
    expected = max(-1, centre - 1.959964 * spread), min(1, centre + 1.959964 * spread)
    assert change.interval == pytest.approx(expected, rel=1e-6)


def test_clear_changes_exclude_zero_and_balanced_ones_do_not():
    assert paired_change(*repeat(500, 40, 5, 50)).interval[1] < 0
    assert paired_change(*repeat(500, 5, 40, 50)).interval[0] > 0
    low, high = paired_change(*repeat(500, 20, 20, 50)).interval
    assert low < 0 < high


def test_more_images_narrow_the_interval():
    widths = []
    for times in (1, 4, 16):
        low, high = paired_change(*repeat(*(times * n for n in (80, 12, 3, 5)))).interval
        widths.append(high - low)
    assert widths[0] > 1.8 * widths[1] > 1.8**2 * widths[2]


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_answers_that_cannot_be_paired_are_refused(before, after):
    with pytest.raises(ValueError, match=f"one length, got {len(before)} and {len(after)}"):
        paired_change(np.array(before, dtype=bool), np.array(after, dtype=bool))


@pytest.mark.parametrize("seed", range(3))
def test_top_k_accuracy_against_loops(seed):
    rng = np.random.default_rng(seed)
    ranked = np.argsort(rng.normal(size=(50, 9)), axis=1)
    labels = rng.integers(0, 9, 50)
    expected = {
        f"top{k}": np.mean([label in row[:k] for row, label in zip(ranked, labels, strict=True)]) for k in (1, 3, 5)
    }
    metric = TopKAccuracy(keep_in_memory=True)
    got = metric.compute(predictions=ranked.tolist(), references=labels.tolist(), ks=[1, 3, 5])
    assert got == pytest.approx(expected)
    assert got["top1"] < got["top3"] < got["top5"]


def test_top_k_accuracy_added_in_batches_is_that_of_all():
    ranked, labels = [[0, 1], [1, 0], [2, 1], [3, 2], [1, 2]], [0, 0, 2, 2, 1]
    metric = TopKAccuracy(keep_in_memory=True)
    for part in (slice(0, 2), slice(2, 5)):
        metric.add_batch(predictions=ranked[part], references=labels[part])
    assert metric.compute(ks=[1, 2]) == {"top1": 0.6, "top2": 1.0}


def direct_logits(model, processor, images):
    pixels = [processor(images=decode_image(r["image"]), return_tensors="pt")["pixel_values"] for r in images.dataset]
    with torch.no_grad():
        return torch.cat([model(pixel_values=p).logits for p in pixels])


@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_predictions_are_the_models_own(model, processor, images, accelerator, batch_size):
    found = load_images(images)
    logits = direct_logits(model, processor, found)
    labels = np.array(found.dataset["label"])
    got = predict(model, found, processor, accelerator=accelerator, batch_size=batch_size)
    np.testing.assert_array_equal(got.index, np.arange(24))
    np.testing.assert_array_equal(got.labels, labels)
    np.testing.assert_array_equal(got.ranked[:, 0], logits.argmax(-1))
    np.testing.assert_array_equal(got.ranked, logits.argsort(-1, descending=True)[:, :5])
    np.testing.assert_array_equal(got.correct, logits.argmax(-1).numpy() == labels)
    result = summarise(got)
    in_top5 = [
        label in row for label, row in zip(labels, logits.argsort(-1, descending=True)[:, :5].numpy(), strict=True)
    ]
    assert (result.top1, result.top5) == pytest.approx((got.correct.mean(), np.mean(in_top5)))
    assert (result.num_images, result.skipped) == (24, [])


def test_models_of_few_classes_can_be_ranked(processor, accelerator, tmp_path):
    write_images(tmp_path, 3)
    got = predict(
        tiny_model(id2label={i: str(i) for i in range(3)}), load_images(tmp_path), processor, accelerator=accelerator
    )
    assert got.ranked.shape == (3, 3)
    assert summarise(got).top5 == 1.0


def test_streams_are_classified_like_data_sets(model, processor, images, accelerator):
    found = load_images(images)
    stream = load_images(found.dataset.to_iterable_dataset())
    got, expected = (predict(model, i, processor, accelerator=accelerator, batch_size=7) for i in (stream, found))
    for key in ("index", "labels", "ranked"):
        np.testing.assert_array_equal(getattr(got, key), getattr(expected, key))


def test_images_without_labels_are_refused(model, processor, accelerator, tmp_path):
    found = load_images(write_images(tmp_path, 2, labels=False))
    with pytest.raises(DataError, match=r"has no labels, so accuracy cannot be measured; add a metadata\.csv"):
        predict(model, found, processor, accelerator=accelerator)


def test_images_of_which_some_lack_a_label_are_refused(model, processor, images, accelerator):
    dataset = load_images(images).dataset
    dataset = dataset.map(lambda record, i: {"label": None if i == 20 else record["label"]}, with_indices=True)
    with pytest.raises(DataError, match="some images have no label"):
        predict(model, load_images(dataset), processor, accelerator=accelerator)


def test_labels_outside_the_model_are_refused(processor, images, accelerator):
    small = tiny_model(id2label={i: str(i) for i in range(4)})
    with pytest.raises(DataError, match=r"label 4 lies outside the model's 4 classes \(0 to 3\)"):
        predict(small, load_images(images), processor, accelerator=accelerator)


def test_corrupt_images_are_left_out_and_named(model, processor, accelerator, tmp_path):
    write_images(tmp_path, 120, size=8)
    (tmp_path / "picture_050.png").write_bytes(b"not a picture")
    got = predict(model, load_images(tmp_path), processor, accelerator=accelerator)
    assert got.index.tolist() == [i for i in range(120) if i != 50]
    result = summarise(got)
    assert result.num_images == 119
    assert [path.rsplit("/", 1)[-1] for path in result.skipped] == ["picture_050.png"]


def test_too_many_corrupt_images_are_refused(model, processor, accelerator, tmp_path):
    write_images(tmp_path, 20, size=8)
    (tmp_path / "picture_007.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"1 of 20 images cannot be decoded.*picture_007\.png"):
        predict(model, load_images(tmp_path), processor, accelerator=accelerator)


def made_up(winners, labels):
    """Predictions whose first class is the given one."""
    winners = np.array(winners)
    ranked = (winners[:, None] + np.arange(5)) % NUM_LABELS
    return Predictions(np.arange(len(winners)), np.array(labels), ranked, [])


def test_comparison_with_a_baseline_counts_flips():
    labels = [0, 1, 2, 3, 4, 5]
    before, after = made_up([0, 1, 2, 3, 0, 0], labels), made_up([0, 1, 0, 0, 4, 1], labels)
    result = summarise(after, before)
    assert (result.top1, result.baseline_top1) == pytest.approx((3 / 6, 4 / 6))
    assert (result.flipped_to_wrong, result.flipped_to_right) == (2, 1)
    assert result.delta == pytest.approx(-1 / 6)
    assert result.interval == paired_change(before.correct, after.correct).interval


def test_comparison_with_itself_changes_nothing(model, processor, images, accelerator):
    got = predict(model, load_images(images), processor, accelerator=accelerator)
    result = summarise(got, got)
    assert (result.delta, result.flipped_to_wrong, result.flipped_to_right) == (0, 0, 0)
    assert result.baseline_top1 == result.top1


def test_comparison_on_other_images_is_refused():
    one = made_up([0, 1], [0, 1])
    with pytest.raises(DataError, match="not evaluated on the same images"):
        summarise(one, replace(one, index=np.array([0, 2])))


def test_results_can_be_written_as_json():
    one = made_up([0, 1], [0, 1])
    alone = json.loads(json.dumps(summarise(one).to_dict()))
    assert alone == {"top1": 1.0, "top5": 1.0, "num_images": 2, "skipped": []}
    compared = json.loads(json.dumps(summarise(one, one).to_dict()))
    assert set(compared) - set(alone) == {"baseline_top1", "delta", "interval", "flipped_to_wrong", "flipped_to_right"}


def test_a_model_in_training_is_measured_without_dropout_and_left_in_training(images, processor):
    """As `Trainer` leaves it; parts that were frozen in evaluation mode stay in it."""
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    expected = BlockPruner(tiny_model(**dropout), processor).predictions(images)
    model = tiny_model(**dropout).train()
    model.vit.embeddings.eval()
    found = BlockPruner(model, processor).predictions(images)
    assert np.array_equal(found.ranked, expected.ranked)
    assert model.training
    assert model.vit.layers[0].training
    assert not model.vit.embeddings.training
