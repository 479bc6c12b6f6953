"""The paired comparison of two models on the same images."""

import math
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class PairedChange:
    """How accuracy changed between two models on the same images.

    Attributes:
        delta: accuracy after minus accuracy before.
        interval: 95 % interval of delta.
        flipped_to_wrong: images that only the model before had right.
        flipped_to_right: images that only the model after has right.
    """

    delta: float
    interval: tuple[float, float]
    flipped_to_wrong: int
    flipped_to_right: int


def paired_change(before: np.ndarray, after: np.ndarray) -> PairedChange:
    """Compare correctness image by image.

    Only the discordant images of McNemar's table (b: right to wrong, c: wrong to right) carry information on the
    change. The interval is the adjusted Wald interval for matched pairs, which adds half an image to each cell and
    holds its level for small counts too (Agresti and Min, Statistics in Medicine 24, 2005).

    Args:
        before: bool [images], whether the first model was right.
        after: bool [images], whether the second one was.

    Raises:
        ValueError: the arrays differ in length, or are empty.

    Example:
        >>> change = paired_change(np.array([True, True, False, True]), np.array([True, False, True, False]))
        >>> change.delta, change.flipped_to_wrong, change.flipped_to_right
        (-0.25, 2, 1)
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"expected two non-empty arrays of one length, got {len(before)} and {len(after)}")
    n = len(before)
    to_wrong, to_right = int((before & ~after).sum()), int((~before & after).sum())
    b, c, m = to_wrong + 0.5, to_right + 0.5, n + 2
    centre = (c - b) / m
    half = Z_95 * math.sqrt(b + c - (c - b) ** 2 / m) / m
    interval = (max(-1.0, centre - half), min(1.0, centre + half))
    return PairedChange((to_right - to_wrong) / n, interval, to_wrong, to_right)


def mean_change(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, by the normal distribution.

    Args:
        differences: of each image, [images].
    """
    centre = float(differences.mean())
    half = Z_95 * float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return centre - half, centre + half
