"""Images that are kept after they were preprocessed: what comes back, how much is held, and what is not read again."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_blockprune import BlockPruneConfig, BlockPruner, DataSource
from hf_blockprune.calibration.shared import SharedCalibration
from hf_blockprune.config import CalibrationConfig
from hf_blockprune.data.batches import batches, load_images, load_pixels
from hf_blockprune.data.kept import Broken, KeptPixels
from hf_blockprune.sources.pictures import Decoding
from tests.conftest import tiny_model

MUCH = 1 << 30


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def eight_bits(seed, *, levels=256, dtype=torch.float32):
    """What processors make of pictures: whole numbers, scaled and shifted by channel, neighbours among them.

    Thirty numbers of 256 may lie two or more apart, which those of a photograph do not.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(levels, (3, 6, 5), generator=generator)
    numbers[:, 0, :2] = torch.tensor([0, 1])
    pixels = numbers.to(torch.float32) * 0.00392156862745098
    return ((pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / 0.229).to(dtype)


@given(st.lists(st.tuples(st.integers(0, 2**31), st.sampled_from([2, 200, 256])), min_size=1, max_size=6))
def test_pixels_of_pictures_come_back_to_the_last_bit_in_a_byte_each(drawn):
    kept, pixels = KeptPixels(MUCH), [eight_bits(seed, levels=levels) for seed, levels in drawn]
    for position, image in enumerate(pixels):
        kept.keep(position, image)
    assert all(same_bits(kept[position], image) for position, image in enumerate(pixels))
    assert kept.num_bytes == sum(image.numel() for image in pixels)


ODD = {
    "numbers of any kind": torch.randn(3, 30, 30, generator=torch.Generator().manual_seed(0)),
    "no number": torch.tensor([[[0.0, float("nan")]]]),
    "infinite": torch.tensor([[[0.0, float("inf")]]]),
    "two zeros": torch.tensor([[[0.0, -0.0]]]),
    "half precision": eight_bits(0, dtype=torch.float16),
    "bfloat16": eight_bits(0).bfloat16(),
    "double precision": eight_bits(0, dtype=torch.float64),
    "grey": eight_bits(0)[:1],
    "not contiguous": eight_bits(0).permute(0, 2, 1),
}


@pytest.mark.parametrize("pixels", ODD.values(), ids=ODD.keys())
def test_whatever_pixels_are_they_come_back(pixels):
    kept, plain = KeptPixels(MUCH), eight_bits(1)
    for position, image in enumerate([pixels, plain] if pixels.shape[0] == 3 else [pixels]):
        kept.keep(position, image)
    bits = {torch.bfloat16: torch.int16}.get(pixels.dtype, pixels.dtype)
    assert same_bits(kept[0].view(bits), pixels.contiguous().view(bits))
    if pixels.shape[0] == 3:
        assert same_bits(kept[1], plain)


def test_black_pictures_first_and_a_few_more_values_each_time():
    kept, pixels = KeptPixels(MUCH), [torch.zeros(3, 6, 5), torch.ones(3, 6, 5)]
    pixels += [eight_bits(seed, levels=levels) for seed, levels in enumerate((2, 5, 40, 256))]
    pixels += [torch.zeros(3, 6, 5)]
    for position, image in enumerate(pixels):
        kept.keep(position, image)
    assert all(same_bits(kept[position], image) for position, image in enumerate(pixels))


def test_what_is_kept_does_not_change_with_what_was_given():
    pixels = torch.randn(3, 30, 30)
    kept = KeptPixels(MUCH)
    kept.keep(0, pixels)
    before = pixels.clone()
    pixels.zero_()
    assert same_bits(kept[0], before)


def test_no_more_is_kept_than_the_bound():
    kept = KeptPixels(most_bytes=250)  # two images of 90 bytes
    for position in range(5):
        kept.keep(position, eight_bits(position))
    assert [position for position in range(5) if position in kept] == [0, 1]
    assert kept.num_bytes <= 250


def test_a_view_has_positions_of_its_own():
    kept = KeptPixels(MUCH)
    view = kept.some([7, 15]).some([1])
    view.keep(0, eight_bits(0))
    kept.keep(7, Broken("a.png", "is empty"))
    assert 15 in kept and 0 not in kept  # noqa: PT018
    assert same_bits(view[0], kept[15])
    assert kept.some([7, 15])[0] == Broken("a.png", "is empty")


def noise_folder(folder, count, *, broken=()):
    folder.mkdir()
    for i in range(count):
        if i in broken:
            (folder / f"{i:03d}.png").write_bytes(b"no picture")
        else:
            pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    return noise_folder(tmp_path_factory.mktemp("kept") / "noise", 24)


@pytest.fixture
def decoded(monkeypatch):
    """Pictures that were decoded so far."""
    seen, decode = [], Decoding.__call__

    def noted(self, stored):
        seen.append(stored)
        return decode(self, stored)

    monkeypatch.setattr(Decoding, "__call__", noted)
    return seen


def passed(images, processor, accelerator, batch_size=4):
    config = tiny_model().config
    return list(batches(images, processor, batch_size=batch_size, accelerator=accelerator, model_config=config))


def assert_same_batches(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a["corrupt"], a["why"]) == (b["corrupt"], b["why"])
        assert torch.equal(a["index"], b["index"])
        assert a.keys() == b.keys()
        assert "pixel_values" not in a or same_bits(a["pixel_values"], b["pixel_values"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_second_pass_reads_nothing(noise, processor, accelerator, decoded, streaming):
    source = load_images(DataSource(str(noise), streaming=streaming), labels=False)
    images = SharedCalibration().sample(source, 12, processor, CalibrationConfig())
    first = passed(images, processor, accelerator)
    assert len(decoded) == 12
    assert_same_batches(first, passed(images, processor, accelerator))
    few = images.every(4, 3)
    pixels, index = load_pixels(few, processor, accelerator=accelerator, model_config=tiny_model().config)
    assert len(decoded) == 12
    whole = torch.cat([batch["pixel_values"] for batch in first])
    assert torch.equal(pixels, whole[[0, 1, 2] if streaming else [3, 7, 11]].half())
    assert index.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("streaming", "drawn", "most", "judging", "fitting"),
    [
        (False, 12, 3, [3, 7, 11], [0, 1, 2, 4, 5]),
        (False, 12, 1, [3], [0, 1, 2, 4, 5]),
        (False, 3, 3, [0, 1, 2], [0, 1, 2]),
        (True, 12, 3, [0, 1, 2], [3, 4, 5, 6, 7]),
        (True, 6, 4, [0, 1, 2, 3], [4, 5]),
        (True, 3, 3, [0, 1, 2], [0, 1, 2]),
    ],
)
def test_what_is_judged_on_is_not_fitted_to(noise, processor, accelerator, streaming, drawn, most, judging, fitting):
    source = load_images(DataSource(str(noise), streaming=streaming), labels=False)
    images = SharedCalibration().sample(source, drawn, processor, CalibrationConfig())
    options = {"accelerator": accelerator, "model_config": tiny_model().config}
    whole = load_pixels(images, processor, **options)[0]
    assert torch.equal(load_pixels(images.every(4, most), processor, **options)[0], whole[judging])
    assert torch.equal(load_pixels(images.beside(4, most, 5), processor, **options)[0], whole[fitting])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_larger_sample_reads_the_rest(noise, processor, accelerator, decoded, streaming):
    source = load_images(DataSource(str(noise), streaming=streaming), labels=False)
    shared, settings = SharedCalibration(), CalibrationConfig()
    passed(shared.sample(source, 8, processor, settings), processor, accelerator)
    larger = passed(shared.sample(source, 100, processor, settings), processor, accelerator)
    assert len(decoded) == 24
    assert_same_batches(larger, passed(source.sample(100, 0), processor, accelerator))
    del decoded[:]
    assert_same_batches(larger, passed(shared.sample(source, 99, processor, settings), processor, accelerator))
    assert not decoded


def test_what_does_not_fit_is_read_again(noise, processor, accelerator, decoded):
    source = load_images(str(noise), labels=False)
    images = SharedCalibration().sample(source, 12, processor, CalibrationConfig(cache_mb=0))
    first = passed(images, processor, accelerator)
    assert_same_batches(first, passed(images, processor, accelerator))
    assert len(decoded) == 24


def test_images_that_cannot_be_decoded_are_named_each_time(tmp_path, processor, accelerator, decoded):
    source = load_images(str(noise_folder(tmp_path / "some", 9, broken=(2, 4, 5, 6, 7))), labels=False)
    images = SharedCalibration().sample(source, 9, processor, CalibrationConfig())
    first = passed(images, processor, accelerator, batch_size=2)
    assert sorted(Path(name).name for batch in first for name in batch["corrupt"]) == [
        f"{i:03d}.png" for i in (2, 4, 5, 6, 7)
    ]
    assert_same_batches(first, passed(images, processor, accelerator, batch_size=2))
    assert len(decoded) == 9


def test_other_images_of_the_same_name_are_read(processor, accelerator):
    """Data sets that a program made have no names that tell them apart."""

    def shades(first):
        pictures = [Image.new("RGB", (40, 40), (first + i,) * 3) for i in range(4)]
        return datasets.Dataset.from_dict({"image": pictures}).cast_column("image", datasets.Image())

    shared, settings, answers = SharedCalibration(), CalibrationConfig(), []
    for first in (0, 100):
        source = load_images(shades(first), labels=False)
        answers.append(passed(shared.sample(source, 4, processor, settings), processor, accelerator)[0])
    assert not torch.equal(answers[0]["pixel_values"], answers[1]["pixel_values"])


@pytest.mark.parametrize("method", ["obs", "taylor"])
def test_a_run_decodes_each_image_once_and_comes_to_the_same(noise, processor, decoded, method):
    """Statistics, true losses, the refit and a recovery after it; labels are read for taylor."""

    def pruned(cache_mb, shared):
        config = BlockPruneConfig(
            method=method,
            block_shape=(8, 8),
            budget={"ratio": 0.6},
            refit=True,
            calibration={"samples": 20, "batch_size": 4, "cache_mb": cache_mb},
            recovery={"samples": 24, "epochs": 1, "batch_size": 8},
        )
        pruner = BlockPruner(tiny_model(), processor, config)
        pruner.prune(str(noise), shared=shared)
        seen = len(decoded)
        pruner.recover(str(noise), teacher=BlockPruner(tiny_model(), processor), shared=shared)
        return pruner.model.state_dict(), seen

    kept, seen = pruned(64, SharedCalibration())
    assert (seen, len(decoded)) == (20, 24)
    del decoded[:]
    again, seen = pruned(0, None)
    assert seen > 20
    assert kept.keys() == again.keys()
    assert [name for name in kept if not torch.equal(kept[name], again[name])] == []
