"""Views of calibration images for distillation: the teacher labels every one, so they may be bold."""

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_CROP = 0.25  # share of the picture's area
MIXING = 0.8  # of the Beta distribution of mixup


def views(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flipped and cropped at random, at the size of the originals, and mixed in pairs (mixup, arXiv 1710.09412).

    Args:
        pixels: [images, channels, height, width].
        generator: a CPU generator, so that every device and process draws the same.
    """
    count = len(pixels)
    flip, area, across, down = torch.rand(4, count, generator=generator)
    scale = (SMALLEST_CROP + (1 - SMALLEST_CROP) * area).sqrt()
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = torch.where(flip < 0.5, scale, -scale)
    affine[:, 1, 1] = scale
    affine[:, 0, 2], affine[:, 1, 2] = (2 * across - 1) * (1 - scale), (2 * down - 1) * (1 - scale)
    grid = F.affine_grid(affine.to(pixels), list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    share = _beta(MIXING, count, generator).to(pixels)[:, None, None, None]
    return torch.lerp(pixels, pixels.roll(1, 0), share)


def _beta(a: float, count: int, generator: torch.Generator) -> Tensor:
    """Draws from Beta(a, a), which torch.distributions cannot draw from a generator, by Johnk's method."""
    drawn = torch.empty(0)
    while len(drawn) < count:
        x, y = torch.rand(2, 4 * count, generator=generator).pow(1 / a)
        total = x + y
        drawn = torch.cat([drawn, (x / total)[(total > 0) & (total <= 1)]])
    return drawn[:count]
