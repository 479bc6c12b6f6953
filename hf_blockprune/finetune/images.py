"""Training images in batches that are the same for any number of processes.

A step's batch falls into pairs of images, which processes share out; a pair stays together, so that it can be mixed.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.configuration_utils import PreTrainedConfig

from ..data.batches import ImageSet, Numbered
from ..data.model_input import ModelInput, preprocess
from ..errors import DataError
from ..hub.blockprune_skeleton import channels_of
from ..model.tasks import MULTI, NO_LABEL, SINGLE, task_of
from ..sources.columns import label_of
from ..sources.items import Items
from ..sources.pictures import BROKEN, name_of, stored_pixels
from ..sources.reading import read_errors, reason
from ..types import ImageProcessor
from .config import FinetuneConfig
from .views import ORDER, PAIR, draws, erase, mix, view

if TYPE_CHECKING:
    import datasets


class _Labels(TypedDict):
    """What every micro-batch has; see `MicroBatch`."""

    corrupt: list[str]
    labels: Tensor


class MicroBatch(_Labels, total=False):
    """Images that a process takes at once.

    Keys:
        corrupt: names of the files that cannot be decoded.
        labels: of the others, as the task takes them (see `model.tasks`), [images] or [images, outputs].
        pixel_values: [images, channels, height, width]; absent where there is no image.
        targets: what is learned, [images, outputs]; absent likewise.
    """

    pixel_values: Tensor
    targets: Tensor


def num_images(images: ImageSet, settings: FinetuneConfig) -> int:
    """Images of an epoch.

    Raises:
        DataError: of a stream nobody said how many, or somebody did of a data set that knows.
    """
    if not images.streaming:
        if settings.epoch_images is not None:
            raise DataError(f"{images.name}: is no stream, {len(images.dataset)} images long; take out epoch_images")
        return len(images.dataset)
    if settings.epoch_images is None:
        raise DataError(f"{images.name}: a stream does not say how many images it has; set epoch_images")
    return settings.epoch_images


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of images in an epoch, int64 [count]."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(_seed(seed, epoch)))


def _seed(seed: int, epoch: int) -> int:
    """Of an epoch's order; not a sum, as another seed's epochs would then come in the same orders."""
    return int(draws(seed, epoch, 0, ORDER).integers(2**32))


def share_out(chosen: list[int], micro_batch: int, rank: int, world: int) -> list[list[int]]:
    """This process's part of a step's batch, in micro-batches: as many on each process, some of them empty.

    Args:
        chosen: the batch; images 0 and 1, 2 and 3, ... are pairs.
        micro_batch: images of a micro-batch at most.
        rank, world: which process, of how many.

    Example:
        >>> share_out([5, 3, 8, 1, 9], 2, rank=0, world=2), share_out([5, 3, 8, 1, 9], 2, rank=1, world=2)
        ([[5, 3], [9]], [[8, 1], []])
    """
    pairs = [chosen[i : i + 2] for i in range(0, len(chosen), 2)]
    mine = [image for pair in pairs[rank::world] for image in pair]
    most = 2 * -(-len(pairs) // world)
    return [mine[i : i + micro_batch] for i in range(0, min(most, len(chosen)), micro_batch)]


@dataclass
class TrainingImages:
    """Views of a data set's images, epoch by epoch.

    Args:
        images: the data set; its labels are read where they count.
        processor: the model's image processor.
        settings: batch sizes, views, weights of labels, and the seed of all draws.
        model_config: the model's, which says what its outputs mean and how many channels it takes.
        size: (height, width) that the model takes.
        rank, world: which process, of how many.
    """

    images: ImageSet
    processor: ImageProcessor
    settings: FinetuneConfig
    model_config: PreTrainedConfig
    size: tuple[int, int]
    rank: int
    world: int

    def __post_init__(self) -> None:
        if not self.settings.label_weight:
            self.images = self.images.without_labels()
        self.labels = self.images.labels_for(self.model_config)
        self.task = task_of(self.model_config) if self.labels is None else self.labels.task
        self.count = num_images(self.images, self.settings)
        self.steps = -(-self.count // self.settings.batch_size)

    def epoch(self, number: int, first_step: int = 0) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each step of an epoch.

        Args:
            number: of the epoch, from 0.
            first_step: of the epoch, from 0; those before it were taken already.

        Yields:
            The micro-batches of a step.
        """
        seed, size = self.settings.seed, self.settings.batch_size
        order = torch.arange(self.count) if self.images.streaming else epoch_order(self.count, seed, number)
        steps = [
            share_out(chosen.tolist(), self.settings.micro_batch, self.rank, self.world) for chosen in order.split(size)
        ][first_step:]
        views = Views(self, number)
        parts = self._streamed(steps, views, number) if self.images.streaming else self._chosen(steps, views)
        for step in steps:
            yield list(itertools.islice(parts, len(step)))

    def _chosen(self, steps: list[list[list[int]]], views: "Views") -> Iterator[MicroBatch]:
        batches = [micro for step in steps for micro in step]
        workers = self.settings.workers
        return iter(
            DataLoader(_Rows(self.images.dataset), batch_sampler=batches, collate_fn=views, num_workers=workers)
        )

    def _streamed(self, steps: list[list[list[int]]], views: "Views", epoch: int) -> Iterator[MicroBatch]:
        """Every process reads the whole stream, and decodes its share."""
        stream, name = self.images.dataset, self.images.name
        if self.images.shuffle_buffer:
            seed = _seed(self.settings.seed, epoch)
            stream = stream.shuffle(seed=seed, buffer_size=self.images.shuffle_buffer)
        records, read = iter(stream), 0
        for micro in (micro for step in steps for micro in step):
            found = []
            for index in micro:
                try:
                    record = next(itertools.islice(records, index - read, None), None)
                except read_errors() as error:
                    raise DataError(f"{name}: cannot be read after {read} images ({reason(error)})") from error
                if record is None:
                    raise DataError(f"{name}: holds fewer than {self.count} images; lower epoch_images")
                read = index + 1
                found.append(Numbered(index, record))
            yield views(found)


class _Rows(Dataset[Numbered]):
    """Records of a map-style data set with their position."""

    def __init__(self, dataset: "datasets.Dataset | Items") -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Numbered:
        return Numbered(index, self.dataset[index])


class Views:
    """Turns records into a micro-batch of views.

    Args:
        source: what they are views of.
        epoch: its number, from 0.
    """

    def __init__(self, source: TrainingImages, epoch: int) -> None:
        self.images, self.processor, self.size = source.images, source.processor, source.size
        self.settings, self.epoch = source.settings, epoch
        self.labels, self.task = source.labels, source.task
        self.model_input = source.images.model_input or ModelInput(channels_of(source.model_config))
        self.decode = replace(source.images.decoding, channels=self.model_input.channels)
        mean = getattr(source.processor, "image_mean", None) or [0.5] * self.model_input.channels
        self.fill = tuple(round(255 * value) for value in mean)

    def __call__(self, records: Sequence[Numbered]) -> MicroBatch:
        """The views of records, of which 0 and 1, 2 and 3, ... are pairs.

        Raises:
            DataError: a label does not fit the model, or the images cannot be used.
        """
        labels = self._labels(records)
        pixels, corrupt = self._pixels(records)
        here = [place for place, one in enumerate(pixels) if one is not None]
        batch: MicroBatch = {"corrupt": corrupt, "labels": labels[here]}
        if here:
            targets = self._targets(labels)
            self._mix(records, pixels, targets)
            batch["pixel_values"] = torch.stack([one for one in pixels if one is not None])
            batch["targets"] = targets[here]
        return batch

    def _labels(self, records: Sequence[Numbered]) -> Tensor:
        """As the task takes them, [records] or [records, outputs]."""
        if self.labels is None:
            return torch.full((len(records),), NO_LABEL)
        return self.labels.tensor([label_of(record, self.images.label_column or "") for _, record in records])

    def _pixels(self, records: Sequence[Numbered]) -> tuple[list[Tensor | None], list[str]]:
        """(each record's view, None where it cannot be decoded; the names of those)."""
        views: list[Tensor | None] = []
        corrupt = []
        for index, record in records:
            stored = record[self.images.image_column]
            try:
                image = stored_pixels(stored) if self.images.preprocessed else self.decode(stored)
            except BROKEN:
                corrupt.append(name_of(stored, index))
                views.append(None)
                continue
            views.append(self._view(image, index))
        return views, corrupt

    def _view(self, image: Image.Image | Tensor, index: int) -> Tensor:
        """A view of the image at a position, [channels, height, width].

        Raises:
            DataError: it is not as the model takes it, or there are no views of pixel_values.
        """
        augment = self.settings.augment
        if torch.is_tensor(image):
            if augment is not None:
                raise DataError(
                    f"{self.images.name}: views are made of pictures, not of pixel_values; set augment to null"
                )
            self.model_input.check(image[None], self.images.name)
            return image
        if augment is None:
            pixels = preprocess(self.processor, [image], self.model_input.channels)
            self.model_input.check(pixels, self.images.name)
            return pixels[0]
        rng = draws(self.settings.seed, self.epoch, index)
        image = view(image, augment, size=self.size, fill=self.fill, rng=rng)
        as_it_is = {"do_resize": False, "do_center_crop": False}
        pixels = preprocess(self.processor, [image], self.model_input.channels, **as_it_is)
        return erase(pixels[0], augment.erasing, rng)

    def _targets(self, labels: Tensor) -> Tensor:
        """What is learned, [images, outputs]: smoothed shares of the classes, zeros without a label; or numbers."""
        smoothing, outputs = self.settings.label_smoothing, self.task.outputs
        if self.task.problem == SINGLE or self.labels is None:
            targets = torch.zeros(len(labels), outputs)
            given = labels != NO_LABEL
            one_hot = torch.nn.functional.one_hot(labels[given], outputs)
            targets[given] = (1 - smoothing) * one_hot + smoothing / outputs
            return targets
        return (1 - smoothing) * labels + smoothing / 2 if self.task.problem == MULTI else labels.clone()

    def _mix(self, records: Sequence[Numbered], pixels: list[Tensor | None], targets: Tensor) -> None:
        """Mix the images of each pair, in place; one whose partner is missing stays as it is."""
        augment = self.settings.augment
        if augment is None:
            return
        for first in range(0, len(records) - 1, 2):
            pair = slice(first, first + 2)
            both = [one for one in pixels[pair] if one is not None]
            if len(both) < 2:
                continue
            rng = draws(self.settings.seed, self.epoch, records[first].position, PAIR)
            mixed, targets[pair] = mix(torch.stack(both), targets[pair], augment, rng)
            pixels[pair] = mixed.unbind()
