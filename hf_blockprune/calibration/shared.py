"""What several pruning runs of one dense model have in common: calibration's statistics, and its images."""

from collections.abc import Callable
from dataclasses import replace
from typing import Generic, TypeVar

from ..config import CalibrationConfig
from ..data.image_set import ImageSet
from ..data.kept import KeptPixels
from ..score.statistics import LayerStatistics
from ..types import ImageProcessor

Value = TypeVar("Value")
Statistics = tuple[dict[str, LayerStatistics], list[str]]
"""Statistics by name of a Linear, and files that could not be decoded."""


class Last(Generic[Value]):
    """Hands the last result to those that want the same.

    Example:
        >>> last = Last()
        >>> last.get({"samples": 8}, lambda: "made"), last.get({"samples": 8}, lambda: "made again")
        ('made', 'made')
    """

    def __init__(self) -> None:
        self._held: tuple[dict[str, object], Value] | None = None

    def get(self, key: dict[str, object], make: Callable[[], Value]) -> Value:
        """What was made under an equal key last, or is now."""
        if self._held is None or self._held[0] != key:
            self._held = None  # before the new result is there: both may be too much
            self._held = (key, make())
        return self._held[1]


class SharedCalibration:
    """Hands calibration from run to run; one serves runs on one dense model.

    Of each part only the last one is held: statistics of a large model take gigabytes.

    Attributes:
        statistics: what was collected.
    """

    def __init__(self) -> None:
        self.statistics: Last[Statistics] = Last()
        self._pixels: Last[KeptPixels] = Last()

    def sample(
        self, images: ImageSet, samples: int, processor: ImageProcessor, settings: CalibrationConfig
    ) -> ImageSet:
        """Draw images, of which those that were drawn before come without being read again.

        A smaller sample is the beginning of a larger one, so that samples of any size share what is kept.

        Args:
            images: the data set.
            samples: how many to draw.
            processor: makes pixels of them.
            settings: the seed of the draw, and how much may be kept.
        """
        key: dict[str, object] = {
            **images.content,
            "input": images.model_input,
            "processor": processor.to_dict(),
            "seed": settings.seed,
        }
        kept = self._pixels.get(key, lambda: KeptPixels(settings.cache_mb << 20))
        return replace(images.sample(samples, settings.seed), kept=kept)
