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
class _Table:
    """The values of one channel, which lie as far from each other as whole numbers do."""

    values: Tensor  # [at most MOST_VALUES], sorted; some may not have been seen
    step: float

    @classmethod
    def of(cls, seen: Tensor) -> "_Table | None":
        """From sorted values [n], n > 1; None where they are of another kind, or too many."""
        lowest, steps = seen[0].double(), seen.double().diff()
        if not seen.isfinite().all() or not len(steps):
            return None
        step = float(steps.min())
        count = round(float((seen[-1].double() - lowest) / step)) + 1
        if count > MOST_VALUES:
            return None
        values = (lowest + step * torch.arange(count)).to(seen.dtype)
        values[((seen.double() - lowest) / step).round().long()] = seen
        return cls(values, step)

    def codes(self, channel: Tensor) -> Tensor:
        """Places of a channel's values, uint8 [height, width]; wrong where the table lacks one."""
        places = (channel.float() - float(self.values[0])) / self.step
        return places.round_().nan_to_num_().clamp_(0, len(self.values) - 1).to(torch.uint8)


@dataclass(frozen=True)
class _Coded:
    """One image as places in the tables of its channels, uint8 [channels, height, width]."""

    codes: Tensor
    tables: list[_Table]

    @classmethod
    def of(cls, pixels: Tensor, tables: "list[_Table]") -> "_Coded | None":
        """None where it would not give back the pixels to the last bit."""
        coded = cls(torch.stack([table.codes(one) for table, one in zip(tables, pixels, strict=True)]), tables)
        bits = {4: torch.int32}.get(pixels.element_size(), torch.uint8)
        return coded if torch.equal(coded.pixels().view(bits), pixels.contiguous().view(bits)) else None

    def pixels(self) -> Tensor:
        return torch.stack([table.values[codes.int()] for table, codes in zip(self.tables, self.codes, strict=True)])


@dataclass
class _Store:
    """What all views of one sample share."""

    most_bytes: int
    images: dict[int, "_Coded | Tensor | Broken"] = field(default_factory=dict)
    num_bytes: int = 0
    seen: list[Tensor] | None = field(default_factory=list)  # sorted values by channel; None where they fit no table
    tables: list[_Table] = field(default_factory=list)
    read: int = 0  # images of a stream that were come by
    ended: bool = False  # and whether there are no more

    def coded(self, pixels: Tensor) -> "_Coded | Tensor":
        """An image in as few bytes as give it back."""
        if self.seen is None:
            return pixels.clone()
        coded = _Coded.of(pixels, self.tables) if self.tables else None
        if coded is None and self._learn(pixels):
            coded = _Coded.of(pixels, self.tables)
        return pixels.clone() if coded is None else coded

    def _learn(self, pixels: Tensor) -> bool:
        """Make tables that have an image's values too; whether there are such."""
        assert self.seen is not None
        before = self.seen or [channel.new_empty(0) for channel in pixels]
        seen = [torch.cat([old, new.flatten()]).unique() for old, new in zip(before, pixels, strict=True)]
        tables = [table for values in seen if (table := _Table.of(values)) is not None]
        self.tables = tables if len(tables) == len(seen) else []
        # A channel of one value says nothing yet of how far values lie apart.
        self.seen = seen if self.tables or min(map(len, seen)) == 1 else None
        return bool(self.tables)


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
        kept = self._store.coded(image.detach().cpu())  # some processors work on a GPU
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
