"""How long the stages of a run take."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add up how long a stage took."""
    start = perf_counter()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + perf_counter() - start, 3)
