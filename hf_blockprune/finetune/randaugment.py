"""RandAugment's operations on PIL images (arXiv 1909.13719), with the ranges of DeiT's "increasing" form.

Each takes an image, a magnitude from 0 to 10, a sign (-1 or 1) for those that go both ways, and the colour of what is
uncovered.
"""

from collections.abc import Callable
from functools import wraps

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MOST = 10.0
Colour = tuple[int, ...]
Operation = Callable[[Image.Image, float, int, Colour], Image.Image]
DEGREES, SHEAR, SHIFT = 30.0, 0.3, 0.45
BITS, ENHANCEMENT, SOLARIZE_ADD, HALF = 4, 0.9, 110, 128


def rand_augment(
    image: Image.Image, rng: np.random.Generator, *, operations: int, magnitude: float, std: float, fill: Colour
) -> Image.Image:
    """Apply operations drawn with replacement, each or not with equal chances, at about the same magnitude.

    Args:
        image: grey, RGB or RGBA, whose transparency moves with it and stays as it is otherwise.
        rng: where draws come from; as many are taken whatever is applied.
        operations: how many are drawn.
        magnitude: their mean magnitude, from 0 to 10.
        std: standard deviation of the magnitude, which stays within 0 and 10.
        fill: colour of what is uncovered.
    """
    names = list(OPERATIONS)
    for _ in range(operations):
        name = names[int(rng.integers(len(names)))]
        applied, positive = rng.random(2) < 0.5
        level = float(np.clip(magnitude + std * rng.standard_normal(), 0, MOST))
        if applied:
            image = OPERATIONS[name](image, level, 1 if positive else -1, fill)
    return image


def _of_colours(operation: Operation) -> Operation:
    """An operation on each channel's values, which leaves transparency alone."""

    @wraps(operation)
    def apply(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
        if image.mode != "RGBA":
            return operation(image, level, sign, fill)
        result = operation(image.convert("RGB"), level, sign, fill)
        result.putalpha(image.getchannel("A"))
        return result

    return apply


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Colour) -> Image.Image:
    """Each pixel (x, y) of the result is that at (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)


def rotate(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """About the centre, by up to 30 degrees."""
    return image.rotate(sign * level / MOST * DEGREES, Image.Resampling.BILINEAR, fillcolor=fill)


def shear_x(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """Rows move by up to 0.3 of their distance from the top."""
    return _affine(image, (1, sign * level / MOST * SHEAR, 0, 0, 1, 0), fill)


def shear_y(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """Columns likewise."""
    return _affine(image, (1, 0, 0, sign * level / MOST * SHEAR, 1, 0), fill)


def translate_x(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """By up to 0.45 of the width."""
    return _affine(image, (1, 0, sign * level / MOST * SHIFT * image.width, 0, 1, 0), fill)


def translate_y(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """By up to 0.45 of the height."""
    return _affine(image, (1, 0, 0, 0, 1, sign * level / MOST * SHIFT * image.height), fill)


@_of_colours
def auto_contrast(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """Stretch each channel to the whole range."""
    return ImageOps.autocontrast(image)


@_of_colours
def equalize(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """Make each channel's histogram even."""
    return ImageOps.equalize(image)


@_of_colours
def invert(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """255 - value."""
    return ImageOps.invert(image)


@_of_colours
def posterize(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """Keep the 4 to 1 highest bits, at magnitude 10 none."""
    bits = BITS - int(level / MOST * BITS)
    return image.point([value & ~(2 ** (8 - bits) - 1) for value in range(256)] * len(image.getbands()))


@_of_colours
def solarize(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """Invert what is as bright as a threshold, which falls from 256 to 0."""
    return ImageOps.solarize(image, 256 - min(256, int(level / MOST * 256)))


@_of_colours
def solarize_add(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """Add up to 110 to what is darker than 128."""
    more = int(level / MOST * SOLARIZE_ADD)
    table = [min(255, value + more) if value < HALF else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _factor(level: float, sign: int) -> float:
    return max(0.1, 1 + sign * level / MOST * ENHANCEMENT)


def color(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """Towards grey, or away from it."""
    return ImageEnhance.Color(image).enhance(_factor(level, sign))


def contrast(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """Towards the mean grey, or away from it."""
    return ImageEnhance.Contrast(image).enhance(_factor(level, sign))


def brightness(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """Towards black, or away from it."""
    return ImageEnhance.Brightness(image).enhance(_factor(level, sign))


def sharpness(image: Image.Image, level: float, sign: int, fill: Colour) -> Image.Image:
    """Towards a smoothed image, or away from it."""
    return ImageEnhance.Sharpness(image).enhance(_factor(level, sign))


OPERATIONS: dict[str, Operation] = {
    f.__name__: f
    for f in (
        auto_contrast,
        equalize,
        invert,
        rotate,
        posterize,
        solarize,
        solarize_add,
        color,
        contrast,
        brightness,
        sharpness,
        shear_x,
        shear_y,
        translate_x,
        translate_y,
    )
}
