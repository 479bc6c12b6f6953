"""Stored pictures become images of 8 bits, upright, with the channels that a model takes."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, features
from transformers import ConvNextImageProcessorPil

from hf_blockprune import BlockPruneConfig, BlockPruner, ConfigError, DataError, DataSource, FinetuneConfig, ModelError
from hf_blockprune.cost.flops import count_flops, image_size
from hf_blockprune.data.batches import load_images
from hf_blockprune.data.model_input import ModelInput, channels_of, find_input, picture_size
from hf_blockprune.finetune.randaugment import OPERATIONS
from hf_blockprune.sources.pictures import Decoding, decode_image, stored_pixels
from tests.conftest import tiny_config, tiny_model

RAMP = np.arange(64 * 64).reshape(64, 64) * 16  # from 0 to 65520
GREY = (RAMP >> 8).astype(int)  # the same in 8 bits
ORIENTATION = 0x0112


def stored(image, form, **options):
    """The record of a picture saved in a format."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, form, **options)
    return {"bytes": file.getvalue(), "path": None}


def noise(shape=(16, 24, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tiff(values, *, bits, sign=1, photometric=1):
    """A TIFF of one channel, written byte by byte: Pillow does not write all that it reads."""
    data = values.tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    content = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags) + 1)
    for tag, value in {**tags, 339: sign}.items():
        content += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    return {"bytes": content + struct.pack("<I", 0), "path": None}


DEEP = {
    "16 bits, PNG": lambda: stored(RAMP.astype(np.uint16), "PNG"),
    "16 bits, TIFF": lambda: stored(RAMP.astype(np.uint16), "TIFF"),
    "16 bits, big-endian": lambda: stored(Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes()), "TIFF"),
    "16 bits, PGM": lambda: stored(RAMP.astype(np.uint16), "PPM"),
    "16 bits, zero is white": lambda: tiff((65535 - RAMP).astype("<u2"), bits=16, photometric=0),
    "16 bits, signed": lambda: tiff((RAMP // 2).astype("<i2"), bits=16, sign=2),
    "32 bits, up to 65535": lambda: stored(RAMP.astype(np.int32), "TIFF"),
    "32 bits, up to 255": lambda: stored(GREY.astype(np.int32), "TIFF"),
    "32 bits, all of them": lambda: tiff((RAMP * 65537).astype("<u4"), bits=32),
    "32 bits, signed": lambda: tiff((RAMP * 32767).astype("<i4"), bits=32, sign=2),
    "float, up to 1": lambda: stored((RAMP / 65535).astype(np.float32), "TIFF"),
    "float, up to 255": lambda: stored((RAMP / 257).astype(np.float32), "TIFF"),
    "float, up to 65535": lambda: stored(RAMP.astype(np.float32), "TIFF"),
    "float, zero is white": lambda: tiff((1 - RAMP / 65535).astype("<f4"), bits=32, sign=3, photometric=0),
    "array of 16 bits": lambda: RAMP.astype(np.uint16),
    "array of floats": lambda: RAMP / 65535,
    "lists of whole numbers": lambda: GREY.tolist(),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_become_the_same_shades(kind):
    decoded = np.asarray(decode_image(DEEP[kind]()))
    assert decoded.shape == (64, 64, 3)
    assert np.abs(decoded.astype(int) - GREY[..., None]).max() <= 1


def test_16_bits_in_grey_and_in_colour_are_the_same_shades():
    """Pillow takes the high byte of coloured ones."""
    content = b"\x89PNG\r\n\x1a\n"
    rows = b"".join(b"\0" + np.repeat(row.astype(">u2"), 3).tobytes() for row in RAMP)
    parts = {b"IHDR": struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    for name, data in parts.items():
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    coloured = decode_image({"bytes": content, "path": None})
    np.testing.assert_array_equal(coloured, decode_image(DEEP["16 bits, PNG"]()))


def test_brightness_of_two_pictures_stays_in_proportion():
    """A dark 16-bit picture is not stretched to the brightness of another."""
    dark, bright = (decode_image(stored((RAMP // part).astype(np.uint16), "PNG")) for part in (4, 1))
    assert np.asarray(dark).mean() * 4 == pytest.approx(np.asarray(bright).mean(), rel=0.02)


@pytest.mark.parametrize("white", [1, 255])
def test_overshoot_of_resampling_does_not_make_a_picture_black(white):
    values = (RAMP / 65535 * 1.1 - 0.05).astype(np.float32)
    decoded = np.asarray(decode_image(stored(values * white, "TIFF")))[..., 0]
    assert np.abs(decoded - np.clip(255 * values, 0, 255)).max() <= 1


def test_what_is_white_can_be_said(caplog):
    twelve = stored((RAMP >> 4).astype(np.uint16), "PNG")
    assert np.asarray(decode_image(twelve)).max() == 15
    said = np.asarray(decode_image(twelve, Decoding(white=4095)))[..., 0]
    assert np.abs(said.astype(int) - GREY).max() <= 1
    negative = stored((RAMP / 16 - 1000).astype(np.float32), "TIFF")
    assert np.asarray(decode_image(negative, Decoding(white=3000))).max() == 255
    with pytest.raises(ConfigError, match="white must be a number above 0, got -1"):
        DataSource("x", white=-1)


def test_pictures_that_come_out_nearly_black_are_spoken_of(monkeypatch):
    said = []
    monkeypatch.setattr("hf_blockprune.sources.pictures.logger.warning_once", said.append)
    decode_image(stored((RAMP >> 4).astype(np.uint16), "PNG"))
    decode_image(stored((RAMP >> 4).astype(np.float32), "TIFF"))
    decode_image(stored(np.zeros((4, 4), np.uint16), "PNG"))
    decode_image(stored(RAMP.astype(np.uint16), "PNG"))
    assert ["nearly black" in text for text in said] == [True, True]


@pytest.mark.parametrize(
    "values",
    [
        (RAMP * 15).astype(np.int32),  # 20 bits, which the 31 of the format would make black
        (RAMP / 16 - 1024).astype(np.int32),
        (RAMP / 16 - 1024).astype(np.float32),
        (RAMP * 100.0).astype(np.float32),
        (RAMP / 32760 - 1).astype(np.float32),
    ],
    ids=["20 bits", "negative", "negative floats", "large floats", "from -1 to 1"],
)
def test_values_that_no_format_explains_are_stretched_and_spoken_of(values, monkeypatch):
    said = []
    monkeypatch.setattr("hf_blockprune.sources.pictures.logger.warning_once", said.append)
    decoded = np.asarray(decode_image(stored(values, "TIFF")))[..., 0]
    assert np.abs(decoded - 255 * RAMP / RAMP.max()).max() <= 1
    assert ["stretched from their own darkest" in text for text in said] == [True]


@pytest.mark.parametrize("whole", [1, 255, 65535, 10**6])
def test_what_is_no_number_is_black_and_infinity_an_end(whole):
    values = (RAMP / RAMP.max() * whole).astype(np.float32)
    values[5, :3] = np.nan, np.inf, -np.inf
    decoded = np.asarray(decode_image(stored(values, "TIFF")))[..., 0]
    assert decoded[5, :3].tolist() == [0, 255, 0]
    rest = np.isfinite(values)
    assert np.abs(decoded - 255 * RAMP / RAMP.max())[rest].max() <= 1


def test_pictures_without_a_number_are_none():
    with pytest.raises(ValueError, match="none of its values is a number"):
        decode_image(stored(np.full((4, 4), np.nan, np.float32), "TIFF"))


MODES = ["1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_what_the_model_takes(mode):
    image = Image.new(mode, (5, 4))
    assert [decode_image(image, Decoding(channels=n)).mode for n in (1, 3, 4)] == ["L", "RGB", "RGBA"]


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "HSV"])
def test_modes_of_8_bits_are_pillows_own(mode):
    image = Image.fromarray(noise()).convert("RGB").convert("RGB" if mode == "HSV" else mode)
    image = image.convert(mode)
    np.testing.assert_array_equal(decode_image(image), image.convert("RGB"))


def test_grey_pictures_keep_their_shades_for_a_model_of_one_channel():
    grey = noise((8, 9))
    np.testing.assert_array_equal(decode_image(stored(grey, "PNG"), Decoding(channels=1)), grey)


def test_mode_of_the_data_set_comes_first():
    decoded = np.asarray(decode_image(stored(noise(), "PNG"), Decoding(mode="L")))
    np.testing.assert_array_equal(decoded, Image.fromarray(noise()).convert("L").convert("RGB"))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_first_frame_of_several(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    decoded = decode_image(stored(frames[0], form, save_all=True, append_images=frames[1:], **options))
    red, _, blue = np.asarray(decoded)[4, 4]
    assert red > 250 > 5 > blue


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
def test_avif_is_read_and_turned():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    assert decode_image(stored(noise(), "AVIF", exif=exif)).size == (16, 24)


def exif_of(*entries, extra=b""):
    """An EXIF block of 12-byte entries, (tag, type, count, 4 bytes)."""
    body = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return body + b"".join(struct.pack("<HHI", *e[:3]) + e[3] for e in entries) + struct.pack("<I", 0) + extra


TURNED = (ORIENTATION, 3, 1, struct.pack("<HH", 6, 0))
BROKEN_TAGS = {
    "a resolution in letters": (0x011A, 2, 4, b"ab\0\0"),
    "a width in letters": (0x0100, 2, 4, b"wide"),
    "a place far outside": (0x0132, 2, 2**31, struct.pack("<I", 2**31)),
    "a camera that is a number": (0x010F, 12, 1, struct.pack("<I", 8)),
    "an unknown type": (0x0131, 99, 1, b"    "),
    "a table that is none": (0x8769, 2, 4, b"none"),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("tag", BROKEN_TAGS)
def test_other_tags_may_be_broken(form, tag):
    """The tag that turns a picture counts all the same."""
    decoded = decode_image(stored(noise(), form, exif=exif_of(TURNED, BROKEN_TAGS[tag])))
    assert decoded.size == (16, 24)


@pytest.mark.parametrize("profile", ["\nexif\n  8\nzzzz", "\nexif\n", "", "\nexif\n 4\n45"])
def test_profiles_in_text_that_are_none_are_ignored(profile):
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", profile)
    np.testing.assert_array_equal(decode_image(stored(noise(), "PNG", pnginfo=text)), noise())


@given(
    entries=st.lists(
        st.tuples(
            st.sampled_from([ORIENTATION, 0x011A, 0x0128, 0x0100, 0x010F, 0x8769, 0x8825, 0x014A, 0x02BC]),
            st.integers(0, 18),
            st.sampled_from([0, 1, 2, 4, 9, 2**20, 2**31]),
            st.binary(min_size=4, max_size=4),
        ),
        max_size=5,
    ),
    extra=st.binary(max_size=60),
    cut=st.integers(0, 80),
    form=st.sampled_from(["JPEG", "PNG", "WEBP"]),
)
def test_no_exif_ends_the_decoding(entries, extra, cut, form):
    """What Pillow decodes is decoded, at most turned."""
    exif = exif_of(*entries, extra=extra)
    record = stored(noise(), form, exif=exif[: max(8, len(exif) - cut)])
    plain = np.asarray(decode_image(stored(noise(), form)))
    decoded = np.asarray(decode_image(record))
    turned = [np.rot90(side, k) for side in (plain, plain[:, ::-1]) for k in range(4)]
    assert any(np.array_equal(decoded, one) for one in turned)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", stored(noise(), "PNG")["bytes"][:200]])
def test_what_is_cut_short_is_no_picture(content):
    with pytest.raises((OSError, SyntaxError, ValueError, EOFError)):
        decode_image({"bytes": content, "path": None})


@pytest.mark.parametrize(
    ("array", "size"),
    [(noise((8, 9, 3)), (9, 8)), (noise((3, 8, 9)), (9, 8)), (noise((8, 9, 1)), (9, 8)), (noise((8, 9)) > 99, (9, 8))],
)
def test_arrays_with_channels_first_or_last(array, size):
    assert (decode_image(array).size, decode_image(array).mode) == (size, "RGB")


@pytest.mark.parametrize("array", [np.zeros((7, 8, 9)), np.zeros(5), np.zeros((0, 4, 3)), np.array([["a"]])])
def test_arrays_that_are_no_pictures_are_refused(array):
    with pytest.raises(ValueError, match=r"is no picture|has 9 channels"):
        decode_image(array)


def test_stored_pixel_values_have_three_dimensions():
    assert stored_pixels(np.zeros((3, 4, 5)).tolist()).shape == (3, 4, 5)
    with pytest.raises(ValueError, match=r"of shape \[4, 5\]"):
        stored_pixels(np.zeros((4, 5)))


# What a model takes.


def processor_of(channels=3, size=32, **changes):
    from transformers import ViTImageProcessorPil

    values = {"size": {"height": size, "width": size}, "image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    return ViTImageProcessorPil(**{**values, **changes})


def greys(folder, count=20, side=32):
    for i in range(count):
        (folder / "class 0").mkdir(exist_ok=True, parents=True)
        (folder / "class 1").mkdir(exist_ok=True)
        Image.fromarray(noise((side, side), i)).save(folder / ("class 0", "class 1")[i % 2] / f"{i}.png")
    return folder


def pruner_of(model, processor, method="obs"):
    budget = {"metric": "density", "ratio": 0.5}
    config = {"method": method, "block_shape": [16, 16], "budget": budget, "refit": method == "obs"}
    return BlockPruner(model, processor, BlockPruneConfig.from_dict(config), name="tiny")


@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_other_channels_are_pruned_trained_and_measured(tmp_path, channels):
    folder = greys(tmp_path / "pictures")
    pruner = pruner_of(tiny_model(num_channels=channels), processor_of(channels))
    pruner.prune(folder)
    settings = {"epochs": 1, "warmup_epochs": 0, "batch_size": 10, "distillation": {"kind": "none"}, "ema": None}
    pruner.finetune(folder, FinetuneConfig.from_dict(settings))
    assert pruner.evaluate(folder).num_images == 20


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("mode", "fill"), [("L", (99,)), ("RGBA", (9, 8, 7, 6))])
def test_augmentations_keep_the_channels(name, mode, fill):
    image = Image.fromarray(noise((20, 30, 4))).convert(mode)
    changed = OPERATIONS[name](image, 7.0, 1, fill)
    assert (changed.mode, changed.size) == (mode, image.size)
    moves = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    if mode == "RGBA" and not moves:
        np.testing.assert_array_equal(changed.getchannel("A"), image.getchannel("A"))


@pytest.mark.parametrize("channels", [2, 5])
def test_models_of_channels_that_pictures_cannot_have_are_refused(channels):
    with pytest.raises(ModelError, match=f"takes images of {channels} channels; pictures can be made grey"):
        find_input(tiny_model(num_channels=channels), processor_of())


def test_channels_come_from_the_config_or_the_first_convolution():
    assert channels_of(tiny_config("vit", num_channels=4)) == 4
    assert channels_of(object(), torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))) == 1
    assert channels_of(object()) == 3


@pytest.mark.parametrize(
    ("model", "processor", "expected"),
    [
        ({}, {"size": 64}, r"brings pictures to 64x64 \(height x width\), ViTForImageClassification takes 32x32"),
        ({}, {"channels": 1}, "its image_mean has 1 values, the model takes images of 3 channels; set image_mean to 3"),
        ({"num_channels": 1}, {}, "its image_mean has 3 values, the model takes images of 1 channels"),
        ({"num_channels": 1}, {"channels": 1, "do_convert_rgb": True}, "do_convert_rgb=False|fails on a picture of 1"),
    ],
)
@pytest.mark.parametrize("work", ["prune", "prune without images", "evaluate", "benchmark"])
def test_processors_of_other_models_are_refused_before_the_work(images, model, processor, expected, work):
    options = dict(processor)
    processor = processor_of(options.pop("channels", 3), options.pop("size", 32), **options)
    pruner = pruner_of(tiny_model(**model), processor, "magnitude" if work == "prune without images" else "obs")
    if work == "benchmark":
        good = pruner_of(pruner.model, processor_of(model.get("num_channels", 3)), "magnitude")
        good.prune()
    act = {"prune": lambda: pruner.prune(images), "prune without images": pruner.prune}
    act |= {"evaluate": lambda: pruner.evaluate(images), "benchmark": lambda: pruner.benchmark(seconds=0.1)}
    with pytest.raises(ModelError, match=expected) as caught:
        act[work]()
    assert "\n" not in str(caught.value)


def test_pictures_that_stay_of_different_sizes_are_refused(tmp_path):
    for i in range(6):
        Image.fromarray(noise((32 + i % 2, 32, 3), i)).save(tmp_path / f"{i}.png")
    with pytest.raises(DataError, match=r"different sizes \(32x32, 33x32\)") as caught:
        pruner_of(tiny_model(), processor_of(do_resize=False)).prune(tmp_path)
    assert "do_resize=True" in str(caught.value)


def test_a_picture_of_another_size_than_the_models_is_refused(tmp_path):
    for i in range(4):
        Image.fromarray(noise((48, 32, 3), i)).save(tmp_path / f"{i}.png")
    with pytest.raises(DataError, match=r"an image is 48x32, the model takes 32x32 \(height x width\)"):
        pruner_of(tiny_model(), processor_of(do_resize=False)).prune(tmp_path)


def test_pictures_of_the_right_size_need_no_resizing(tmp_path):
    folder = greys(tmp_path / "pictures")
    pruner = pruner_of(tiny_model(), processor_of(do_resize=False))
    pruner.prune(folder)
    assert pruner.evaluate(folder).num_images == 20


@pytest.mark.parametrize(("family", "size"), [("dinov2", 48), ("swin", 40), ("vit", 32)])
def test_sizes_that_a_model_takes_are_left_alone(images, family, size):
    model, processor = tiny_model(family), processor_of(size=size)
    assert find_input(model, processor) == ModelInput(3, (size, size))
    assert BlockPruner(model, processor).evaluate(images).num_images == 24


def test_pictures_have_the_size_that_the_processor_makes_whatever_it_says():
    """ConvNeXt's resizes a short side and crops by itself, which its settings do not show."""
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875)
    model = tiny_model("dinov2", image_size=64)
    assert image_size(model.config, processor.to_dict()) == (64, 64)
    assert picture_size(model, processor) == (32, 32)
    pruner = BlockPruner(model, processor, BlockPruneConfig(method="magnitude", block_shape=(8, 8)))
    pruner.prune()
    as_large = tiny_model("dinov2", image_size=32)
    assert pruner.report()["budgets"][0]["dense"] == count_flops(as_large).total


def test_pictures_that_keep_their_size_are_taken_for_those_of_the_config():
    assert picture_size(tiny_model("dinov2"), processor_of(do_resize=False)) == (32, 32)


def test_looking_at_a_model_changes_nothing_of_it():
    model = tiny_model("dinov2").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_input(model, processor_of(size=48))
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_processors_that_give_something_else_are_refused():
    class Other:
        def __call__(self, images, return_tensors):
            return {"flattened_patches": torch.zeros(len(images), 3)}

    with pytest.raises(ModelError, match="Other: gives flattened_patches, not pixel_values"):
        find_input(tiny_model(), Other())


def test_too_many_broken_pictures_are_refused_with_a_reason(tmp_path):
    greys(tmp_path)
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(tmp_path / "class 0" / "none.tif")
    with pytest.raises(DataError, match=r"1 of 21 images cannot be decoded.*none\.tif: none of its values"):
        pruner_of(tiny_model(), processor_of()).prune(tmp_path)


def test_files_that_are_left_out_are_named_in_reports(tmp_path):
    folder = greys(tmp_path / "pictures")
    (folder / "class 0" / "phone.heic").write_bytes(b"no such format")
    (folder / "class 1" / "half.jpeg.part").write_bytes(b"half")
    stored_without = stored(noise(), "PNG")["bytes"]
    (folder / "class 1" / "nameless").write_bytes(stored_without)
    (folder / "LICENSE").write_text("free")
    (folder / "notes.txt").write_text("ants and bees")
    pruner = pruner_of(tiny_model(), processor_of())
    pruner.prune(folder)
    left = ["class 0/phone.heic", "class 1/half.jpeg.part", "class 1/nameless"]
    assert pruner.report()["calibration"]["left_out"] == left
    assert pruner.evaluate(folder).to_dict()["left_out"] == left
    assert pruner.report()["evaluation"]["left_out"] == left


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
@pytest.mark.parametrize("streaming", [False, True])
def test_formats_that_pillow_reads_and_the_loader_does_not_know(tmp_path, streaming):
    for name, form in (("class 0/1.avif", "AVIF"), ("class 0/2.PNG", "PNG"), ("class 1/3.AVIF", "AVIF")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise()).save(tmp_path / name, form)
    found = load_images(DataSource(tmp_path, streaming=streaming))
    assert sorted(r["image"]["path"].rsplit("/", 1)[-1] for r in found.dataset) == ["1.avif", "2.PNG", "3.AVIF"]
    assert found.class_names == ("class 0", "class 1")
    assert found.left_out == ()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("how", ["a file", "a list", "a pattern"])
def test_such_files_may_be_named_one_by_one(tmp_path, how, streaming):
    for number in (1, 2):
        Image.fromarray(noise(seed=number)).save(tmp_path / f"{number}.avif")
    one, two = str(tmp_path / "1.avif"), str(tmp_path / "2.avif")
    named = {"a file": one, "a list": [one, two], "a pattern": str(tmp_path / "*.avif")}[how]
    found = list(load_images(DataSource(named, streaming=streaming)).dataset)
    assert len(found) == (1 if how == "a file" else 2)
    for seed, record in enumerate(found, start=1):
        assert abs(np.asarray(decode_image(record["image"])).mean() - noise(seed=seed).mean()) < 2
