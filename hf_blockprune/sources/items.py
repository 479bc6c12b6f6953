"""Data sets that are no `datasets` objects: lists and torch data sets of images, (image, label) pairs or records."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from .image_columns import usual_image_column
from .named import DataSource, Indexed

if TYPE_CHECKING:
    from typing import TypeGuard

IMAGE, LABEL = "image", "label"

Record: TypeAlias = dict[str, object]
"""Values of one image by column: its picture as `decode_image` takes it, and its label where it has one."""


@runtime_checkable
class _Array(Protocol):
    """Numbers of NumPy, torch or the like."""

    ndim: int

    def item(self) -> object:
        """The only number of them."""
        ...


class Items:
    """Anything with a length and items, as a map-style data set of records with an image and a label.

    Args:
        items: images, (image, label) pairs, or mappings. An image is a PIL image, an array, a tensor, a path or encoded
            bytes; a tensor in floating point is taken for pixel_values that were made already.
        source: which keys of mappings to use.
        label_columns: usual keys of labels.
        chosen: positions of the items; None for all.

    Raises:
        DataError: the items are something else.
    """

    split = None

    def __init__(
        self, items: Indexed, source: DataSource, label_columns: Sequence[str], chosen: Sequence[int] | None = None
    ) -> None:
        self.items, self.source, self.label_columns = items, source, label_columns
        self.chosen = range(len(items)) if chosen is None else chosen
        if len(self):
            first = self[0]
            self.labelled, self.preprocessed = LABEL in first, _is_preprocessed(first[IMAGE])

    @staticmethod
    def fit(items: object) -> "TypeGuard[Indexed]":
        """Whether something has a length and items, and may hold images."""
        if isinstance(items, (str, bytes, Mapping, torch.Tensor, np.ndarray)) or hasattr(items, "columns"):
            return False
        return hasattr(items, "__len__") and hasattr(items, "__getitem__")

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Record:
        item = self.items[self.chosen[index]]
        if isinstance(item, Mapping):
            return self._of_mapping(item)
        if isinstance(item, (tuple, list)) and len(item) == 2 and not _is_picture(item):
            return {IMAGE: self._image(item[0]), LABEL: _plain(item[1])}
        return {IMAGE: self._image(item)}

    def select(self, indices: Sequence[int]) -> "Items":
        """The items at some positions, in their order."""
        return Items(self.items, self.source, self.label_columns, [self.chosen[index] for index in indices])

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Of a torchvision data set, or of one that is part of it."""
        names = getattr(self.items, "classes", getattr(getattr(self.items, "dataset", None), "classes", None))
        return tuple(names) if isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names) else None

    def _of_mapping(self, item: Mapping[str, object]) -> Record:
        """An item whose keys are columns, or the `bytes` and `path` of a picture.

        Raises:
            DataError: it has no image, or lacks the label that was asked for.
        """
        if {"bytes", "path"} & item.keys() and self.source.image_column is None:
            return {IMAGE: dict(item)}
        column = self.source.image_column or usual_image_column(item)
        if column is None or column not in item:
            raise DataError(
                f"{self.source.name}: no image among {', '.join(map(str, item))}; name one of them as image_column"
            )
        wanted = [self.source.label_column] if self.source.label_column else self.label_columns
        label = next((key for key in wanted if key in item), None)
        if label is None and self.source.label_column:
            keys = ", ".join(map(str, item))
            raise DataError(f"{self.source.name}: has no {self.source.label_column!r}; choose the labels from {keys}")
        return {IMAGE: self._image(item[column])} | ({} if label is None else {LABEL: _plain(item[label])})

    def _image(self, value: object) -> object:
        """What a user gives as an image, as `decode_image` takes it.

        Raises:
            DataError: it is none.
        """
        if isinstance(value, (str, Path)):
            return {"bytes": None, "path": str(value)}
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": bytes(value), "path": None}
        if value is None or isinstance(value, dict) or _is_picture(value):
            return value
        raise DataError(
            f"{self.source.name}: expected an image folder, a data set name or a datasets.Dataset, or images, (image, "
            f"label) pairs or records of PIL images, arrays or paths, got items of {type(value)}"
        )


def _is_picture(value: object) -> bool:
    """Whether it is an image, or numbers [height, width] or with channels."""
    if isinstance(value, (list, tuple)):
        return bool(value) and isinstance(value[0], (list, tuple)) and np.ndim(value) in (2, 3)
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim in (2, 3))


def _is_preprocessed(value: object) -> bool:
    """Whether it is pixel_values [channels, height, width]."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 3


def _plain(label: object) -> object:
    """A label as Python's own number, where it is one."""
    return label.item() if isinstance(label, _Array) and label.ndim == 0 else label
