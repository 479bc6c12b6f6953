"""Which of several models none of the others beats."""

from collections.abc import Sequence


def frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Mark the points that no other point beats: as cheap and as good, and one of the two better.

    Args:
        points: (cost, gain) of each; less cost and more gain is better.

    Returns:
        For each point whether it lies on the frontier; of equal points all do, or none.

    Example:
        >>> frontier([(0.5, 0.7), (0.6, 0.7), (0.6, 0.8)])
        [True, False, True]
    """
    marks, best = [False] * len(points), float("-inf")
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    last: tuple[float, float] | None = None
    for i in order:
        marks[i] = points[i][1] > best or points[i] == last
        if marks[i]:
            best, last = points[i][1], points[i]
    return marks
