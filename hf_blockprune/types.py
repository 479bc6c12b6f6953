"""Types that many rooms share, and what stands behind them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

JsonDict: TypeAlias = dict[str, Any]
"""An object as `json` reads and writes it, whose keys are told where it is made or checked."""


class ImageProcessor(Protocol):
    """What is asked of an image processor of transformers, slow or fast, or of a user's own of that form."""

    def __call__(self, images: Any, *, return_tensors: str | None = None, **options: object) -> Mapping[str, Any]:
        """`pixel_values` of pictures, [images, channels, height, width]."""
        ...

    def to_dict(self) -> JsonDict:
        """Its settings."""
        ...

    def save_pretrained(self, save_directory: str | Path, **options: object) -> object:
        """Write its settings into a folder."""
        ...
