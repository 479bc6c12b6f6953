"""Images of a sample that were read and preprocessed once, for all that look at the same sample afterwards.

Calibration, the images that judge a choice and the refit see the same images. Pictures have 8 bits a channel, so that
what a processor makes of a channel has few different values: one byte for each pixel says which, and gives back just
what the processor gave. Whatever has more values is kept as it is. Past a bound nothing more is kept, and what is
missing is read again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_VALUES = 256


@dataclass(frozen=True)
class Broken:
    """An image that cannot be decoded: its name, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class _Coded:
    """One image as positions in a table of values by channel, uint8 [channels, height, width]."""

    codes: Tensor
    tables: list[Tensor]

    def pixels(self) -> Tensor:
        return torch.stack([table[codes.int()] for table, codes in zip(self.tables, self.codes, strict=True)])


@dataclass
class _Store:
    """What all views of one sample share."""

    most_bytes: int
    images: dict[int, "_Coded | Tensor | Broken"] = field(default_factory=dict)
    num_bytes: int = 0
    tables: list[Tensor] | None = None  # sorted values of each channel, so far; None where there are too many
    begun: bool = False
    read: int = 0  # images of a stream that were come by
    ended: bool = False  # and whether there are no more


class KeptPixels:
    """Pixels of images by their position in a sample.

    Args:
        most_bytes: bound on the memory that they take.

    Example:
        >>> kept = KeptPixels(most_bytes=1 << 20)
        >>> kept.keep(3, torch.tensor([[[0.0, 0.5], [0.5, 1.0]]]))
        >>> 3 in kept, 4 in kept
        (True, False)
        >>> kept[3]
        tensor([[[0.0000, 0.5000],
                 [0.5000, 1.0000]]])
    """

    def __init__(self, most_bytes: int) -> None:
        self._store = _Store(most_bytes)
        self._positions: Sequence[int] | None = None

    def some(self, positions: Sequence[int]) -> "KeptPixels":
        """A view in which image i is image positions[i] of this one; what one keeps, the other has."""
        view = KeptPixels(0)
        view._store, view._positions = self._store, [self._place(position) for position in positions]
        return view

    def __contains__(self, position: int) -> bool:
        return self._place(position) in self._store.images

    def __getitem__(self, position: int) -> "Tensor | Broken":
        """Pixels [channels, height, width] as they were kept."""
        found = self._store.images[self._place(position)]
        return found.pixels() if isinstance(found, _Coded) else found

    def keep(self, position: int, image: "Tensor | Broken") -> None:
        """Keep an image, unless the bound is reached.

        Args:
            position: in the sample.
            image: its pixels [channels, height, width], or why it has none.
        """
        if isinstance(image, Broken):
            self._store.images[self._place(position)] = image
            return
        kept = self._coded(image)
        size = kept.codes.nbytes if isinstance(kept, _Coded) else kept.nbytes
        if self._store.num_bytes + size <= self._store.most_bytes:
            self._store.images[self._place(position)] = kept
            self._store.num_bytes += size

    @property
    def num_bytes(self) -> int:
        """Memory that pixels take."""
        return self._store.num_bytes

    def was_read(self, count: int, *, ended: bool) -> None:
        """Note that a stream holds so many images at least, and that it ended there, if it did."""
        self._store.read, self._store.ended = max(count, self._store.read), self._store.ended or ended

    def length(self, most: int | None) -> int | None:
        """Images of a stream of which at most so many are taken; None where it was not read as far as that."""
        if most is not None and most <= self._store.read:
            return most
        return self._store.read if self._store.ended else None

    def _place(self, position: int) -> int:
        return position if self._positions is None else self._positions[position]

    def _coded(self, pixels: Tensor) -> "_Coded | Tensor":
        store = self._store
        if store.begun and store.tables is None:
            return pixels.clone()
        if not store.begun:
            store.begun, store.tables = True, [channel.unique() for channel in pixels]
        assert store.tables is not None
        coded = _encoded(pixels, store.tables)
        if coded is None:
            both = zip(store.tables, pixels, strict=True)
            store.tables = [torch.cat([table, channel.flatten()]).unique() for table, channel in both]
            coded = _encoded(pixels, store.tables)
        if coded is None:
            store.tables = None
        return pixels.clone() if coded is None else coded


def _encoded(pixels: Tensor, tables: list[Tensor]) -> _Coded | None:
    """None where a table lacks a value, to the last bit, or has more than a byte can tell apart."""
    if any(len(table) > MOST_VALUES for table in tables):
        return None
    both = zip(tables, pixels, strict=True)
    places = [torch.searchsorted(table, channel.contiguous()).clamp(max=len(table) - 1) for table, channel in both]
    coded = _Coded(torch.stack(places).to(torch.uint8), tables)
    same = torch.equal(coded.pixels().view(torch.uint8), pixels.contiguous().view(torch.uint8))
    return coded if same else None
