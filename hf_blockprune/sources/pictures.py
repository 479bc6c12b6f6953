"""Stored pictures as images of 8 bits a channel, upright, with the channels that a model takes.

What is white follows from how a picture is stored, not from its own brightest pixel: stretching each picture by itself
would make pictures equally bright that are not, and a model saw them as they are. Only values that no format explains
are stretched, which is said.
"""

import io
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers.utils import logging

from ..errors import DataError
from .reading import is_url, read_errors, reason

logger = logging.get_logger(__name__)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by a model's channels
# What a picture that cannot be decoded raises.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
PLUGINS = ("pillow_avif", "pillow_heif", "pillow_jxl")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_TAG, PHOTOMETRIC_TAG, SIGN_TAG = 258, 262, 339  # of TIFF
WHITE_IS_ZERO, SIGNED = 0, 2
# Resampling overshoots: floats from 0 to 1, or to 255, may reach this share beyond. What is another format with such
# values would be all black.
OVERSHOOT = 0.25
NEARLY_BLACK = 16  # of 255


@dataclass(frozen=True)
class Decoding:
    """How stored pictures become what a model takes.

    Attributes:
        channels: of the model: 1 is grey, 3 RGB, 4 RGBA.
        mode: of Pillow, to bring pictures to first; None for their own.
        white: the value of white in pictures of more than 8 bits; None for what their format says.
    """

    channels: int = 3
    mode: str | None = None
    white: float | None = None

    def __call__(self, stored: object) -> Image.Image:
        """See `decode_image`."""
        return decode_image(stored, self)


def decode_image(stored: object, decoding: Decoding | None = None) -> Image.Image:
    """An image of 8 bits a channel, turned upright; of several frames or pages the first.

    EXIF that cannot be read is ignored. Pictures of 16 bits are scaled by their whole range, 65535, those of 32 by the
    least of 255, 65535 and their whole range that holds their values, those in floating point by the least of 1, 255
    and 65535. Other values are stretched from the picture's darkest to its brightest, with a warning.

    Args:
        stored: the {"bytes", "path"} record of `datasets`, a PIL image, or an array [height, width],
            [height, width, channels] or [channels, height, width] of numbers.
        decoding: how; by default RGB.

    Raises:
        OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError: it is no image that can be decoded.
        DataError: it lies on the network and cannot be read.
    """
    decoding = decoding or Decoding()
    if isinstance(stored, Image.Image):
        return _finished(stored, decoding)
    if stored is not None and not isinstance(stored, dict):
        return _to_mode(_from_array(np.asarray(stored), decoding.white), decoding)
    if stored is None or (stored.get("bytes") is None and stored.get("path") is None):
        raise ValueError("no picture in this row")
    content, path = stored.get("bytes"), str(stored.get("path"))
    if content is None and is_url(path):
        content = _read_url(path)
    register_plugins()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on EXIF that is broken
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            return _finished(image, decoding)


@cache
def register_plugins() -> None:
    """Let Pillow read the formats of those of its plugins that are installed."""
    for name in PLUGINS:
        with suppress(ImportError):
            getattr(import_module(name), "register_heif_opener", lambda: None)()


def name_of(stored: object, position: int) -> str:
    """What to call a record's picture in messages: its path where it has one, else its number."""
    return (stored.get("path") if isinstance(stored, dict) else None) or f"image {position}"


def stored_pixels(stored: object) -> torch.Tensor:
    """pixel_values [channels, height, width], float32, that an image processor made earlier.

    Args:
        stored: a tensor, an array, or lists of numbers.

    Raises:
        ValueError: they are none.
    """
    pixels = torch.as_tensor(stored if torch.is_tensor(stored) else np.asarray(stored, dtype=np.float32)).float()
    if pixels.dim() != 3:
        raise ValueError(f"pixel_values of shape {list(pixels.shape)} are no [channels, height, width]")
    return pixels


def _finished(image: Image.Image, decoding: Decoding) -> Image.Image:
    image.load()  # TIFF turns itself, and PNG may hold its EXIF after the pixels
    turn = TURNS.get(_orientation(image))
    eight = _to_8_bits(image, decoding.white)
    return _to_mode(eight if turn is None else eight.transpose(turn), decoding)


def _orientation(image: Image.Image) -> int:
    """The EXIF tag, 1 where it cannot be read."""
    # What ends the first reading leaves the tags that were read by then to the second.
    for _ in range(2):
        with suppress(Exception):  # broken EXIF raises whatever the code that stumbles over it does
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
            return found if isinstance(found, int) else 1
    return 1


def _to_mode(image: Image.Image, decoding: Decoding) -> Image.Image:
    if decoding.channels not in MODES:
        raise DataError(f"a model of {decoding.channels} channels: pictures can be made grey, RGB or RGBA (1, 3 or 4)")
    # Pillow knows one way from each of these.
    for mode, step in (("La", "LA"), ("LAB", "RGB")):
        if image.mode == mode:
            image = image.convert(step)
    if decoding.mode is not None:
        image = image.convert(decoding.mode)
    return image.convert(MODES[decoding.channels])


def _to_8_bits(image: Image.Image, white: float | None) -> Image.Image:
    """The image with its values scaled to 0 to 255, where it has more bits than 8."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image)
    tags: Mapping[int, int | tuple[int, ...]] = getattr(image, "tag_v2", {})  # of TIFF alone
    signed = SIGNED in np.atleast_1d(tags.get(SIGN_TAG, 0 if tags else SIGNED))
    bits = int(np.max(tags.get(BITS_TAG, 16 if image.mode.startswith("I;") else 32)))
    if image.mode == "I" and tags and not signed:
        values = values.astype(np.uint32)  # Pillow has no mode for them
    full = 2.0 ** (bits - 1 if signed and image.mode == "I" else bits) - 1
    if white is not None:
        ranges: tuple[float, ...] = (white,)
    elif image.mode.startswith("I;"):
        ranges = (full,)
    elif image.mode == "I":
        # PNG and PGM hold no more than 16 bits, whatever Pillow reads them as.
        ranges = (65535,) if image.format in ("PNG", "PPM") else tuple(sorted({255, min(65535, full), full}))
    else:
        ranges = (1, 255, 65535)
    shades = _shades(values, ranges, given=white is not None)
    if WHITE_IS_ZERO in np.atleast_1d(tags.get(PHOTOMETRIC_TAG, 1)):
        shades = 255 - shades  # Pillow inverts those of 8 bits alone
    return Image.fromarray(shades)


def _shades(values: np.ndarray, ranges: tuple[float, ...], *, given: bool) -> np.ndarray:
    """Values as uint8: the least range that holds them becomes 0 to 255, or else their own.

    What is no number becomes black, infinity the end of the range on its side.

    Raises:
        ValueError: none of them is a number.
    """
    numbers = values[np.isfinite(values)]
    if values.size and not numbers.size:
        raise ValueError("none of its values is a number")
    low, high = (float(numbers.min()), float(numbers.max())) if values.size else (0.0, 0.0)
    black, white = 0.0, ranges[0] if given else _white(low, high, ranges, floating=values.dtype.kind == "f")
    if white is None:
        black, white = low, high
        # One text for all pictures, or it would be said of each.
        logger.warning_once(
            "Pictures of more than 8 bits are stretched from their own darkest to their own brightest value, since "
            "nothing says what is black or white in them. Say which value is white (white in the data set's "
            "description)."
        )
    if black == 0 and white == 65535 and values.dtype.kind in "iu":
        shades = values >> 8  # the high byte, as Pillow itself makes it of coloured pictures
    else:
        with np.errstate(invalid="ignore"):  # what is no number yet
            shades = np.round((values.astype(np.float64) - black) * (255 / ((white - black) or 1)))
    shades = np.nan_to_num(np.clip(shades, 0, 255), nan=0).astype(np.uint8)
    if values.size and high > 0 and shades.max() <= NEARLY_BLACK:
        logger.warning_once(
            "Pictures of more than 8 bits come out nearly black: their values use a small part of what their format "
            "can hold. Say which value is white (white in the data set's description)."
        )
    return shades


def _white(low: float, high: float, ranges: tuple[float, ...], *, floating: bool) -> float | None:
    """The least range that holds values from low to high; None without one, or where 32 bits would be nearly black."""
    for white in ranges:
        share = OVERSHOOT if floating and white <= 255 else 0.0
        if -share * max(1, high) <= low and high <= white * (1 + share):
            return white if white <= 65535 or high * 255 > NEARLY_BLACK * white else None
    return None


def _from_array(values: np.ndarray, white: float | None) -> Image.Image:
    """Of numbers [h, w], [h, w, c] or [c, h, w]."""
    if values.ndim == 3 and values.shape[-1] not in (1, 2, 3, 4) and values.shape[0] in (1, 2, 3, 4):
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.dtype.kind not in "biuf" or values.ndim not in (2, 3) or not values.size:
        raise ValueError(f"an array of {values.dtype} {list(values.shape)} is no picture [height, width, channels]")
    if values.ndim == 3 and values.shape[-1] not in (2, 3, 4):
        raise ValueError(f"it has {values.shape[-1]} channels; pictures of 1 to 4 can be used")
    if values.dtype == bool:
        return Image.fromarray(values.astype(np.uint8) * 255)
    if values.dtype != np.uint8:
        ranges: tuple[float, ...] = (255, 65535, 2**31 - 1)
        if values.dtype.kind == "f":
            ranges = (1, 255, 65535)
        elif values.dtype == np.uint16:
            ranges = (65535,)
        values = _shades(values, ranges if white is None else (white,), given=white is not None)
    return Image.fromarray(np.ascontiguousarray(values))


def _read_url(url: str) -> bytes:
    """A network that fails is no corrupt image: with it left out, the result would be another one."""
    from datasets.utils.file_utils import xopen

    try:
        with xopen(url, "rb") as file:
            return file.read()
    except read_errors() as error:
        raise DataError(f"{url}: cannot be read ({reason(error)}); try again") from error
