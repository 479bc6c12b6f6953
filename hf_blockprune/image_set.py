"""A data set of images that are not decoded yet, and samples of it."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .model_input import ModelInput, find_input
from .pictures import Decoding
from .reading import is_url


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
        preprocessed: its images are pixel_values that an image processor made, and are taken as they are.
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
    preprocessed: bool = False
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
        stored = record[self.image_column]
        path = stored.get("path") if isinstance(stored, dict) else None
        return Path(path).name if path else f"number {index}"

    def every(self, step: int, most: int) -> "ImageSet":
        """At most `most` images, one in `step`, or all where there are fewer than that; of a stream, the first ones."""
        if self.streaming:
            most = most if self.most is None else min(most, self.most)
            return replace(self, dataset=self.dataset.take(most), most=most)
        chosen = list(range(step - 1, len(self.dataset), step)) or list(range(len(self.dataset)))
        return replace(self, dataset=self.dataset.select(chosen[:most]))
