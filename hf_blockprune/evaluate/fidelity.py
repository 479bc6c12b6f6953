"""How close an encoder's embeddings are to those of another model, image by image; labels are not needed."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch, ImageSet
from ..errors import DataError, ModelError
from ..model.outputs import answers
from ..types import ImageProcessor, JsonDict
from .asking import ask

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Embeddings:
    """An encoder's answers: position of each image, its embedding [images, values] in float32, data set and split."""

    index: np.ndarray
    values: np.ndarray
    skipped: list[str]
    dataset: str = ""
    split: str | None = None


@dataclass(frozen=True)
class Fidelity:
    """Two models' embeddings of the same images.

    Attributes:
        cosine: similarity of the two embeddings of an image, the mean over images; 1 where they point the same way.
        least_cosine: of the image with the least.
        relative_squared_error: squared distance of the two over images, as a share of how much the other model's
            embeddings vary over them; 0 where they are the same, 1 where a constant would do as well.
        num_images: images that were compared.
        skipped: files that could not be decoded.
    """

    cosine: float
    least_cosine: float
    relative_squared_error: float
    num_images: int
    skipped: list[str]

    def to_dict(self) -> JsonDict:
        """JSON-ready values."""
        return asdict(self)


def embed(
    model: "PreTrainedModel",
    images: ImageSet,
    processor: ImageProcessor,
    *,
    accelerator: "Accelerator",
    batch_size: int = 32,
    name: str = "evaluation",
) -> Embeddings:
    """Embed every image, on all processes; each of them gets all embeddings, in the data set's order.

    Args:
        model: an encoder of transformers.
        images: labelled or not.
        processor: the model's image processor.
        accelerator: device and processes.
        batch_size: images in one pass on each process.
        name: of the stage that is shown.

    Raises:
        DataError: more than 1 % corrupt images.
    """
    rows, skipped = ask(
        model,
        images,
        processor,
        lambda pixels, batch: _embeddings(model, pixels, batch),
        accelerator=accelerator,
        batch_size=batch_size,
        name=name,
    )
    index, values = zip(*rows, strict=True)
    return Embeddings(np.array(index), np.stack(values), skipped, images.public_name, images.split)


@torch.inference_mode()
def _embeddings(model: "PreTrainedModel", pixels: Tensor, batch: Batch) -> list[tuple[int, np.ndarray]]:
    found = answers(model, pixels).float().cpu().numpy()
    return list(zip(batch["index"].tolist(), found, strict=True))


def compare(have: Embeddings, wanted: Embeddings) -> Fidelity:
    """How close embeddings are to those of another model, the dense one mostly.

    Raises:
        DataError: the two were made of different images.
        ModelError: they differ in length.
    """
    if not np.array_equal(have.index, wanted.index):
        raise DataError("the two models were not given the same images")
    a, b = have.values.astype(np.float64), wanted.values.astype(np.float64)
    if a.shape != b.shape:
        raise ModelError(
            f"embeddings of {a.shape[1]} values cannot be compared with those of {b.shape[1]}; name the dense model "
            "that this one was pruned from"
        )
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    spread = np.square(b - b.mean(0)).sum()
    error = np.square(a - b).sum() / spread if spread else float(not np.array_equal(a, b))
    return Fidelity(float(cosines.mean()), float(cosines.min()), float(error), len(a), have.skipped)
