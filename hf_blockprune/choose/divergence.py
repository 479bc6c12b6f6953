"""How far the predictions of a changed model are from the dense one's, on the same images."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.outputs import output_of, task_for
from ..model.tasks import Regression

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMAGES_AT_ONCE = 32


class Divergence:
    """Measures by what a dense model gave.

    Args:
        dense: of transformers.
        outputs: what its forward gave for each batch of images.
    """

    def __init__(self, dense: "PreTrainedModel", outputs: Sequence[object]) -> None:
        self._model, self._wanted = dense, _answers(dense, outputs)
        task = task_for(dense, outputs[0])
        self._task = task.scaled(self._wanted) if isinstance(task, Regression) else task

    @torch.no_grad()
    def of(self, outputs: Iterable[object]) -> float:
        """KL(dense || changed) in nats of what the task makes of outputs for the same batches, the mean over images."""
        return float(self._task.divergence(self._wanted, _answers(self._model, outputs)).mean())


def _answers(model: "PreTrainedModel", outputs: Iterable[object]) -> Tensor:
    """What a model's outputs mean, float64 [images, answers]."""
    return torch.cat([output_of(model, output) for output in outputs]).double()
