"""Images in, batches out: finding, decoding and sampling data sets for calibration and evaluation."""

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from .columns import LabelColumn, choose_columns, label_of
from .errors import DataError
from .labels import Labels
from .sources import DataSource, choose_split, is_url, read_errors, reason
from .tasks import NO_LABEL

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_CORRUPT_SHARE = 0.01


@dataclass(frozen=True)
class ImageSet:
    """A data set of images, not decoded yet.

    Attributes:
        dataset: a `datasets.Dataset`, or an `IterableDataset` when streaming.
        name: for messages.
        image_column: the column with the images.
        labelled: the column with labels, None where there is none.
        shuffle_buffer: images that a stream's sample is drawn from, 0 to take the first ones.
        most: images that were taken of a stream, which may hold fewer; None for all.
        labels_by: how labels become the model's; see `DataSource`.
    """

    dataset: Any
    name: str
    image_column: str
    labelled: LabelColumn | None
    shuffle_buffer: int = 0
    most: int | None = None
    labels_by: str = "name"

    @property
    def label_column(self) -> str | None:
        """Name of the column with labels, None where there is none."""
        return None if self.labelled is None else self.labelled.name

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by index, where the data set knows them."""
        return None if self.labelled is None else self.labelled.class_names

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
        keys = ("image_column", "label_column", "labels_by", "streaming", "shuffle_buffer")
        options = {key: getattr(self, key) for key in keys}
        return {"name": self.public_name, "split": str(getattr(self.dataset, "split", None)), **options}

    def without_labels(self) -> "ImageSet":
        """The same images; their labels are not even read."""
        return replace(self, dataset=self.dataset.select_columns([self.image_column]), labelled=None)

    def labels_for(self, model_config: Any) -> Labels | None:
        """What turns its labels into those of a model; None where it has none.

        Raises:
            DataError: a label is none of the model's. A stream's, which are not known yet, are refused as they come.
        """
        if self.labelled is None:
            return None
        column = self.labelled
        labels = Labels(
            column.class_names,
            model_config,
            self.name,
            listed=column.listed,
            fixed=column.fixed,
            by=self.labels_by,
        )
        if not self.streaming and not column.listed and column.name in self.dataset.column_names:
            for label in dict.fromkeys(self.dataset.select_columns([column.name])[:][column.name]):
                labels(label)
        return labels

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


def load_images(
    source: Any, *, split: str | None = None, prefer_splits: Sequence[str] = ("train",), labels: bool = True
) -> ImageSet:
    """Open a data set.

    Args:
        source: what `DataSource.path` can be, or a `DataSource` that says how to read it.
        split: the split to use; by default the source's own, the first of `prefer_splits` that exists, or the only one.
        prefer_splits: see `split`.
        labels: whether labels are wanted; without, nothing that is wrong with them matters.

    Raises:
        DataError: nothing is there, it holds no images, or the split or a column does not exist.
    """
    import datasets

    source = source if isinstance(source, DataSource) else DataSource(source)
    name = source.name
    dataset = source.open()
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
    dataset, image, label = choose_columns(dataset, source, labels=labels)
    return ImageSet(dataset, name, image, label, source.shuffle_buffer, labels_by=source.labels_by)


@dataclass
class CorruptImages:
    """Counts the images of a run that could not be decoded; past 1 % the run is refused."""

    name: str
    files: list[str] = field(default_factory=list)
    seen: int = 0

    def count(self, batch: dict[str, Any]) -> None:
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
                "mend or remove them"
            )


class _Collate:
    """Decodes and preprocesses records; leaves out, and names, what cannot be decoded."""

    def __init__(self, images: ImageSet, processor: Any, labels: Labels | None) -> None:
        self.images, self.processor, self.labels = images, processor, labels

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        decoded, labels, index, corrupt = [], [], [], []
        for record in records:
            try:
                decoded.append(decode_image(record[self.images.image_column]))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                stored = record[self.images.image_column] or {}
                corrupt.append(stored.get("path") or f"image {record['index']}")
                continue
            index.append(record["index"])
            if self.labels is not None:
                labels.append(label_of(record, self.images.labelled.name))  # type: ignore[union-attr]
        batch: dict[str, Any] = {"corrupt": corrupt, "index": torch.tensor(index, dtype=torch.int64)}
        if decoded:
            batch["pixel_values"] = self.processor(images=decoded, return_tensors="pt")["pixel_values"]
            batch["labels"] = torch.full((len(index),), NO_LABEL) if self.labels is None else self.labels.tensor(labels)
        return batch


def decode_image(stored: dict[str, Any] | None) -> Image.Image:
    """An RGB image from the {"bytes", "path"} record of `datasets`, turned upright.

    Raises:
        OSError, SyntaxError, ValueError, Image.DecompressionBombError: it is no image that can be decoded.
        DataError: it lies on the network and cannot be read.
    """
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        raise ValueError("no picture in this row")
    content, path = stored["bytes"], stored["path"]
    if content is None and is_url(path):
        content = _read_url(path)
    with Image.open(path if content is None else io.BytesIO(content)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _read_url(url: str) -> bytes:
    """A network that fails is no corrupt image: with it left out, the result would be another one."""
    from datasets.utils.file_utils import xopen

    try:
        with xopen(url, "rb") as file:
            return file.read()
    except read_errors() as error:
        raise DataError(f"{url}: cannot be read ({reason(error)}); try again") from error


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
    """This process's batches: pixel_values [b, c, h, w], labels, index [b], corrupt (file names).

    Labels are those that the model's task takes (see `tasks`), and -1 [b] where the data set has none. Every image is
    seen by exactly one process, once; with `everywhere`, by each process. A batch in which nothing could be decoded has
    no pixel_values.

    Raises:
        DataError: a label does not fit the model.
    """
    from accelerate.data_loader import prepare_data_loader

    rank, world = (0, 1) if everywhere else (accelerator.process_index, accelerator.num_processes)
    collate = _Collate(images, processor, images.labels_for(model_config))
    if images.streaming:
        loader = DataLoader(_Stream(images, batch_size, rank, world), batch_size=batch_size, collate_fn=collate)
    else:
        loader = DataLoader(_Indexed(images.dataset), batch_size=batch_size, collate_fn=collate)
        # even_batches would repeat images to give every process the same number of batches.
        loader = prepare_data_loader(
            loader, num_processes=world, process_index=rank, put_on_device=False, even_batches=False
        )
    for batch in loader:
        yield {key: value.to(accelerator.device) if torch.is_tensor(value) else value for key, value in batch.items()}


def num_batches(images: ImageSet, batch_size: int, processes: int) -> int | None:
    """Batches of the busiest process, None for a stream."""
    return None if images.streaming else -(-len(images.dataset) // (batch_size * processes))
