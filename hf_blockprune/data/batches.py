"""Images in, batches out: for calibration and evaluation, on any number of processes."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypedDict, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import DataError, first_names
from ..hub.blockprune_skeleton import channels_of
from ..model.tasks import NO_LABEL
from ..sources.columns import label_of
from ..sources.items import Record
from ..sources.pictures import BROKEN, decode_image, name_of, stored_pixels
from ..sources.reading import read_errors, reason
from ..types import ImageProcessor
from .image_set import ImageSet
from .kept import Broken
from .labels import Labels
from .model_input import ModelInput, preprocess, stacked
from .opening import load_images

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers.configuration_utils import PreTrainedConfig

__all__ = [
    "NO_LABEL",
    "CorruptImages",
    "ImageSet",
    "batches",
    "decode_image",
    "load_images",
    "load_pixels",
    "num_batches",
]
MAX_CORRUPT_SHARE = 0.01


class _Images(TypedDict):
    labels: Tensor
    index: Tensor
    corrupt: list[str]
    why: list[str]


class Batch(_Images, total=False):
    """Some images of a data set.

    Attributes:
        pixel_values: what the processor made of them, [b, channels, height, width]; missing where none can be decoded.
        labels: as the model's task takes them (see `model.tasks`), and -1 [b] where the data set has none.
        index: their positions in the data set, int64 [b].
        corrupt: names of those that cannot be decoded, and are left out of the others.
        why: one line on each of these.
    """

    pixel_values: Tensor


_Seen: TypeAlias = "Tensor | Image.Image | Broken"


def load_pixels(
    images: ImageSet, processor: ImageProcessor, *, accelerator: "Accelerator", model_config: "PreTrainedConfig"
) -> tuple[Tensor, Tensor]:
    """(pixels [images, channels, height, width], positions [images]) of all images, on the CPU of every process.

    Raises:
        DataError: more than 1 % of the images cannot be decoded.
    """
    corrupt, pixels, index = CorruptImages(images.name), [], []
    stream = batches(
        images.without_labels(),
        processor,
        batch_size=32,
        accelerator=accelerator,
        model_config=model_config,
        everywhere=True,
    )
    for batch in stream:
        corrupt.count(batch)
        if "pixel_values" in batch:
            # Half precision is finer than the 8 bits that pictures are stored in.
            pixels.append(batch["pixel_values"].cpu().half())
            index.append(batch["index"].cpu())
    corrupt.check()
    return torch.cat(pixels), torch.cat(index)


@dataclass
class CorruptImages:
    """Counts the images of a run that could not be decoded; past 1 % the run is refused."""

    name: str
    files: list[str] = field(default_factory=list)
    seen: int = 0
    reason: str | None = None  # of the first one

    def count(self, batch: Batch) -> None:
        if batch["corrupt"] and self.reason is None:
            self.reason = f"{Path(batch['corrupt'][0]).name}: {batch['why'][0]}"
        self.files += batch["corrupt"]
        self.seen += len(batch["corrupt"]) + len(batch["index"])

    def gather(self) -> None:
        """Add up over processes."""
        from accelerate.utils import gather_object

        counts = gather_object([(self.seen, self.files)])
        self.seen = sum(seen for seen, _ in counts)
        self.files = sorted(file for _, files in counts for file in files)

    def check(self) -> None:
        """Raise DataError where more than 1 % of the images seen so far are corrupt."""
        if self.seen == 0:
            raise DataError(f"{self.name}: holds no images")
        if len(self.files) > MAX_CORRUPT_SHARE * self.seen:
            raise DataError(
                f"{self.name}: {len(self.files)} of {self.seen} images cannot be decoded, more than "
                f"{MAX_CORRUPT_SHARE:.0%}: {first_names(self.files, 5)}; "
                f"mend or remove them{f' ({self.reason})' if self.reason else ''}"
            )


class Numbered(NamedTuple):
    """What a data set holds of one image, with its position there."""

    position: int
    record: Record


class _Collate:
    """Decodes and preprocesses records; leaves out, and names, what cannot be decoded."""

    def __init__(
        self, images: ImageSet, processor: ImageProcessor, labels: Labels | None, model_config: "PreTrainedConfig"
    ) -> None:
        self.images, self.processor, self.labels = images, processor, labels
        self.model_input = images.model_input or ModelInput(channels_of(model_config))
        self.decode = replace(images.decoding, channels=self.model_input.channels)

    def __call__(self, records: list[Numbered]) -> Batch:
        found = {position: self._seen(position, record) for position, record in records}
        broken = [image for image in found.values() if isinstance(image, Broken)]
        whole = [record for position, record in records if not isinstance(found[position], Broken)]
        index = [position for position, image in found.items() if not isinstance(image, Broken)]
        batch: Batch = {
            "labels": self._labels(whole),
            "index": torch.tensor(index, dtype=torch.int64),
            "corrupt": [image.name for image in broken],
            "why": [image.why for image in broken],
        }
        if index:
            batch["pixel_values"] = self._pixels({position: found[position] for position in index})
            self.model_input.check(batch["pixel_values"], self.images.name)
        return batch

    def _labels(self, records: list[Record]) -> Tensor:
        if self.labels is None or self.images.labelled is None or not records:
            return torch.full((len(records),), NO_LABEL)
        column = self.images.labelled.name
        return self.labels.tensor([label_of(record, column) for record in records])

    def _seen(self, position: int, record: Record) -> _Seen:
        """A record's image: its pixels where they are known, else as the processor takes it, or why there is none."""
        kept = self.images.kept
        if kept is not None and position in kept:
            return kept[position]
        stored = record[self.images.image_column]
        try:
            return stored_pixels(stored) if self.images.preprocessed else self.decode(stored)
        except BROKEN as error:
            broken = Broken(name_of(stored, position), str(error))
        if kept is not None:
            kept.keep(position, broken)
        return broken

    def _pixels(self, images: dict[int, _Seen]) -> Tensor:
        """pixel_values [images, channels, height, width]; those that are new are kept."""
        pixels = {position: image for position, image in images.items() if isinstance(image, Tensor)}
        pictures = {position: image for position, image in images.items() if isinstance(image, Image.Image)}
        made = None
        if pictures:
            made = preprocess(self.processor, list(pictures.values()), self.model_input.channels)
            pixels |= dict(zip(pictures, made, strict=True))
        if (kept := self.images.kept) is not None:
            for position in [position for position in images if position not in kept]:
                kept.keep(position, pixels[position])
        if made is not None and len(made) == len(images):
            return made
        return stacked([pixels[position] for position in images], self.images.name)


class _Indexed(torch.utils.data.Dataset[Numbered]):
    """Records of a map-style data set with their position; of what is known of an image nothing is read again."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images.dataset)

    def __getitem__(self, index: int) -> Numbered:
        known = self.images.labelled is None and self.images.kept is not None and index in self.images.kept
        return Numbered(index, {} if known else self.images.dataset[index])


class _Stream(torch.utils.data.IterableDataset[Numbered]):
    """A process's records of a stream, with their position in all of it.

    Every process reads the whole stream and takes each `world`th batch, as of a map-style data set: shards shared out
    over processes would give each of them other images than one process sees, at positions nobody knows.
    """

    def __init__(self, images: ImageSet, batch_size: int, rank: int, world: int, skip: int = 0) -> None:
        self.images, self.batch_size, self.rank, self.world, self.skip = images, batch_size, rank, world, skip

    def __iter__(self) -> Iterator[Numbered]:
        kept, most = self.images.kept, self.images.most
        known = None if kept is None or self.images.labelled is not None else kept.length(most)
        mine = None if known is None else [index for index in range(known) if self._is_mine(index)]
        if kept is not None and mine is not None and all(index in kept for index in mine):
            yield from (Numbered(index, {}) for index in mine)
            return
        count = 0
        for count, record in enumerate(self._records(), 1):
            if self._is_mine(count - 1):
                yield Numbered(count - 1, record)
        if kept is not None:
            kept.was_read(count, ended=most is None or count < most)

    def _is_mine(self, index: int) -> bool:
        round_, turn = divmod(index // self.batch_size, self.world)
        return turn == self.rank and round_ >= self.skip

    def _records(self) -> Iterator[Record]:
        records = iter(self.images.dataset)
        # `take` would read one image more before it stops, and with it perhaps a shard.
        for index in itertools.count() if self.images.most is None else range(self.images.most):
            try:
                yield next(records)
            except StopIteration:
                return
            except read_errors() as error:
                after = f"after {index} images" if index else "at its first image"
                raise DataError(f"{self.images.name}: cannot be read {after} ({reason(error)})") from error


def batches(
    images: ImageSet,
    processor: ImageProcessor,
    *,
    batch_size: int,
    accelerator: "Accelerator",
    model_config: "PreTrainedConfig",
    everywhere: bool = False,
    skip: int = 0,
) -> Iterator[Batch]:
    """This process's batches.

    Every image is seen by exactly one process, once; with `everywhere`, by each process. The first `skip` batches are
    left out, undecoded. Images that `images.kept` holds are neither read nor preprocessed again.

    Raises:
        DataError: a label does not fit the model.
    """
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    rank, world = (0, 1) if everywhere else (accelerator.process_index, accelerator.num_processes)
    collate = _Collate(images, processor, images.labels_for(model_config), model_config)
    if images.streaming:
        loader = DataLoader(_Stream(images, batch_size, rank, world, skip), batch_size=batch_size, collate_fn=collate)
    else:
        loader = DataLoader(_Indexed(images), batch_size=batch_size, collate_fn=collate)
        # even_batches would repeat images to give every process the same number of batches.
        loader = prepare_data_loader(
            loader, num_processes=world, process_index=rank, put_on_device=False, even_batches=False
        )
        if skip:
            loader = skip_first_batches(loader, skip)
    device, made = accelerator.device, cast(Iterable[Batch], loader)  # `_Collate` makes them
    for batch in made:
        batch["labels"], batch["index"] = batch["labels"].to(device), batch["index"].to(device)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(device)
        yield batch


def num_batches(images: ImageSet, batch_size: int, processes: int) -> int | None:
    """Batches of the busiest process, None for a stream."""
    return None if images.streaming else -(-len(images.dataset) // (batch_size * processes))
