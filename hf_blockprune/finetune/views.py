"""Random views of training images. All draws of a view follow from (seed, epoch, position of the image).

So a run that goes on, and any number of processes, see the same views. Written here as no library that does without
torchvision takes its draws from a generator of each image's own.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .config import AugmentConfig
from .randaugment import Colour, rand_augment

CROP_RATIOS = (3 / 4, 4 / 3)
CROP_TRIES = ERASING_TRIES = 10
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIOS = (0.3, 1 / 0.3)
VIEW, PAIR, ORDER, DROPOUT = 0, 1, 2, 3  # what is drawn


def draws(seed: int, epoch: int, index: int, what: int = VIEW) -> np.random.Generator:
    """A generator for an image in an epoch, or for a place in a step; `what` keeps different draws apart."""
    return np.random.default_rng([seed, epoch, index, what])


def view(
    image: Image.Image, settings: AugmentConfig, *, size: tuple[int, int], fill: Colour, rng: np.random.Generator
) -> Image.Image:
    """A random view, before it becomes a tensor.

    Args:
        image: grey, RGB or RGBA.
        settings: crops, flips and the operations of RandAugment.
        size: (height, width) of the view.
        fill: colour of what operations uncover.
        rng: where draws come from.
    """
    left, top, width, height = crop_box(image.size, settings.smallest_crop, rng)
    crop = image.crop((left, top, left + width, top + height))
    crop = crop.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    if rng.random() < settings.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return rand_augment(
        crop,
        rng,
        operations=settings.operations,
        magnitude=settings.magnitude,
        std=settings.magnitude_std,
        fill=fill,
    )


def crop_box(size: tuple[int, int], smallest: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a crop of random area, shape and place.

    Where no draw fits, it is the largest one in the middle whose shape is allowed.

    Args:
        size: (width, height) of the picture.
        smallest: least share of its area.
        rng: where draws come from.
    """
    width, height = size
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(smallest, 1)
        ratio = _ratio(CROP_RATIOS, rng)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    ratio = min(max(width / height, CROP_RATIOS[0]), CROP_RATIOS[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (width - w) // 2, (height - h) // 2, w, h


def _ratio(limits: tuple[float, float], rng: np.random.Generator) -> float:
    """A side over the other, as likely as its inverse."""
    return math.exp(rng.uniform(math.log(limits[0]), math.log(limits[1])))


def erase(pixels: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """A view of which, with a probability of `share`, a rectangle is normal noise.

    Args:
        pixels: [channels, height, width], normalised.
        share: the probability, from 0 to 1.
        rng: where draws come from.
    """
    channels, height, width = pixels.shape
    if rng.random() >= share:
        return pixels
    for _ in range(ERASING_TRIES):
        area = height * width * rng.uniform(ERASED_AREA[0], ERASED_AREA[1])
        ratio = _ratio(ERASED_RATIOS, rng)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            noise = torch.from_numpy(rng.standard_normal((channels, h, w), dtype=np.float32))
            pixels = pixels.clone()
            pixels[:, top : top + h, left : left + w] = noise.to(pixels)
            return pixels
    return pixels


def mix(pixels: Tensor, targets: Tensor, settings: AugmentConfig, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Both images of a pair, each mixed with the other in equal shares, by mixup or CutMix.

    Args:
        pixels: [2, channels, height, width].
        targets: shares of the classes, [2, classes].
        settings: how often pairs are mixed, and by what.
        rng: where draws come from.

    Returns:
        The pair's pixels and targets.
    """
    mixed, cut = rng.random(2)
    if mixed >= settings.mixing or not settings.mixes:
        return pixels, targets
    if settings.cutmix and (cut < 0.5 or not settings.mixup):
        pixels, share = _cutmix(pixels, float(rng.beta(settings.cutmix, settings.cutmix)), rng)
    else:
        share = float(rng.beta(settings.mixup, settings.mixup))
        pixels = torch.lerp(pixels.flip(0), pixels, share)
    return pixels, torch.lerp(targets.flip(0), targets, share)


def _cutmix(pixels: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """(the pair with a rectangle exchanged, the share of the area that stayed); `share` is what was asked for."""
    height, width = pixels.shape[-2:]
    h, w = (round(side * math.sqrt(1 - share)) for side in (height, width))
    middle_y, middle_x = int(rng.integers(height)), int(rng.integers(width))
    rows = slice(max(0, middle_y - h // 2), min(height, middle_y + h - h // 2))
    cols = slice(max(0, middle_x - w // 2), min(width, middle_x + w - w // 2))
    pixels = pixels.clone()
    pixels[..., rows, cols] = pixels[..., rows, cols].flip(0)
    return pixels, 1 - (rows.stop - rows.start) * (cols.stop - cols.start) / (height * width)
