"""Images in, batches out: for calibration and evaluation, on any number of processes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from ..errors import DataError, first_names
from ..hub.blockprune_skeleton import channels_of
from ..model.tasks import NO_LABEL
from ..sources.columns import label_of
from ..sources.pictures import BROKEN, decode_image, name_of, stored_pixels
from ..sources.reading import read_errors, reason
from .image_set import ImageSet
from .labels import Labels
from .model_input import ModelInput, preprocess, stacked
from .opening import load_images

if TYPE_CHECKING:
    from accelerate import Accelerator

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


def load_pixels(
    images: ImageSet, processor: Any, *, accelerator: "Accelerator", model_config: Any
) -> tuple[torch.Tensor, torch.Tensor]:
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

    def count(self, batch: dict[str, Any]) -> None:
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


class _Collate:
    """Decodes and preprocesses records; leaves out, and names, what cannot be decoded."""

    def __init__(self, images: ImageSet, processor: Any, labels: Labels | None, model_config: Any) -> None:
        self.images, self.processor, self.labels = images, processor, labels
        self.model_input = images.model_input or ModelInput(channels_of(model_config))
        self.decode = replace(images.decoding, channels=self.model_input.channels)

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        decoded, labels, index, corrupt, why = [], [], [], [], []
        for record in records:
            try:
                stored = record[self.images.image_column]
                decoded.append(stored_pixels(stored) if self.images.preprocessed else self.decode(stored))
            except BROKEN as error:
                corrupt.append(name_of(record[self.images.image_column], record["index"]))
                why.append(str(error))
                continue
            index.append(record["index"])
            if self.labels is not None:
                labels.append(label_of(record, self.images.labelled.name))  # type: ignore[union-attr]
        batch: dict[str, Any] = {"corrupt": corrupt, "why": why, "index": torch.tensor(index, dtype=torch.int64)}
        if decoded:
            if self.images.preprocessed:
                batch["pixel_values"] = stacked(decoded, self.images.name)
            else:
                batch["pixel_values"] = preprocess(self.processor, decoded, self.model_input.channels)
            self.model_input.check(batch["pixel_values"], self.images.name)
            batch["labels"] = torch.full((len(index),), NO_LABEL) if self.labels is None else self.labels.tensor(labels)
        return batch


class _Indexed(torch.utils.data.Dataset):
    """Records of a map-style data set with their position."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "index": index}


class _Stream(torch.utils.data.IterableDataset):
    """A process's records of a stream, with their position in all of it.

    Every process reads the whole stream and takes each `world`th batch, as of a map-style data set: shards shared out
    over processes would give each of them other images than one process sees, at positions nobody knows.
    """

    def __init__(self, images: ImageSet, batch_size: int, rank: int, world: int, skip: int = 0) -> None:
        self.images, self.batch_size, self.rank, self.world, self.skip = images, batch_size, rank, world, skip

    def __iter__(self) -> Iterator[dict[str, Any]]:
        records = iter(self.images.dataset)
        # `take` would read one image more before it stops, and with it perhaps a shard.
        for index in itertools.count() if self.images.most is None else range(self.images.most):
            try:
                record = next(records)
            except StopIteration:
                return
            except read_errors() as error:
                after = f"after {index} images" if index else "at its first image"
                raise DataError(f"{self.images.name}: cannot be read {after} ({reason(error)})") from error
            round_, turn = divmod(index // self.batch_size, self.world)
            if turn == self.rank and round_ >= self.skip:
                yield {**record, "index": index}


def batches(
    images: ImageSet,
    processor: Any,
    *,
    batch_size: int,
    accelerator: "Accelerator",
    model_config: Any,
    everywhere: bool = False,
    skip: int = 0,
) -> Iterator[dict[str, Any]]:
    """This process's batches: pixel_values [b, c, h, w], labels, index [b], corrupt (file names), why.

    Labels are those that the model's task takes (see `model.tasks`), and -1 [b] where the data set has none. Every
    image is seen by exactly one process, once; with `everywhere`, by each process. A batch in which nothing could be
    decoded has no pixel_values. The first `skip` batches are left out, undecoded.

    Raises:
        DataError: a label does not fit the model.
    """
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    rank, world = (0, 1) if everywhere else (accelerator.process_index, accelerator.num_processes)
    collate = _Collate(images, processor, images.labels_for(model_config), model_config)
    if images.streaming:
        loader = DataLoader(_Stream(images, batch_size, rank, world, skip), batch_size=batch_size, collate_fn=collate)
    else:
        loader = DataLoader(_Indexed(images.dataset), batch_size=batch_size, collate_fn=collate)
        # even_batches would repeat images to give every process the same number of batches.
        loader = prepare_data_loader(
            loader, num_processes=world, process_index=rank, put_on_device=False, even_batches=False
        )
        if skip:
            loader = skip_first_batches(loader, skip)
    for batch in loader:
        yield {key: value.to(accelerator.device) if torch.is_tensor(value) else value for key, value in batch.items()}


def num_batches(images: ImageSet, batch_size: int, processes: int) -> int | None:
    """Batches of the busiest process, None for a stream."""
    return None if images.streaming else -(-len(images.dataset) // (batch_size * processes))
