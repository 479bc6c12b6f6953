"""Views of training images: each operation equals a plain reference; draws follow from seed, epoch and image."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from hf_blockprune import AugmentConfig, FinetuneConfig
from hf_blockprune.data.batches import load_images
from hf_blockprune.finetune.images import TrainingImages, epoch_order, share_out
from hf_blockprune.finetune.randaugment import OPERATIONS, rand_augment
from hf_blockprune.finetune.views import PAIR, crop_box, draws, erase, mix, view
from tests.conftest import tiny_config, write_images

FILL = (10, 200, 90)
PLAIN = {"smallest_crop": 1.0, "flip": 0.0, "operations": 0, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}


def picture(height=20, width=24, seed=0):
    """A smooth random picture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def values(image):
    return np.asarray(image).astype(np.float64)


def sampled(pixels, x, y):
    """Bilinear values at positions between pixels' centres, NaN outside of the picture; float64 [h, w, 3]."""
    height, width = pixels.shape[:2]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right_share, bottom_share = (x - left)[..., None], (y - top)[..., None]

    def at(row, col):
        return pixels[row.clip(0, height - 1), col.clip(0, width - 1)]

    upper = at(top, left) * (1 - right_share) + at(top, left + 1) * right_share
    lower = at(top + 1, left) * (1 - right_share) + at(top + 1, left + 1) * right_share
    result = upper * (1 - bottom_share) + lower * bottom_share
    result[~inside] = np.nan
    return result


def moved(image, back):
    """The reference of a geometric operation; `back` gives the place that each pixel's value comes from."""
    pixels = values(image)
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]] + 0.5
    result = sampled(pixels, *back(x, y))
    return np.where(np.isnan(result), np.array(FILL, dtype=float), result)


def rotated(image, degrees):
    """Positive turns counterclockwise, y pointing down."""
    angle, (width, height) = np.deg2rad(degrees), image.size

    def back(x, y):
        dx, dy = x - width / 2, y - height / 2
        return (
            np.cos(angle) * dx - np.sin(angle) * dy + width / 2,
            np.sin(angle) * dx + np.cos(angle) * dy + height / 2,
        )

    return moved(image, back)


GEOMETRY = {
    "rotate": lambda image, level, sign: rotated(image, sign * 3.0 * level),
    "shear_x": lambda image, level, sign: moved(image, lambda x, y: (x + sign * 0.03 * level * y, y)),
    "shear_y": lambda image, level, sign: moved(image, lambda x, y: (x, y + sign * 0.03 * level * x)),
    "translate_x": lambda image, level, sign: moved(image, lambda x, y: (x + sign * 0.045 * level * image.width, y)),
    "translate_y": lambda image, level, sign: moved(image, lambda x, y: (x, y + sign * 0.045 * level * image.height)),
}


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize(("level", "sign"), [(0.0, 1), (3.7, 1), (9.0, -1), (10.0, 1)])
def test_geometric_operations_take_each_pixel_from_its_place(name, level, sign):
    image = picture()
    got, want = values(OPERATIONS[name](image, level, sign, FILL)), GEOMETRY[name](image, level, sign)
    off = np.abs(got - np.floor(want + 1e-6)).max(-1)  # Pillow cuts fractions off
    # It works in fixed point: a place on the very edge may fall on its other side.
    assert (off > 1).mean() < 0.02
    assert (off > 0).mean() < 0.1  # nor do whole values come out whole of products


def grey(pixels):
    """Luma as ITU-R 601-2 has it, rounded."""
    return np.floor(pixels @ np.array([19595, 38470, 7471]) / 65536 + 0.5)


def blend(away, pixels, factor):
    return (away + factor * (pixels - away)).clip(0, 255)


def smoothed(pixels):
    """With weights 1 around a 5, all over 13; the border as it is."""
    result = pixels.copy()
    around = sum(
        pixels[1 + i : pixels.shape[0] - 1 + i, 1 + j : pixels.shape[1] - 1 + j] for i in (-1, 0, 1) for j in (-1, 0, 1)
    )
    result[1:-1, 1:-1] = np.floor((around + 4 * pixels[1:-1, 1:-1]) / 13 + 0.5)
    return result


def factor_of(level, sign):
    return max(0.1, 1 + sign * 0.09 * level)


def equalized(pixels):
    result = np.empty_like(pixels)
    for channel in range(3):
        counts = np.bincount(pixels[..., channel].astype(int).ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        before = np.concatenate([[0], counts.cumsum()[:-1]])
        table = np.minimum((step // 2 + before) // step, 255) if step else np.arange(256)
        result[..., channel] = table[pixels[..., channel].astype(int)]
    return result


def stretched(pixels):
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    return np.floor((pixels - low) * (255 / (high - low)) + 1e-9)


COLOURS = {
    "auto_contrast": lambda p, level, sign: stretched(p),
    "equalize": lambda p, level, sign: equalized(p),
    "invert": lambda p, level, sign: 255 - p,
    "posterize": lambda p, level, sign: (p // 2 ** (4 + int(0.4 * level))) * 2 ** (4 + int(0.4 * level)),
    "solarize": lambda p, level, sign: np.where(p < 256 - min(256, int(25.6 * level)), p, 255 - p),
    "solarize_add": lambda p, level, sign: np.where(p < 128, np.minimum(p + int(11 * level), 255), p),
    "color": lambda p, level, sign: blend(grey(p)[..., None], p, factor_of(level, sign)),
    "contrast": lambda p, level, sign: blend(int(grey(p).mean() + 0.5), p, factor_of(level, sign)),
    "brightness": lambda p, level, sign: blend(0.0, p, factor_of(level, sign)),
    "sharpness": lambda p, level, sign: blend(smoothed(p), p, factor_of(level, sign)),
}


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize(("level", "sign"), [(0.0, 1), (4.3, -1), (9.0, 1), (10.0, -1)])
def test_colour_operations_are_their_formulas(name, level, sign):
    pixels = values(picture(seed=3))
    got = values(OPERATIONS[name](picture(seed=3), level, sign, FILL))
    assert np.abs(got - COLOURS[name](pixels, level, sign)).max() <= 1


def test_every_operation_has_a_reference():
    assert OPERATIONS.keys() == GEOMETRY.keys() | COLOURS.keys()


def test_randaugment_draws_operations_alike_and_applies_half_of_them():
    image, counts = picture(), {}
    for index in range(600):
        rng = draws(0, 0, index)
        expected = image
        spare = copy.deepcopy(rng)
        for _ in range(2):
            name = list(OPERATIONS)[int(spare.integers(len(OPERATIONS)))]
            applied, positive = spare.random(2) < 0.5
            level = float(np.clip(9 + 0.5 * spare.standard_normal(), 0, 10))
            assert 6 < level <= 10
            if applied:
                counts[name] = counts.get(name, 0) + 1
                expected = OPERATIONS[name](expected, level, 1 if positive else -1, FILL)
        got = rand_augment(image, rng, operations=2, magnitude=9.0, std=0.5, fill=FILL)
        assert np.array_equal(values(got), values(expected))
    assert counts.keys() == OPERATIONS.keys()
    assert 500 < sum(counts.values()) < 700  # of 1200


def test_crops_cover_areas_and_shapes_evenly():
    boxes = np.array([crop_box((100, 80), 0.08, draws(1, 0, i)) for i in range(3000)])
    left, top, width, height = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 100).all()
    assert (top + height <= 80).all()
    area, ratio = width * height / 8000, width / height
    assert 0.07 < area.min() < 0.1
    assert 0.95 < area.max() <= 1
    assert 0.72 < ratio.min() < 0.78
    assert 1.3 < ratio.max() < 1.38
    small = area[area < 0.4]  # such crops fit whatever their shape, so that none was drawn again
    assert abs(np.quantile(small, 0.5) - 0.24) < 0.02


def test_a_crop_that_never_fits_is_the_largest_in_the_middle():
    assert crop_box((400, 20), 1.0, draws(0, 0, 0)) == (186, 0, 27, 20)
    assert crop_box((20, 400), 1.0, draws(0, 0, 0)) == (0, 186, 20, 27)


def test_a_view_is_a_crop_resized_and_perhaps_mirrored():
    image, settings = picture(40, 60), AugmentConfig(**{**PLAIN, "smallest_crop": 0.2, "flip": 0.5})
    mirrored = 0
    for index in range(200):
        got = values(view(image, settings, size=(16, 12), fill=FILL, rng=draws(0, 2, index)))
        rng = draws(0, 2, index)
        left, top, width, height = crop_box((60, 40), 0.2, rng)
        crop = image.crop((left, top, left + width, top + height)).resize((12, 16), Image.Resampling.BICUBIC)
        flipped = rng.random() < 0.5
        mirrored += flipped
        assert np.array_equal(got, values(crop)[:, ::-1] if flipped else values(crop))
    assert 75 < mirrored < 125


def test_erasing_writes_noise_into_one_rectangle_of_a_share_of_the_views():
    erased, shares = 0, []
    noise = []
    for index in range(2000):
        pixels = torch.full((3, 32, 40), 7.0)
        got = erase(pixels, 0.25, draws(0, 0, index))
        assert (pixels == 7).all()
        changed = (got != 7).any(0)
        if not changed.any():
            continue
        erased += 1
        rows, cols = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        assert changed[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all()
        assert len(rows) * len(cols) == int(changed.sum())
        shares.append(float(changed.float().mean()))
        noise.append(got[:, changed].flatten())
    assert 420 < erased < 580
    assert min(shares) > 0.01
    assert max(shares) < 0.36
    drawn = torch.cat(noise)
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02


def pair():
    torch.manual_seed(0)
    return torch.randn(2, 3, 16, 20), torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.2, 0.8]])


def test_mixup_gives_both_images_the_same_share_of_themselves():
    pixels, targets = pair()
    shares = []
    for index in range(300):
        got, labels = mix(pixels, targets, AugmentConfig(cutmix=0.0), draws(0, 0, index, PAIR))
        share = float((got[0] - pixels[1]).flatten()[0] / (pixels[0] - pixels[1]).flatten()[0])
        shares.append(share)
        for i, j in ((0, 1), (1, 0)):
            torch.testing.assert_close(got[i], share * pixels[i] + (1 - share) * pixels[j], rtol=0, atol=1e-4)
            torch.testing.assert_close(labels[i], share * targets[i] + (1 - share) * targets[j], rtol=0, atol=1e-4)
    assert abs(np.mean(shares) - 0.5) < 0.06
    assert abs(np.var(shares) - 1 / (4 * (2 * 0.8 + 1))) < 0.02  # Beta(a, a)


def test_cutmix_exchanges_a_rectangle_and_labels_by_its_area():
    pixels, targets = pair()
    for index in range(300):
        got, labels = mix(pixels, targets, AugmentConfig(mixup=0.0), draws(0, 0, index, PAIR))
        other = (got[0] != pixels[0]).all(0)
        assert torch.equal(got[0], torch.where(other, pixels[1], pixels[0]))
        assert torch.equal(got[1], torch.where(other, pixels[0], pixels[1]))
        rows, cols = other.any(1).sum(), other.any(0).sum()
        assert int(rows * cols) == int(other.sum())
        share = 1 - float(other.float().mean())
        torch.testing.assert_close(labels, share * targets + (1 - share) * targets.flip(0), rtol=0, atol=1e-5)


def test_pairs_take_mixup_or_cutmix_or_stay():
    pixels, targets = pair()
    kinds = {"same": 0, "cut": 0, "mixed": 0}
    for index in range(400):
        got, _ = mix(pixels, targets, AugmentConfig(mixing=0.6), draws(0, 0, index, PAIR))
        cut = ((got[0] == pixels[0]) | (got[0] == pixels[1])).all()
        kinds["same" if torch.equal(got, pixels) else "cut" if cut else "mixed"] += 1
    assert 120 < kinds["same"] < 200
    assert 80 < kinds["cut"] < 160
    assert 80 < kinds["mixed"] < 160


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory):
    return load_images(write_images(tmp_path_factory.mktemp("thirteen") / "images", 13, size=36))


def epoch_of(images, processor, settings, *, rank=0, world=1, epoch=0, first=0):
    source = TrainingImages(images, processor, settings, tiny_config("vit"), (32, 32), rank, world)
    return list(source.epoch(epoch, first))


def by_step(processes):
    """For each step the views of all processes as a set of bytes, with their targets."""
    return [
        sorted(
            view.numpy().tobytes() + target.numpy().tobytes()
            for step in steps
            for batch in step
            if "pixel_values" in batch
            for view, target in zip(batch["pixel_values"], batch["targets"], strict=True)
        )
        for steps in zip(*processes, strict=True)
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_views_do_not_depend_on_processes_micro_batches_or_where_one_begins(thirteen, processor, streaming):
    images = thirteen
    settings = FinetuneConfig(batch_size=6, micro_batch=4, seed=3)
    if streaming:
        stream = thirteen.dataset.to_iterable_dataset()
        images = type(thirteen)(stream, "s", thirteen.image_column, thirteen.labelled, shuffle_buffer=5)
        settings = settings.replace(epoch_images=13)
    whole = by_step([epoch_of(images, processor, settings)])
    assert [len(step) for step in whole] == [6, 6, 1]
    assert len({view for step in whole for view in step}) == 13
    for world, changes in ((2, {}), (3, {"micro_batch": 2}), (1, {"micro_batch": 6}), (5, {})):
        processes = [
            epoch_of(images, processor, settings.replace(**changes), rank=rank, world=world) for rank in range(world)
        ]
        assert by_step(processes) == whole
        assert len({tuple(len(step) for step in steps) for steps in processes}) == 1
    assert by_step([epoch_of(images, processor, settings, first=2)]) == whole[2:]
    for other in (settings.replace(seed=4), settings):
        assert by_step([epoch_of(images, processor, other, epoch=int(other is settings))]) != whole


def test_an_epoch_has_every_image_once_and_epochs_have_their_own_orders():
    orders = [epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert orders[1] != orders[2]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_batch_is_shared_out_whole(world, count, micro):
    parts = [share_out(list(range(count)), micro, rank, world) for rank in range(world)]
    assert sorted(image for part in parts for batch in part for image in batch) == list(range(count))
    assert len({len(part) for part in parts}) == 1
    assert max(len(batch) for part in parts for batch in part) <= micro


def test_without_augmentation_images_are_those_of_evaluation(thirteen, processor):
    settings = FinetuneConfig(batch_size=13, micro_batch=13, augment=None, label_smoothing=0.3)
    (batch,) = epoch_of(thirteen, processor, settings)[0]
    order = epoch_order(13, 0, 0).tolist()
    raw = [Image.open(thirteen.dataset[i]["image"]["path"]).convert("RGB") for i in order]
    expected = processor(images=raw, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    labels = torch.tensor([thirteen.dataset[i]["label"] for i in order])
    assert torch.equal(batch["labels"], labels)
    smooth = torch.nn.functional.one_hot(labels, 7) * 0.7 + 0.3 / 7
    torch.testing.assert_close(batch["targets"], smooth.float())


def test_views_of_no_change_are_those_of_evaluation(processor, tmp_path):
    images = load_images(write_images(tmp_path / "images", 4, size=32))
    settings = FinetuneConfig(batch_size=4, micro_batch=4)
    square = settings.replace(augment={**PLAIN})
    (plain,), (views,) = (epoch_of(images, processor, s)[0] for s in (settings.replace(augment=None), square))
    assert torch.equal(views["pixel_values"], plain["pixel_values"])
