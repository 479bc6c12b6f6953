"""A data set of images that are not decoded yet, and samples of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..sources.columns import LabelColumn
from ..sources.pictures import Decoding
from ..sources.reading import is_url
from ..types import ImageProcessor, JsonDict
from .kept import KeptPixels
from .labels import Labels
from .model_input import ModelInput, find_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.configuration_utils import PreTrainedConfig


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
        decoding: how its pictures become images.
        preprocessed: its images are pixel_values that an image processor made, and are taken as they are.
        left_out: files beside the images that may be pictures and cannot be read, by their path in the folder.
        model_input: what the model takes, where that was looked at; else it follows from its config.
        labels_by: how labels become the model's; see `DataSource`.
        split: which of its splits it is, None where it has none or one alone.
        kept: its images that were preprocessed before, and where those go that are now; None where nothing is kept.
    """

    dataset: Any
    name: str
    image_column: str
    labelled: LabelColumn | None
    shuffle_buffer: int = 0
    most: int | None = None
    decoding: Decoding = field(default_factory=Decoding)
    preprocessed: bool = False
    left_out: tuple[str, ...] = ()
    model_input: ModelInput | None = None
    labels_by: str = "name"
    split: str | None = None
    kept: KeptPixels | None = None

    @property
    def label_column(self) -> str | None:
        """Name of the column with labels, None where there is none."""
        return None if self.labelled is None else self.labelled.name

    @property
    def has_lists(self) -> bool:
        """Whether its labels are lists."""
        return self.labelled is not None and self.labelled.listed

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by index, where the data set knows them."""
        return None if self.labelled is None else self.labelled.class_names

    def fitted(self, model: "PreTrainedModel", processor: ImageProcessor) -> "ImageSet":
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
    def identity(self) -> JsonDict:
        """What a sample is determined by, with the seed, as JSON-ready values."""
        keys = ("image_column", "label_column", "labels_by", "streaming", "shuffle_buffer")
        options = {key: getattr(self, key) for key in keys}
        if self.decoding.white is not None:
            options["white"] = self.decoding.white
        return {"name": self.public_name, "split": str(getattr(self.dataset, "split", None)), **options}

    @property
    def content(self) -> dict[str, object]:
        """What tells it from other data sets in this process: its identity, and what `datasets` knows it by."""
        return {**self.identity, "fingerprint": getattr(self.dataset, "_fingerprint", None)}

    def without_labels(self) -> "ImageSet":
        """The same images; their labels are not even read."""
        dataset = self.dataset
        if hasattr(dataset, "select_columns"):
            dataset = dataset.select_columns([self.image_column])
        return replace(self, dataset=dataset, labelled=None)

    def labels_for(self, model_config: "PreTrainedConfig") -> Labels | None:
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
        if not self.streaming and not column.listed and column.name in getattr(self.dataset, "column_names", ()):
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
            return replace(self, dataset=stream.take(samples), most=samples, kept=None)
        chosen = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(seed))[:samples]
        return replace(self, dataset=self.dataset.select(chosen.tolist()), kept=None)

    def file_name(self, index: int) -> str:
        """The name of an image by its position, or the position where it has no name."""
        record = next(iter(self.dataset.skip(index))) if self.streaming else self.dataset[index]
        stored = record[self.image_column]
        path = stored.get("path") if isinstance(stored, dict) else None
        return Path(path).name if path else f"number {index}"

    def every(self, step: int, most: int) -> "ImageSet":
        """At most `most` images, one in `step`, or all where there are fewer than that; of a stream, the first ones."""
        if self.streaming:
            most = most if self.most is None else min(most, self.most)
            return replace(self, dataset=self.dataset.take(most), most=most, kept=self._kept_of(range(most)))
        chosen = list(range(step - 1, len(self.dataset), step)) or list(range(len(self.dataset)))
        return replace(self, dataset=self.dataset.select(chosen[:most]), kept=self._kept_of(chosen[:most]))

    def beside(self, step: int, most: int, count: int) -> "ImageSet":
        """At most `count` images that `every(step, most)` leaves; where that takes all there are, the first ones."""
        if self.streaming:
            start = most if self.most is None or self.most > most else 0
            count = count if self.most is None else min(count, self.most - start)
            dataset = self.dataset.skip(start).take(count)
            return replace(self, dataset=dataset, most=count, kept=self._kept_of(range(start, start + count)))
        size = len(self.dataset)
        chosen = [i for i in range(size) if size < step or i % step != step - 1][:count]
        return replace(self, dataset=self.dataset.select(chosen), kept=self._kept_of(chosen))

    def _kept_of(self, positions: Sequence[int]) -> KeptPixels | None:
        return None if self.kept is None else self.kept.some(positions)
