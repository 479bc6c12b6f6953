"""What a display says of a stage, in words."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .stages import Stage


def listed(parts: Iterable[str]) -> str:
    """Those that are not empty, with commas between."""
    return ", ".join(part for part in parts if part)


def amount(stage: "Stage") -> str:
    """How much is done, of how much."""
    if stage.total is None:
        return f"{stage.done:.0f} {stage.unit}" if stage.done else ""
    return f"{stage.done:.0f}/{stage.total:.0f} {stage.unit}"


def times(stage: "Stage") -> list[str]:
    """How long it has taken, and what remains."""
    left = stage.left
    return [clock(stage.elapsed), *([] if left is None else [f"{clock(left)} left"])]


def figures(stage: "Stage") -> list[str]:
    """The stage's numbers with their names."""
    return [f"{name} {value:.4g}" for name, value in stage.figures.items()]


def clock(seconds: float) -> str:
    """Seconds as a reader takes them in.

    Example:
        >>> clock(3.14), clock(31.4), clock(314), clock(31400)
        ('3.1 s', '31 s', '5:14', '8:43:20')
    """
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
