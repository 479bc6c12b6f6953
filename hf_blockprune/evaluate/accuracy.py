"""How good a model is on labelled images, and its paired change against another model."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch, ImageSet
from ..errors import DataError
from ..model.tasks import MULTI, SINGLE, missing, task_of
from ..types import ImageProcessor, JsonDict
from .asking import ask
from .paired import PairedChange, mean_change, paired_change
from .scores import SCORES, main_score

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

TOP = 5
EVALUATION_SPLITS = ("validation", "test", "train")


@dataclass(frozen=True)
class Predictions:
    """A model's answers: position of each image, its true class, and the classes by falling score [images, <= 5]."""

    index: np.ndarray
    labels: np.ndarray
    ranked: np.ndarray
    skipped: list[str]

    @property
    def correct(self) -> np.ndarray:
        return self.ranked[:, 0] == self.labels


@dataclass(frozen=True)
class Outputs:
    """A model's answers where they are no choice of one class.

    Attributes:
        index: position of each image.
        labels: zeros and ones by class, or numbers, [images, outputs].
        outputs: of the model, [images, outputs].
        skipped: files that could not be decoded.
        problem: the task, as transformers' `problem_type`.
    """

    index: np.ndarray
    labels: np.ndarray
    outputs: np.ndarray
    skipped: list[str]
    problem: str


class _Scores:
    """What the evaluations of all tasks can."""

    @property
    def scores(self) -> dict[str, float]:
        """What was measured, by name, without comparisons."""
        return {key: value for key, value in asdict(self).items() if key in SCORES}  # type: ignore[call-overload]

    @property
    def main(self) -> str:
        """Name of the score that models are compared in; more of it is better."""
        return main_score(self.scores)

    def to_dict(self) -> JsonDict:
        """JSON-ready values, without the comparison where there was none."""
        return {key: value for key, value in asdict(self).items() if value is not None}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Evaluation(_Scores):
    """Accuracy on a data set; the last fields compare with a baseline on the same images.

    Attributes:
        top1, top5: shares of the images.
        num_images: images that were evaluated.
        skipped: files that could not be decoded.
        left_out: files beside the images that may be pictures of formats that cannot be read, None where there are
            none.
    """

    top1: float
    top5: float
    num_images: int
    skipped: list[str]
    baseline_top1: float | None = None
    delta: float | None = None
    interval: tuple[float, float] | None = None
    flipped_to_wrong: int | None = None
    flipped_to_right: int | None = None
    left_out: list[str] | None = None


@dataclass(frozen=True)
class MultiLabelEvaluation(_Scores):
    """How good a model with several labels an image is; the last fields compare with a baseline on the same images.

    Attributes:
        mean_average_precision: over the classes that are there in some image.
        f1: F1 of all answers together, where a probability above one half is a yes.
        num_images: images that were evaluated.
        skipped: files that could not be decoded.
        delta: change of the mean average precision.
        left_out: see `Evaluation`.
    """

    mean_average_precision: float
    f1: float
    num_images: int
    skipped: list[str]
    baseline_mean_average_precision: float | None = None
    delta: float | None = None
    left_out: list[str] | None = None


@dataclass(frozen=True)
class RegressionEvaluation(_Scores):
    """How good a model of numbers is; the last fields compare with a baseline on the same images.

    Attributes:
        r2: share of the labels' variance that is explained, the mean over outputs.
        mean_squared_error: the mean over images and outputs.
        num_images: images that were evaluated.
        skipped: files that could not be decoded.
        delta: change of r2.
        interval: 95 % interval of that, the labels' variance taken as known.
        left_out: see `Evaluation`.
    """

    r2: float
    mean_squared_error: float
    num_images: int
    skipped: list[str]
    baseline_r2: float | None = None
    delta: float | None = None
    interval: tuple[float, float] | None = None
    left_out: list[str] | None = None


Summary: TypeAlias = Evaluation | MultiLabelEvaluation | RegressionEvaluation
"""How good a model is, by its task."""


def predict(
    model: "PreTrainedModel",
    images: ImageSet,
    processor: ImageProcessor,
    *,
    accelerator: "Accelerator",
    batch_size: int = 32,
    name: str = "evaluation",
) -> "Predictions | Outputs":
    """Ask the model about every image, on all processes; each of them gets all answers, in the data set's order.

    Args:
        model: of transformers.
        images: labelled ones.
        processor: the model's image processor.
        accelerator: device and processes.
        batch_size: images in one pass on each process.
        name: of the stage that is shown.

    Raises:
        DataError: images without labels, labels that do not fit the model, or more than 1 % corrupt images.
        ModelError: the model's `problem_type` does not fit it.
    """
    problem = task_of(model.config, several=images.has_lists).problem
    need_labels(images)
    rows, skipped = ask(
        model,
        images,
        processor,
        lambda pixels, batch: _answers(model, pixels, batch, images.name, problem),
        accelerator=accelerator,
        batch_size=batch_size,
        name=name,
    )
    index, labels, answers = (np.array(column) for column in zip(*rows, strict=True))
    if problem == SINGLE:
        return Predictions(index, labels, answers, skipped)
    return Outputs(index, labels, answers, skipped, problem)


def need_labels(images: ImageSet) -> None:
    """Refuse images without labels.

    Raises:
        DataError: they have none.
    """
    if images.labelled is None:
        raise DataError(
            f"{images.name}: has no labels, so accuracy cannot be measured; add a metadata.csv with columns file_name "
            "and label, or sort the images into one folder a class"
        )


@torch.inference_mode()
def _answers(
    model: "PreTrainedModel", pixels: Tensor, batch: Batch, name: str, problem: str
) -> list[tuple[int, int | float | list[float], list[float]]]:
    """(position, label, answer) of each image."""
    if missing(batch["labels"]).any():
        raise DataError(f"{name}: some images have no label; label or remove them before measuring accuracy")
    answers: Tensor = model(pixel_values=pixels.to(next(model.parameters()).dtype)).logits
    if problem == SINGLE:
        answers = answers.topk(min(TOP, answers.shape[-1]), dim=-1).indices
    return list(zip(batch["index"].tolist(), batch["labels"].tolist(), answers.tolist(), strict=True))


def summarise(predictions: "Predictions | Outputs", baseline: "Predictions | Outputs | None" = None) -> Summary:
    """What answers achieve, and their paired change against a baseline's.

    Returns:
        The `Evaluation`, `MultiLabelEvaluation` or `RegressionEvaluation`, by the model's task.

    Raises:
        DataError: the two were made on different images, or for different tasks.
    """
    if baseline is not None and not np.array_equal(predictions.index, baseline.index):
        raise DataError("the two models were not evaluated on the same images")
    if baseline is not None and _problem(baseline) != _problem(predictions):
        raise DataError(
            f"two tasks cannot be compared, {_problem(predictions)} and {_problem(baseline)}: "
            "see problem_type and the number of outputs in the models' configs"
        )
    if isinstance(predictions, Predictions):
        return _accuracy(predictions, baseline if isinstance(baseline, Predictions) else None)
    measure = _several_labels if predictions.problem == MULTI else _regression
    return measure(predictions, baseline if isinstance(baseline, Outputs) else None)


def _problem(answers: "Predictions | Outputs") -> str:
    return SINGLE if isinstance(answers, Predictions) else answers.problem


def _accuracy(predictions: Predictions, baseline: Predictions | None) -> Evaluation:
    from .metrics import TopKAccuracy  # imports datasets and evaluate, which only measuring accuracy needs

    metric = TopKAccuracy(keep_in_memory=True)
    scores = metric.compute(predictions=predictions.ranked.tolist(), references=predictions.labels.tolist())
    assert scores is not None
    result = {**scores, "num_images": len(predictions.labels), "skipped": predictions.skipped}
    if baseline is None:
        return Evaluation(**result)
    change: PairedChange = paired_change(baseline.correct, predictions.correct)
    return Evaluation(**result, baseline_top1=float(baseline.correct.mean()), **asdict(change))


def _several_labels(found: Outputs, baseline: Outputs | None) -> MultiLabelEvaluation:
    from .metrics import mean_average_precision, micro_f1

    precision = mean_average_precision(found.outputs, found.labels)
    f1 = micro_f1(found.outputs > 0, found.labels > 0.5)
    alone = MultiLabelEvaluation(precision, f1, len(found.labels), found.skipped)
    if baseline is None:
        return alone
    before = mean_average_precision(baseline.outputs, baseline.labels)
    return replace(alone, baseline_mean_average_precision=before, delta=precision - before)


def _regression(found: Outputs, baseline: Outputs | None) -> RegressionEvaluation:
    from .metrics import r_squared

    r2, error = r_squared(found.outputs, found.labels), float(np.square(found.outputs - found.labels).mean())
    alone = RegressionEvaluation(r2, error, len(found.labels), found.skipped)
    if baseline is None:
        return alone
    before, spread = r_squared(baseline.outputs, baseline.labels), found.labels.var(0)
    # What an image takes from R2: its squared error over the labels' variance.
    varies = spread > 0
    lost = [
        (np.square(side.outputs - side.labels)[:, varies] / spread[varies]).sum(1) / max(1, varies.sum())
        for side in (baseline, found)
    ]
    return replace(alone, baseline_r2=before, delta=r2 - before, interval=mean_change(lost[0] - lost[1]))
