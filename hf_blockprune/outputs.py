"""What a model answers: scores of classes where it has such a head, else an embedding of each image.

Everything that compares two models, or asks what a layer is worth, reads answers here.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ModelError
from .hardware.flops import dtype_of, image_size
from .skeleton import channels_of, skeleton

SEED_STRIDE = 1_000_003


def output_of(model: nn.Module, output: Any) -> Tensor:
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
    given = ", ".join(output) if hasattr(output, "keys") else type(output).__name__
    raise ModelError(
        f"{type(model).__name__}: answers with {given}; expected logits, image_embeds, pooler_output, feature_maps or "
        "last_hidden_state"
    )


def answers(model: nn.Module, pixels: Tensor) -> Tensor:
    """A model's answers [images, values] on pixels [images, channels, height, width], in the model's own type."""
    return output_of(model, model(pixel_values=pixels.to(dtype_of(model))))


def is_classifier(output: Any) -> bool:
    """Whether what a model's forward gave are scores of classes, [images, classes]."""
    logits = getattr(output, "logits", None)
    return torch.is_tensor(logits) and logits.dim() == 2


@torch.no_grad()
def classifies(model: nn.Module, processing: Any = None) -> bool:
    """Whether a model gives scores of classes; it does not run itself.

    Args:
        model: of transformers.
        processing: settings of its image processor.
    """
    made = skeleton(model)
    size = image_size(made.config, processing)
    pixels = torch.empty(1, channels_of(made), *size, dtype=dtype_of(made), device="meta")
    return is_classifier(made(pixel_values=pixels))


@dataclass(frozen=True)
class Embedding:
    """Answers that are features: each image's are taken for the mean of a normal distribution.

    Attributes:
        variance: of each of its values. Divergences have no unit where it is that of the values over images.
    """

    variance: float = 1.0

    def losses(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """Half the squared error of outputs [images, values] over the variance, the sum over values, [images]."""
        return (outputs - wanted).square().sum(-1) / (2 * self.variance)

    def sample(self, outputs: Tensor, index: Tensor, seed: int) -> Tensor:
        """Values for each image, normal about the model's own; the image's position determines the draw.

        Gradients of losses of these are random projections of the answers' Jacobian, whose mean square is the Fisher
        information.
        """
        generators = [torch.Generator().manual_seed(seed * SEED_STRIDE + i) for i in index.tolist()]
        noise = torch.stack([torch.randn(outputs.shape[-1], generator=g) for g in generators])
        return outputs.detach() + noise.to(outputs) * self.variance**0.5

    def divergence(self, wanted: Tensor, have: Tensor) -> Tensor:
        """KL(wanted || have) in nats: half the squared distance over the variance, the sum over values, [images]."""
        return self.losses(have, wanted)

    def scaled(self, wanted: Tensor) -> "Embedding":
        """In units of how much answers [images, values] vary over images: the divergence is half the share lost."""
        spread = float(wanted.detach().double().var(0, unbiased=False).sum()) if len(wanted) else 0.0
        return replace(self, variance=spread or self.variance)


def kl_divergence(wanted: Tensor, have: Tensor) -> Tensor:
    """KL(wanted || have) of each image from logits, [images]."""
    return F.kl_div(have.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)
