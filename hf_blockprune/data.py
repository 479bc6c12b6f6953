"""Images in, batches out: finding, decoding and sampling data sets for calibration and evaluation."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers.utils import logging

from .columns import NO_LABEL, Labels, choose_columns, label_of
from .errors import DataError
from .model_input import ModelInput, channels_of, find_input, preprocess
from .pictures import BROKEN, Decoding, decode_image, name_of
from .reading import is_url, read_errors, reason
from .sources import DataSource
from .splits import choose_split

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "NO_LABEL",
    "CorruptImages",
    "ImageSet",
    "batches",
    "check_labels",
    "decode_image",
    "load_images",
    "load_pixels",
    "num_batches",
]
MAX_CORRUPT_SHARE = 0.01
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """A data set of images, not decoded yet.

    Attributes:
        dataset: a `datasets.Dataset`, or an `IterableDataset` when streaming.
        name: for messages.
        image_column: the column with the images.
        label_column: the column with class indices or names, None where there is none.
        class_names: names of the classes by index, where the data set knows them.
        shuffle_buffer: images that a stream's sample is drawn from, 0 to take the first ones.
        most: images that were taken of a stream, which may hold fewer; None for all.
        decoding: how its pictures become images.
        left_out: files beside the images that may be pictures and cannot be read, by their path in the folder.
        model_input: what the model takes, where that was looked at; else it follows from its config.
    """

    dataset: Any
    name: str
    image_column: str
    label_column: str | None
    class_names: tuple[str, ...] | None
    shuffle_buffer: int = 0
    most: int | None = None
    decoding: Decoding = field(default_factory=Decoding)
    left_out: tuple[str, ...] = ()
    model_input: ModelInput | None = None

    def fitted(self, model: Any, processor: Any) -> "ImageSet":
        """For a model and its image processor.

        Raises:
            ModelError: pictures cannot be made into what the model takes.
        """
        return replace(self, model_input=find_input(model, processor))

    @property
    def streaming(self) -> bool:
        return not hasattr(self.dataset, "__len__")

    @property
    def public_name(self) -> str:
        """The name without the folders of this machine and the keys in URLs, for reports that may be published."""
        if is_url(self.name):
            return re.sub(r"[?#]\S*", "", re.sub(r"//[^/]*@", "//", self.name))
        path = Path(self.name).expanduser()
        return "/".join((path.resolve() if path.exists() else path).parts[-2:])

    @property
    def identity(self) -> dict[str, Any]:
        """What a sample is determined by, with the seed, as JSON-ready values."""
        options = {key: getattr(self, key) for key in ("image_column", "label_column", "streaming", "shuffle_buffer")}
        if self.decoding.white is not None:
            options["white"] = self.decoding.white
        return {"name": self.public_name, "split": str(getattr(self.dataset, "split", None)), **options}

    def sample(self, samples: int, seed: int) -> "ImageSet":
        """At most `samples` images, drawn without replacement; of a stream, the first ones, or out of its buffer.

        A smaller sample of the same seed is the beginning of a larger one, so that an image at a position that is held
        back is held back from every step.
        """
        if self.streaming:
            stream = self.dataset
            if self.shuffle_buffer:
                stream = stream.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
            return replace(self, dataset=stream.take(samples), most=samples)
        chosen = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(seed))[:samples]
        return replace(self, dataset=self.dataset.select(chosen.tolist()))

    def file_name(self, index: int) -> str:
        """The name of an image by its position, or the position where it has no name."""
        record = next(iter(self.dataset.skip(index))) if self.streaming else self.dataset[index]
        stored = record[self.image_column] or {}
        return Path(stored["path"]).name if stored.get("path") else f"number {index}"

    def every(self, step: int, most: int) -> "ImageSet":
        """At most `most` images, one in `step`, or all where there are fewer than that; of a stream, the first ones."""
        if self.streaming:
            most = most if self.most is None else min(most, self.most)
            return replace(self, dataset=self.dataset.take(most), most=most)
        chosen = list(range(step - 1, len(self.dataset), step)) or list(range(len(self.dataset)))
        return replace(self, dataset=self.dataset.select(chosen[:most]))


def load_pixels(
    images: ImageSet, processor: Any, *, accelerator: "Accelerator", model_config: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels [images, channels, height, width], positions [images]) of all images, on the CPU of every process.

    Raises:
        DataError: more than 1 % of the images cannot be decoded.
    """
    corrupt, pixels, index = CorruptImages(images.name), [], []
    stream = batches(
        images, processor, batch_size=32, accelerator=accelerator, model_config=model_config, everywhere=True
    )
    for batch in stream:
        corrupt.count(batch)
        if "pixel_values" in batch:
            # Half precision is finer than the 8 bits that pictures are stored in.
            pixels.append(batch["pixel_values"].cpu().half())
            index.append(batch["index"].cpu())
    corrupt.check()
    return torch.cat(pixels), torch.cat(index)


def load_images(source: Any, *, split: str | None = None, prefer_splits: Sequence[str] = ("train",)) -> ImageSet:
    """Open a data set.

    Args:
        source: what `DataSource.path` can be, or a `DataSource` that says how to read it.
        split: the split to use; by default the source's own, the first of `prefer_splits` that exists, or the only one.
        prefer_splits: see `split`.

    Raises:
        DataError: nothing is there, it holds no images, or the split or a column does not exist.
    """
    import datasets

    source = source if isinstance(source, DataSource) else DataSource(source)
    name = source.name
    dataset, left_out = source.open()
    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        dataset = dataset[choose_split([str(s) for s in dataset], split or source.split, prefer_splits, name)]
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise DataError(
            f"{name}: expected an image folder, a data set name or a datasets.Dataset, got {type(source.path)}"
        )
    if isinstance(dataset, datasets.Dataset) and not len(dataset):
        raise DataError(f"{name}: holds no images")
    if isinstance(dataset, datasets.Dataset) and source.streaming:
        dataset = dataset.to_iterable_dataset()
    dataset, image, label, class_names = choose_columns(dataset, source)
    found = ImageSet(dataset, name, image, label, class_names, source.shuffle_buffer)
    if left_out:
        logger.warning(f"{found.name}: files that cannot be read as pictures are left out: {_some(left_out)}")
    return replace(found, decoding=Decoding(white=source.white), left_out=tuple(left_out))


def _some(names: Sequence[str]) -> str:
    """The first of many names, and their number."""
    return f"{', '.join(names[:5])}{f', ... ({len(names)} in all)' if len(names) > 5 else ''}"


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

    def check(self) -> None:
        """Raise DataError where more than 1 % of the images seen so far are corrupt."""
        if self.seen == 0:
            raise DataError(f"{self.name}: holds no images")
        if len(self.files) > MAX_CORRUPT_SHARE * self.seen:
            raise DataError(
                f"{self.name}: {len(self.files)} of {self.seen} images cannot be decoded, more than "
                f"{MAX_CORRUPT_SHARE:.0%}: {', '.join(self.files[:5])}{', ...' if len(self.files) > 5 else ''}; "
                f"mend or remove them{f' ({self.reason})' if self.reason else ''}"
            )


class _Collate:
    """Decodes and preprocesses records; leaves out, and names, what cannot be decoded."""

    def __init__(self, images: ImageSet, processor: Any, labels: Labels, model_config: Any) -> None:
        self.images, self.processor, self.labels = images, processor, labels
        self.model_input = images.model_input or ModelInput(channels_of(model_config))
        self.decode = replace(images.decoding, channels=self.model_input.channels)

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        decoded, labels, index, corrupt, why = [], [], [], [], []
        for record in records:
            try:
                decoded.append(self.decode(record[self.images.image_column]))
            except BROKEN as error:
                corrupt.append(name_of(record[self.images.image_column], record["index"]))
                why.append(str(error))
                continue
            index.append(record["index"])
            labels.append(self._label(record))
        batch: dict[str, Any] = {"corrupt": corrupt, "why": why, "index": torch.tensor(index, dtype=torch.int64)}
        if decoded:
            batch["pixel_values"] = preprocess(self.processor, decoded, self.model_input.channels)
            self.model_input.check(batch["pixel_values"], self.images.name)
            batch["labels"] = torch.tensor(labels)
        return batch

    def _label(self, record: dict[str, Any]) -> int:
        return NO_LABEL if self.images.label_column is None else self.labels(label_of(record, self.images.label_column))


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

    def __init__(self, images: ImageSet, batch_size: int, rank: int, world: int) -> None:
        self.images, self.batch_size, self.rank, self.world = images, batch_size, rank, world

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
            if index // self.batch_size % self.world == self.rank:
                yield {**record, "index": index}


def batches(
    images: ImageSet,
    processor: Any,
    *,
    batch_size: int,
    accelerator: "Accelerator",
    model_config: Any,
    everywhere: bool = False,
) -> Iterator[dict[str, Any]]:
    """This process's batches: pixel_values [b, c, h, w], labels [b] (-1: none), index [b], corrupt (file names), why.

    Every image is seen by exactly one process, once; with `everywhere`, by each process. A batch in which nothing could
    be decoded has no pixel_values.

    Raises:
        DataError: a label lies outside the model's classes.
    """
    from accelerate.data_loader import prepare_data_loader

    rank, world = (0, 1) if everywhere else (accelerator.process_index, accelerator.num_processes)
    labels = Labels(images.class_names, model_config, images.name)
    collate = _Collate(images, processor, labels, model_config)
    if images.streaming:
        loader = DataLoader(_Stream(images, batch_size, rank, world), batch_size=batch_size, collate_fn=collate)
    else:
        loader = DataLoader(_Indexed(images.dataset), batch_size=batch_size, collate_fn=collate)
        # even_batches would repeat images to give every process the same number of batches.
        loader = prepare_data_loader(
            loader, num_processes=world, process_index=rank, put_on_device=False, even_batches=False
        )
    for batch in loader:
        if "labels" in batch:
            check_labels(batch["labels"], model_config.num_labels, images.name)
        yield {key: value.to(accelerator.device) if torch.is_tensor(value) else value for key, value in batch.items()}


def num_batches(images: ImageSet, batch_size: int, processes: int) -> int | None:
    """Batches of the busiest process, None for a stream."""
    return None if images.streaming else -(-len(images.dataset) // (batch_size * processes))


def check_labels(labels: torch.Tensor, num_labels: int, name: str) -> None:
    """Raise DataError where a label lies outside the classes."""
    wrong = labels[(labels < NO_LABEL) | (labels >= num_labels)]
    if len(wrong):
        raise DataError(
            f"{name}: label {int(wrong[0])} lies outside the model's {num_labels} classes (0 to {num_labels - 1}); "
            "use the model's class indices or give the class names of the model"
        )
