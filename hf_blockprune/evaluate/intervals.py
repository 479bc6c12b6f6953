"""How well a share that was counted on a few images is known."""

import math

from .paired import Z_95


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % score interval of a share of `count` independent images (Wilson, JASA 22, 1927).

    It stays within 0 and 1, and has a width for shares of 0 and 1 too.

    Raises:
        ValueError: the share is none, or there are no images.

    Example:
        >>> low, high = wilson_interval(0.5, 100)
        >>> round(low, 3), round(high, 3)
        (0.404, 0.596)
    """
    if not 0 <= share <= 1 or count < 1:
        raise ValueError(f"expected a share from 0 to 1 of at least one image, got {share} of {count}")
    spread = Z_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
