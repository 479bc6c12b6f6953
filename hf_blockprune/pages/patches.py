"""Pictures of an image's patches: those that merged in one colour, with a line around them."""

import math

import numpy as np
from PIL import Image
from torch import Tensor

LEAST_SIDE = 384  # of an image's longer side, so that lines do not cover small patches
GAP = 16  # between the two images
DARK, LIGHT = 0, 255  # a line has both, and so shows on any colour


def groups_picture(pixels: Tensor, groups: Tensor, size: tuple[int, int]) -> Image.Image:
    """An image as it is, and beside it as its groups of patches, each in its mean colour.

    Args:
        pixels: of the image, uint8 [height, width, 3].
        groups: which group each patch is in, whole numbers from 0 [rows, columns]; rows and columns of pixels that
            fill no patch are left out, as models leave them out.
        size: (height, width) of a patch.
    """
    shown, of_group = pixels.numpy(), groups.numpy()
    shown = shown[: size[0] * of_group.shape[0], : size[1] * of_group.shape[1]]
    scale = max(1, math.ceil(LEAST_SIDE / max(shown.shape)))
    groups_of_pixels = _repeated(of_group, size)
    merged = _lined(
        _repeated(_averaged(shown, groups_of_pixels), (scale, scale)), _repeated(groups_of_pixels, (scale, scale))
    )
    gap = np.full((merged.shape[0], GAP, 3), LIGHT, np.uint8)
    return Image.fromarray(np.concatenate([_repeated(shown, (scale, scale)), gap, merged], 1))


def _repeated(values: np.ndarray, times: tuple[int, int]) -> np.ndarray:
    """Each entry so many times downwards and to the right."""
    return values.repeat(times[0], 0).repeat(times[1], 1)


def _averaged(pixels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Each pixel [height, width, 3] in the mean colour of its group."""
    index = groups.ravel()
    counts = np.maximum(np.bincount(index), 1)
    means = [np.bincount(index, pixels[..., channel].ravel()) / counts for channel in range(pixels.shape[-1])]
    return np.stack(means, -1).round().astype(np.uint8)[groups]


def _lined(pixels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Pixels [height, width, 3] with a dark and a light line where groups meet."""
    pixels = pixels.copy()
    across, down = groups[:, :-1] != groups[:, 1:], groups[:-1] != groups[1:]
    pixels[:, 1:][across] = pixels[1:][down] = LIGHT
    pixels[:, :-1][across] = pixels[:-1][down] = DARK
    return pixels
