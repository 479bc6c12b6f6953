"""Statistics of a model's layers on calibration images, which hooks look at while the images pass.

Images pass once, in batches, on any number of processes. Sums are kept in float64 and added up over processes at the
end, so that one process and several give the same statistics. Memory does not depend on the number of images.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from ..data.batches import Batch, CorruptImages, ImageSet, batches, num_batches
from ..display.stages import stage
from ..errors import DataError
from ..model.modes import evaluating
from ..model.outputs import output_of, task_for
from ..model.tasks import missing
from ..runs.resume import RunState
from ..score.statistics import LayerStatistics
from ..types import ImageProcessor
from .accumulator import Accumulator, NotFiniteError
from .state import RunningSums

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel
    from transformers.configuration_utils import PreTrainedConfig


def collect(
    model: "PreTrainedModel",
    images: ImageSet,
    processor: ImageProcessor,
    targets: dict[str, nn.Linear],
    *,
    accelerator: "Accelerator",
    batch_size: int = 16,
    moments: bool = False,
    gradients: bool = False,
    fisher: bool = False,
    block_shape: tuple[int, int] = (1, 1),
    gradient_moments: Collection[str] = (),
    seed: int = 0,
    state: RunState | None = None,
) -> tuple[dict[str, LayerStatistics], CorruptImages]:
    """Run the images through the model and collect statistics of its target Linears.

    Args:
        model: a transformers classifier or encoder of images; left as it was.
        images: what to run.
        processor: the model's image processor.
        targets: the Linears by name.
        accelerator: device and processes.
        batch_size: images in one pass on each process.
        moments: collect `mean` and `second_moment`.
        gradients: collect `output_weight`, `token_weight`, `gradient` and `block_gradients`. The loss is that of the
            model's task with the image's label; an image without one gets a label sampled from the model's prediction.
        fisher: collect `output_weight` and `token_weight`, and `mean` and `second_moment` with every token weighted by
            its squared output gradient: a token that the loss does not depend on, such as a patch in the last layer of
            a model that reads its class token alone, does not count. All labels are sampled from the model's
            predictions, which makes it the true Fisher; those of the data set are not read. Excludes the other two.
        block_shape: blocks of `block_gradients`.
        gradient_moments: names of the Linears of which `gradient_moment` is wanted too.
        seed: of sampled labels; an image's label depends on its position alone, not on processes or batches.
        state: keeps running sums now and then, and gives back those of an interrupted run.

    Raises:
        DataError: labels that do not fit the model, too many corrupt images, or activations that are not finite.
    """
    model.to(accelerator.device)
    if not gradients:
        images = images.without_labels()
    accumulators = {
        name: Accumulator(
            name,
            linear,
            moments=moments or fisher,
            fisher=fisher,
            block_shape=block_shape if gradients else None,
            gradient_moment=name in gradient_moments,
        )
        for name, linear in targets.items()
    }
    run = _Pass(model, accumulators, gradients=gradients or fisher, several=images.has_lists, seed=seed)
    options: _BatchOptions = {"batch_size": batch_size, "accelerator": accelerator, "model_config": model.config}
    corrupt = _run_all(run, images, processor, state, options)
    return {name: a.finish(accelerator) for name, a in accumulators.items()}, corrupt


class _BatchOptions(TypedDict):
    """Arguments of `batches` that a whole run shares."""

    batch_size: int
    accelerator: "Accelerator"
    model_config: "PreTrainedConfig"


@dataclass(frozen=True)
class _Pass:
    """Runs batches through a model whose Linears are listened to.

    Attributes:
        gradients: whether the loss is taken back through the model.
        several: whether labels are lists.
        seed: of sampled labels.
    """

    model: "PreTrainedModel"
    accumulators: dict[str, Accumulator]
    _: KW_ONLY
    gradients: bool
    several: bool
    seed: int

    def __call__(self, pixels: Tensor, batch: Batch) -> None:
        """Run pixels [images, channels, height, width] of a batch."""
        pixels = pixels.to(next(self.model.parameters()).dtype)
        for accumulator in self.accumulators.values():
            accumulator.index = batch["index"]
        if not self.gradients:
            with torch.no_grad():
                self.model(pixel_values=pixels)
            return
        output = self.model(pixel_values=pixels.requires_grad_())
        outputs, task = output_of(self.model, output).float(), task_for(self.model, output, several=self.several)
        labels = task.sample(outputs, batch["index"], self.seed)
        given = ~missing(batch["labels"])
        if given.any():
            labels[given] = batch["labels"][given].to(labels)
        losses = task.losses(outputs, labels)
        if not losses.isfinite().all():
            bad = batch["index"][~losses.isfinite()].tolist()
            raise NotFiniteError(bad[0], "the predictions")
        losses.sum().backward()


def _run_all(
    run: _Pass, images: ImageSet, processor: ImageProcessor, state: RunState | None, options: _BatchOptions
) -> CorruptImages:
    """Run the images through the model, and go on where an interrupted run was; those that cannot be decoded."""
    corrupt, accumulators = CorruptImages(images.name), run.accumulators
    total = num_batches(images, options["batch_size"], options["accelerator"].num_processes)
    running = RunningSums(state, accumulators, corrupt, total)
    done = running.restore()
    stream = batches(images, processor, skip=done, **options)
    with stage("calibration", total, unit="batches", initial=done) as bar, _hooked(accumulators), _frozen(run.model):
        for number, batch in enumerate(bar.over(stream), done + 1):
            corrupt.count(batch)
            if "pixel_values" in batch:
                with _told_of(images):
                    run(batch["pixel_values"], batch)
            running.save_if_due(number)
    corrupt.gather()
    corrupt.check()
    return corrupt


@contextmanager
def _told_of(images: ImageSet) -> Iterator[None]:
    """Names the image for which a value is not finite."""
    try:
        yield
    except NotFiniteError as error:
        raise DataError(
            f"{error.what} for calibration image {images.file_name(error.index)} are not finite; check the image, the "
            "model's weights and its dtype"
        ) from None


@contextmanager
def _frozen(model: "PreTrainedModel") -> Iterator[None]:
    """In evaluation mode, and no parameter asks for a gradient: layers take theirs image by image in the hooks."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _hooked(accumulators: dict[str, Accumulator]) -> Iterator[None]:
    handles = [a.linear.register_forward_hook(a.hook) for a in accumulators.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
