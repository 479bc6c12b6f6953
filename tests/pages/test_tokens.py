"""Pictures of merged patches: whose groups they are, of which models and images, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hf_blockprune import (
    BlockPruneConfig,
    BlockPruner,
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    draw_tokens,
)
from hf_blockprune.pages.patches import GAP, groups_picture
from tests.conftest import tiny_model, tiny_settings

MODELS = {
    "vit": (1, lambda: tiny_model("vit")),
    "deit": (2, lambda: tiny_model("deit")),
    "deit-distilled": (2, lambda: tiny_model("deit-distilled")),
    "dinov2": (1, lambda: tiny_model("dinov2")),
    "registers": (5, lambda: _made(Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig)),
    "clip": (1, lambda: _made(CLIPVisionModel, CLIPVisionConfig)),
    "siglip": (0, lambda: _made(SiglipVisionModel, SiglipVisionConfig)),
}


def _made(model_class, config_class):
    torch.manual_seed(0)
    return model_class(config_class(**tiny_settings(num_register_tokens=4))).eval()


def saved(folder, model, **processing):
    """A model's folder, with a processor for its images."""
    model.save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, **processing}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("dense"), tiny_model("vit"))


@pytest.fixture(scope="module")
def photo(images):
    return images / "picture_000.png"


def sides(path):
    """(the image, the merged one) of a picture, [height, width, 3]."""
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        pixels = np.asarray(picture)
    width = (pixels.shape[1] - GAP) // 2
    return pixels[:, :width], pixels[:, width + GAP :]


def test_a_group_has_its_mean_colour_and_a_line_around_it():
    pixels = torch.zeros(400, 800, 3, dtype=torch.uint8)
    pixels[:200, :400], pixels[:200, 400:], pixels[200:, :400], pixels[200:, 400:] = 40, 80, 100, 200
    picture = np.asarray(groups_picture(pixels, torch.tensor([[0, 0], [0, 2]]), (200, 400)))
    assert picture.shape == (400, 2 * 800 + GAP, 3)
    image, merged = picture[:, :800], picture[:, 800 + GAP :]
    assert np.array_equal(image, pixels.numpy())
    assert merged[100, 100, 0] == merged[100, 700, 0] == merged[300, 100, 0] == round((40 + 80 + 100) / 3)
    assert merged[300, 700, 0] == 200
    assert [merged[300, x, 0] for x in (398, 399, 400, 401)] == [73, 0, 255, 200]
    assert [merged[y, 700, 0] for y in (198, 199, 200, 201)] == [73, 0, 255, 200]
    assert (merged[100] == 73).all()  # no line within a group


def test_what_fills_no_patch_is_left_out():
    pixels = torch.zeros(320, 490, 3, dtype=torch.uint8)
    assert groups_picture(pixels, torch.zeros(3, 4, dtype=torch.int64), (100, 100)).size == (2 * 400 + GAP, 300)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_tokens_before_the_patches(tmp_path, photo, name):
    prefix, make = MODELS[name]
    folder = saved(tmp_path / "model", make())
    drawn = draw_tokens(folder, photo, tmp_path / "out.png", leave=3)
    assert (drawn.patches, drawn.tokens_before) == (16, 16 + prefix)
    assert drawn.tokens_after == [13 + prefix, 10 + prefix]
    assert (drawn.layer, drawn.groups) == (2, 10)
    assert draw_tokens(folder, photo, tmp_path / "first.png", leave=3, layer=1).groups == 13


def test_a_checkpoint_needs_no_schedule_and_may_be_given_one(tmp_path, dense, photo):
    config = BlockPruneConfig(
        method="magnitude", block_shape=(8, 8), tokens=(4, 2), budget={"metric": "flops", "ratio": 0.8}
    )
    pruner = BlockPruner.from_pretrained(dense, config)
    pruner.prune()
    pruner.save_pretrained(tmp_path / "pruned")
    drawn = draw_tokens(tmp_path / "pruned", photo, tmp_path / "out.png")
    assert drawn.tokens_after == [13, 11]
    assert draw_tokens(tmp_path / "pruned", photo, tmp_path / "other.png", leave=[0, 5]).tokens_after == [17, 12]


def test_the_last_layer_in_which_patches_leave_is_drawn(tmp_path, dense, photo):
    drawn = draw_tokens(dense, photo, tmp_path / "out.png", leave=[5, 0])
    assert (drawn.layer, drawn.groups, drawn.tokens_after) == (1, 11, [12, 12])


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "1"])
def test_any_picture(tmp_path, dense, mode):
    values = np.random.default_rng(0).integers(0, 256, (50, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    if mode == "I;16":
        picture = Image.fromarray(values[..., 0].astype(np.uint16) * 256)
    (picture if mode == "I;16" else picture.convert(mode)).save(tmp_path / "photo.png")
    assert draw_tokens(dense, tmp_path / "photo.png", tmp_path / "out.png", leave=3).groups == 10


def test_images_that_are_not_square(tmp_path, photo):
    wide = saved(tmp_path / "wide", tiny_model("vit", image_size=[16, 64]), size={"height": 16, "width": 64})
    drawn = draw_tokens(wide, photo, tmp_path / "out.png", leave=[3, 0])
    assert (drawn.image_size, drawn.patches) == ([16, 64], 16)
    image, merged = sides(tmp_path / "out.png")
    assert image.shape == merged.shape == (96, 384, 3)


def test_images_of_another_size_than_the_models(tmp_path, photo):
    """Part of the last row and column of pixels fills no patch."""
    folder = saved(tmp_path / "model", tiny_model("dinov2"), size={"height": 44, "width": 28})
    drawn = draw_tokens(folder, photo, tmp_path / "out.png", leave=3)
    assert (drawn.image_size, drawn.patches, drawn.tokens_after) == ([44, 28], 15, [13, 10])
    assert sides(tmp_path / "out.png")[1].shape == (10 * 40, 10 * 24, 3)


def test_a_model_in_half_precision(tmp_path, photo):
    folder = saved(tmp_path / "model", tiny_model("vit").bfloat16())
    assert draw_tokens(folder, photo, tmp_path / "out.png", leave=3).tokens_after == [14, 11]


@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_other_channels(tmp_path, photo, channels):
    settings = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels, "do_convert_rgb": False}
    folder = saved(tmp_path / "model", tiny_model("vit", num_channels=channels), **settings)
    assert draw_tokens(folder, photo, tmp_path / "out.png", leave=3).groups == 10
    assert sides(tmp_path / "out.png")[1].shape == (384, 384, 3)


@pytest.mark.parametrize(
    "processing", [{}, {"image_mean": [0.1, 0.2, 0.3]}, {"do_rescale": False}, {"do_normalize": False}]
)
def test_the_image_is_shown_as_it_was_before_it_was_normalised(tmp_path, processing):
    colour = np.zeros((32, 32, 3), np.uint8)
    colour[:] = (200, 100, 30)
    Image.fromarray(colour).save(tmp_path / "photo.png")
    folder = saved(tmp_path / "model", tiny_model("vit"), **processing)
    draw_tokens(folder, tmp_path / "photo.png", tmp_path / "out.png", leave=3)
    image, merged = sides(tmp_path / "out.png")
    assert (image == (200, 100, 30)).all()
    assert (merged[40, 40] == (200, 100, 30)).all()


def test_a_model_in_which_none_merge(tmp_path, dense, photo):
    for leave in (None, 0, [0, 0]):
        with pytest.raises(ModelError, match="no tokens merge in it; name how many patches leave each layer"):
            draw_tokens(dense, photo, tmp_path / "out.png", leave=leave)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"leave": [1, 2, 3]}, ModelError, "3 numbers, but the model has 2 layers"),
        ({"leave": 9}, ModelError, "18 of 16 patches leave"),
        ({"leave": -1}, ConfigError, "leave: expected numbers from 0"),
        ({"leave": [1, 1.5]}, ConfigError, "leave: expected numbers from 0"),
        ({"leave": 2, "layer": 3}, ConfigError, "layer: expected a number from 1 to 2, got 3"),
        ({"leave": 2, "layer": 0}, ConfigError, "layer: expected a number from 1 to 2, got 0"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(tmp_path, dense, photo, options, error, message):
    with pytest.raises(error, match=message):
        draw_tokens(dense, photo, tmp_path / "out.png", **options)
    assert list(tmp_path.iterdir()) == []


def test_models_whose_tokens_cannot_merge(tmp_path, photo):
    folder = saved(tmp_path / "beit", tiny_model("beit"))
    with pytest.raises(ModelError, match="a bias for each pair of places"):
        draw_tokens(folder, photo, tmp_path / "out.png", leave=3)


def test_files_that_are_no_pictures(tmp_path, dense, photo):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(photo.read_bytes()[:200])
    for name in ("text.png", "half.png", "missing.png", "."):
        with pytest.raises(DataError, match="no picture that can be read"):
            draw_tokens(dense, tmp_path / name, tmp_path / "out.png", leave=3)
    assert not (tmp_path / "out.png").exists()


def test_the_output_is_checked_before_any_work_and_replaced_only_as_a_whole(tmp_path, dense, photo):
    target = tmp_path / "out.png"
    target.write_bytes(b"older")
    with pytest.raises(CheckpointError, match="exists already"):
        draw_tokens("no/such-model", photo, target, leave=3)
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        draw_tokens("no/such-model", photo, tmp_path / "out.jpg", leave=3)
    with pytest.raises(CheckpointError, match="folder does not exist"):
        draw_tokens("no/such-model", photo, tmp_path / "no/out.png", leave=3)
    with pytest.raises(DataError):
        draw_tokens(dense, tmp_path / "missing.png", target, leave=3, overwrite=True)
    assert target.read_bytes() == b"older"
    draw_tokens(dense, photo, target, leave=3, overwrite=True)
    assert sides(target)[0].shape == (384, 384, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
