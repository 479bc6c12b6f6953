"""Statistics that several pruning runs of one dense model have in common."""

from collections.abc import Callable
from typing import Any


class SharedStatistics:
    """Hands the last calibration's result to runs that want the same of it.

    One serves runs on one dense model. Only the last result is kept, as those of a large model take gigabytes.

    Example:
        >>> shared = SharedStatistics()
        >>> shared.get({"samples": 8}, lambda: "collected"), shared.get({"samples": 8}, lambda: "collected again")
        ('collected', 'collected')
    """

    def __init__(self) -> None:
        self._held: tuple[dict[str, Any], Any] | None = None

    def get(self, key: dict[str, Any], collect: Callable[[], Any]) -> Any:
        """What was collected under an equal key last, or is now."""
        if self._held is None or self._held[0] != key:
            self._held = None  # before the new result is there: both may be too much
            self._held = (key, collect())
        return self._held[1]
