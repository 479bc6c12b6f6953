"""Non-negative least squares for cost models of a few terms."""

from itertools import combinations

import numpy as np


def fit_times(terms: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Coefficients >= 0 that make `terms @ coefficients` come closest to measured times, in relative error.

    Every set of terms is tried, so the result is the best one there is, but there must not be many.

    Args:
        terms: [measurements, terms], not negative.
        times: [measurements], positive.

    Returns:
        [terms].

    Raises:
        ValueError: more than twelve terms, or times that are not positive.

    Example:
        >>> terms = np.array([[1.0, 2.0], [1.0, 4.0], [1.0, 9.0]])
        >>> fit_times(terms, terms @ np.array([3.0, 0.5])).round(6)
        array([3. , 0.5])
    """
    count = terms.shape[1]
    if count > 12:
        raise ValueError(f"fit_times: every set of terms is tried, and {count} terms have too many")
    if not (times > 0).all():
        raise ValueError("fit_times: times must be positive")
    relative = terms / times[:, None]
    best, error = np.zeros(count), float(len(times))
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            part = relative[:, chosen]
            values = np.linalg.lstsq(part, np.ones(len(times)), rcond=None)[0]
            left = float(((part @ values - 1) ** 2).sum())
            if (values >= 0).all() and left < error:
                best, error = np.zeros(count), left
                best[list(chosen)] = values
    return best


def mape(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Mean absolute error in shares of what was measured.

    Example:
        >>> mape(np.array([1.1, 1.8]), np.array([1.0, 2.0])).__round__(6)
        0.1
    """
    return float(np.mean(np.abs(predicted / measured - 1)))
