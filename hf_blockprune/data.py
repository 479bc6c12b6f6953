"""Images in, batches out: finding, decoding and sampling data sets for calibration and evaluation."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from .errors import DataError

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_CORRUPT_SHARE = 0.01
LABEL_COLUMNS = ("label", "labels", "fine_label")
NO_LABEL = -1


@dataclass(frozen=True)
class ImageSet:
    """A data set of images, not decoded yet.

    Attributes:
        dataset: a `datasets.Dataset`, or an `IterableDataset` when streaming.
        name: for messages.
        image_column: the column with the images.
        label_column: the column with class indices, None where there is none.
        class_names: names of the classes by index, where the data set knows them.
    """

    dataset: Any
    name: str
    image_column: str
    label_column: str | None
    class_names: tuple[str, ...] | None

    @property
    def streaming(self) -> bool:
        return not hasattr(self.dataset, "__len__")

    @property
    def public_name(self) -> str:
        """The name without the folders of this machine, for reports that may be published."""
        path = Path(self.name).expanduser()
        return "/".join(path.resolve().parts[-2:]) if path.exists() else self.name

    def sample(self, samples: int, seed: int) -> "ImageSet":
        """At most `samples` images, drawn without replacement; of a stream, the first ones.

        A smaller sample of the same seed is the beginning of a larger one, so that an image at a position that is held
        back is held back from every step.
        """
        if self.streaming:
            return replace(self, dataset=self.dataset.take(samples))
        chosen = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(seed))[:samples]
        return replace(self, dataset=self.dataset.select(chosen.tolist()))

    def file_name(self, index: int) -> str:
        """The name of an image by its position, or the position where it has no name."""
        stored = {} if self.streaming else self.dataset[index][self.image_column] or {}
        return Path(stored["path"]).name if stored.get("path") else f"number {index}"

    def every(self, step: int, most: int) -> "ImageSet":
        """At most `most` images, one in `step`, or all where there are fewer than that; of a stream, the first ones."""
        if self.streaming:
            return replace(self, dataset=self.dataset.take(most))
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
        source: an image folder (with or without class sub-folders or metadata.csv), a folder of parquet files, the name
            of a data set on the Hub, or a `datasets` object.
        split: the split to use; by default the first of `prefer_splits` that exists, or the only one.
        prefer_splits: see `split`.

    Raises:
        DataError: nothing is there, it holds no images, or the split does not exist.
    """
    import datasets

    name = str(source) if isinstance(source, (str, Path)) else "the data set"
    dataset = _open(source, name) if isinstance(source, (str, Path)) else source
    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        dataset = dataset[_choose_split([str(s) for s in dataset], split, prefer_splits, name)]
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise DataError(f"{name}: expected an image folder, a data set name or a datasets.Dataset, got {type(source)}")
    if isinstance(dataset, datasets.Dataset) and not len(dataset):
        raise DataError(f"{name}: holds no images")
    features = dataset.features or {}
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise DataError(f"{name}: no image column among {list(features)}; cast one to datasets.Image()")
    label = next((key for key in LABEL_COLUMNS if key in features), None)
    names = getattr(features.get(label), "names", None) if label else None
    if label and getattr(features[label], "dtype", None) in ("string", "large_string"):
        raise DataError(
            f"{name}: column {label!r} holds text; give class indices, or sort the images into one folder a class"
        )
    dataset = dataset.select_columns([images[0], label] if label else [images[0]])
    dataset = dataset.cast_column(images[0], datasets.Image(decode=False))
    return ImageSet(dataset, name, images[0], label, tuple(names) if names else None)


def _open(source: str | Path, name: str) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(source).expanduser()
    try:
        if not path.exists():
            return datasets.load_dataset(str(source))
        if path.is_dir() and not any(path.rglob("*.parquet")):
            # One named split: left to itself the loader splits a folder by words such as "test" in file names.
            return datasets.load_dataset("imagefolder", data_files={"train": str(path.resolve() / "**")})
        return datasets.load_dataset(str(path))
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        found = (
            "holds no images that can be read" if path.exists() else "no such folder, and no such data set on the Hub"
        )
        raise DataError(f"{name}: {found} ({type(error).__name__}: {reason})") from error


def _choose_split(splits: list[str], split: str | None, prefer: Sequence[str], name: str) -> str:
    if split is not None:
        if split not in splits:
            raise DataError(f"{name}: has no split {split!r}; choose one of {', '.join(splits)}")
        return split
    for candidate in (*prefer, *(splits if len(splits) == 1 else ())):
        if candidate in splits:
            return candidate
    raise DataError(f"{name}: name a split; it has {', '.join(splits)}")


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

    def __init__(self, images: ImageSet, processor: Any, label_ids: list[int] | None) -> None:
        self.images, self.processor, self.label_ids = images, processor, label_ids

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
            labels.append(self._label(record))
        batch: dict[str, Any] = {"corrupt": corrupt, "index": torch.tensor(index, dtype=torch.int64)}
        if decoded:
            batch["pixel_values"] = self.processor(images=decoded, return_tensors="pt")["pixel_values"]
            batch["labels"] = torch.tensor(labels)
        return batch

    def _label(self, record: dict[str, Any]) -> int:
        if self.images.label_column is None:
            return NO_LABEL
        label = record[self.images.label_column]
        label = NO_LABEL if label is None else int(label)
        return self.label_ids[label] if self.label_ids and label >= 0 else label


def decode_image(stored: dict[str, Any] | None) -> Image.Image:
    """An RGB image from the {"bytes", "path"} record of `datasets`, turned upright."""
    if stored is None:
        raise ValueError("no picture in this row")
    source = io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]
    with Image.open(source) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


class _Indexed(torch.utils.data.Dataset):
    """Records of a map-style data set with their position."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "index": index}


def batches(
    images: ImageSet,
    processor: Any,
    *,
    batch_size: int,
    accelerator: "Accelerator",
    model_config: Any,
    everywhere: bool = False,
) -> Iterator[dict[str, Any]]:
    """This process's batches: pixel_values [b, c, h, w], labels [b] (-1: none), index [b], corrupt (file names).

    Every image is seen by exactly one process, once; with `everywhere`, by each process. A batch in which nothing could
    be decoded has no pixel_values.

    Raises:
        DataError: a label lies outside the model's classes.
    """
    from accelerate.data_loader import prepare_data_loader
    from datasets.distributed import split_dataset_by_node

    rank, world = (0, 1) if everywhere else (accelerator.process_index, accelerator.num_processes)
    collate = _Collate(images, processor, _label_ids(images.class_names, model_config))
    if images.streaming:
        indexed = images.dataset.map(lambda record, index: {**record, "index": index}, with_indices=True)
        loader = DataLoader(split_dataset_by_node(indexed, rank, world), batch_size=batch_size, collate_fn=collate)
    else:
        loader = DataLoader(_Indexed(images.dataset), batch_size=batch_size, collate_fn=collate)
        # even_batches would repeat images to give every process the same number of batches.
        loader = prepare_data_loader(
            loader, num_processes=world, process_index=rank, put_on_device=False, even_batches=False
        )
    for batch in loader:
        if "labels" in batch:
            _check_labels(batch["labels"], model_config.num_labels, images.name)
        yield {key: value.to(accelerator.device) if torch.is_tensor(value) else value for key, value in batch.items()}


def num_batches(images: ImageSet, batch_size: int, processes: int) -> int | None:
    """Batches of the busiest process, None for a stream."""
    return None if images.streaming else -(-len(images.dataset) // (batch_size * processes))


def _label_ids(class_names: tuple[str, ...] | None, model_config: Any) -> list[int] | None:
    """Class indices of the model for those of the data set, where both know the same names."""
    # A config that was given id2label alone has no label2id.
    label2id = model_config.label2id or {name: index for index, name in (model_config.id2label or {}).items()}
    if class_names and all(name in label2id for name in class_names):
        return [int(label2id[name]) for name in class_names]
    return None


def _check_labels(labels: torch.Tensor, num_labels: int, name: str) -> None:
    wrong = labels[(labels < NO_LABEL) | (labels >= num_labels)]
    if len(wrong):
        raise DataError(
            f"{name}: label {int(wrong[0])} lies outside the model's {num_labels} classes (0 to {num_labels - 1}); "
            "use the model's class indices or give the class names of the model"
        )
