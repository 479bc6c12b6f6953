"""Accuracy of a classifier on labelled images, and its paired change against another model."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from .data import NO_LABEL, CorruptImages, ImageSet, batches, num_batches
from .errors import DataError
from .paired import PairedChange, paired_change

if TYPE_CHECKING:
    from accelerate import Accelerator

TOP = 5


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
class Evaluation:
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, without the comparison where there was none."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def predict(
    model: nn.Module, images: ImageSet, processor: Any, *, accelerator: "Accelerator", batch_size: int = 32
) -> Predictions:
    """Classify every image, on all processes; each of them gets all predictions, in the data set's order.

    Raises:
        DataError: images without labels, labels outside the model's classes, or more than 1 % corrupt images.
    """
    from accelerate.utils import gather_object

    if images.label_column is None:
        raise DataError(
            f"{images.name}: has no labels, so accuracy cannot be measured; add a metadata.csv with columns file_name "
            "and label, or sort the images into one folder a class"
        )
    model.to(accelerator.device).eval()
    rows: list[tuple[int, int, list[int]]] = []
    corrupt = CorruptImages(images.name)
    stream = batches(images, processor, batch_size=batch_size, accelerator=accelerator, model_config=model.config)
    total = num_batches(images, batch_size, accelerator.num_processes)
    for batch in logging.tqdm(stream, total=total, desc="Evaluation", disable=not accelerator.is_main_process):
        corrupt.count(batch)
        if "pixel_values" in batch:
            rows += _classify(model, batch, images.name)
    gathered = gather_object([(rows, corrupt.files, corrupt.seen)])
    corrupt.files = sorted(file for _, files, _ in gathered for file in files)
    corrupt.seen = sum(seen for _, _, seen in gathered)
    corrupt.check()
    rows = sorted(row for part, _, _ in gathered for row in part)
    index, labels, ranked = (np.array(column) for column in zip(*rows, strict=True))
    return Predictions(index, labels, ranked, corrupt.files)


@torch.inference_mode()
def _classify(model: nn.Module, batch: dict[str, Any], name: str) -> list[tuple[int, int, list[int]]]:
    if (batch["labels"] == NO_LABEL).any():
        raise DataError(f"{name}: some images have no label; label or remove them before measuring accuracy")
    logits = model(pixel_values=batch["pixel_values"].to(next(model.parameters()).dtype)).logits
    ranked = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
    return list(zip(batch["index"].tolist(), batch["labels"].tolist(), ranked.tolist(), strict=True))


def summarise(predictions: Predictions, baseline: Predictions | None = None) -> Evaluation:
    """Accuracy of predictions, and its paired change against a baseline's.

    Raises:
        DataError: the two were made on different images.
    """
    from .metrics import TopKAccuracy  # imports datasets and evaluate, which only measuring accuracy needs

    metric = TopKAccuracy(keep_in_memory=True)
    scores = metric.compute(predictions=predictions.ranked.tolist(), references=predictions.labels.tolist())
    assert scores is not None
    result = {**scores, "num_images": len(predictions.labels), "skipped": predictions.skipped}
    if baseline is None:
        return Evaluation(**result)
    if not np.array_equal(predictions.index, baseline.index):
        raise DataError("the two models were not evaluated on the same images")
    change: PairedChange = paired_change(baseline.correct, predictions.correct)
    return Evaluation(**result, baseline_top1=float(baseline.correct.mean()), **asdict(change))
