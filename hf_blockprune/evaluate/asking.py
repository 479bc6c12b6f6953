"""Asking a model about every image of a data set, on all processes."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from ..data.batches import Batch, CorruptImages, ImageSet, batches, num_batches
from ..display.stages import stage
from ..model.modes import evaluating
from ..types import ImageProcessor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

Answer = TypeVar("Answer", bound=tuple[object, ...])


def ask(
    model: "PreTrainedModel",
    images: ImageSet,
    processor: ImageProcessor,
    answers: Callable[[Tensor, Batch], Iterable[Answer]],
    *,
    accelerator: "Accelerator",
    batch_size: int,
    name: str,
) -> tuple[list[Answer], list[str]]:
    """What a model answers; each process gets all answers, in the data set's order.

    Args:
        model: of transformers.
        images: those to ask about.
        processor: the model's image processor.
        answers: what to keep of pixels [b, channels, height, width] and their batch: for each image a tuple that begins
            with its position.
        accelerator: device and processes.
        batch_size: images in one pass on each process.
        name: of the stage that is shown.

    Returns:
        (answers, files that could not be decoded).

    Raises:
        DataError: labels that do not fit the model, or more than 1 % corrupt images.
    """
    from accelerate.utils import gather_object

    model.to(accelerator.device)
    rows: list[Answer] = []
    corrupt = CorruptImages(images.name)
    stream = batches(images, processor, batch_size=batch_size, accelerator=accelerator, model_config=model.config)
    total = num_batches(images, batch_size, accelerator.num_processes)
    with stage(name, total, unit="batches") as bar, evaluating(model):
        for batch in bar.over(stream):
            corrupt.count(batch)
            if "pixel_values" in batch:
                rows += answers(batch["pixel_values"], batch)
    corrupt.gather()
    corrupt.check()
    return sorted(gather_object(rows), key=lambda row: row[0]), corrupt.files
