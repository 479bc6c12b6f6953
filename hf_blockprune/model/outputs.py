"""What a model answers: scores of classes where it has such a head, else an embedding of each image.

Everything that compares two models, or asks what a layer is worth, reads answers here.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..cost.flops import dry_run, dtype_of, image_size
from ..errors import ModelError
from ..hub.blockprune_skeleton import skeleton
from ..types import JsonDict
from .tasks import Regression, Task, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def output_of(model: nn.Module, output: object) -> Tensor:
    """A model's answers [images, values] from what its forward gave.

    Those are `logits`; of a model without them `image_embeds`, `pooler_output`, the means of `feature_maps` over
    places, or of `last_hidden_state` the class token, and where there is none the mean over tokens.

    Raises:
        ModelError: it gave none of these.
    """
    for name in ("logits", "image_embeds", "pooler_output"):
        if torch.is_tensor(found := getattr(output, name, None)):
            return found.flatten(1)
    if maps := getattr(output, "feature_maps", None):
        return torch.cat([m.mean((2, 3)) if m.dim() == 4 else m.mean(1) for m in maps], dim=-1)
    if torch.is_tensor(states := getattr(output, "last_hidden_state", None)):
        if states.dim() == 4:
            return states.mean((2, 3))
        has_class_token = any(name.rpartition(".")[2] == "cls_token" for name, _ in model.named_parameters())
        return states[:, 0] if has_class_token else states.mean(1)
    given = ", ".join(output) if isinstance(output, dict) else type(output).__name__
    raise ModelError(
        f"{type(model).__name__}: answers with {given}; expected logits, image_embeds, pooler_output, feature_maps or "
        "last_hidden_state"
    )


def answers(model: nn.Module, pixels: Tensor) -> Tensor:
    """A model's answers [images, values] on pixels [images, channels, height, width], in the model's own type."""
    return output_of(model, model(pixel_values=pixels.to(dtype_of(model))))


def has_scores(output: object) -> bool:
    """Whether what a model's forward gave are scores of classes, [images, classes]."""
    logits = getattr(output, "logits", None)
    return torch.is_tensor(logits) and logits.dim() == 2


def classifies(model: "PreTrainedModel", processing: JsonDict | None = None) -> bool:
    """Whether a model gives scores of classes; it does not run itself.

    Args:
        model: of transformers.
        processing: settings of its image processor.

    Raises:
        ModelError: the model does not answer images alone.
    """
    made = skeleton(model)
    try:  # a processor whose size does not fit is refused elsewhere, by what it makes of pictures
        size = image_size(made.config)
    except ModelError:
        size = image_size(made.config, processing)
    return has_scores(dry_run(made, size)[0])


def task_for(model: "PreTrainedModel", output: object, *, several: bool = False) -> Task:
    """What a model's answers mean: of scores what its config says, and of an embedding numbers.

    Labels drawn for numbers are these and noise, so that gradients of their losses are random projections of the
    embedding's Jacobian, whose mean square is the Fisher information.

    Args:
        model: of transformers.
        output: what its forward gave.
        several: as for `task_of`.
    """
    if has_scores(output):
        return task_of(model.config, several=several)
    return Regression(output_of(model, output).shape[-1])
