"""Hugging Face configs as the cost model's shapes."""

from typing import Any

from ..errors import ModelError
from ..hub.blockprune_cost import VisionTransformer


def transformer_shape(config: Any, size: tuple[int, int], tokens: float) -> VisionTransformer:
    """A Hugging Face config as the cost model's shape.

    Args:
        config: of a ViT, DeiT, BeiT, Dinov2, or of a CLIP or SigLIP, whose vision part is meant.
        size: (height, width) of an image.
        tokens: of an image in the layers, class tokens included.

    Raises:
        ModelError: a config of another kind of model.
    """
    classes = config.num_labels
    config = getattr(config, "vision_config", config)
    try:
        if not isinstance(config.num_attention_heads, int):
            raise TypeError("its stages differ in width")
        patch = _pair(config.patch_size)
        return VisionTransformer(
            image_tokens=(size[0] // patch[0]) * (size[1] // patch[1]),
            patch_inputs=config.num_channels * patch[0] * patch[1],
            tokens=round(tokens),
            width=config.hidden_size,
            heads=config.num_attention_heads,
            layers=config.num_hidden_layers,
            classes=classes,
        )
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"{type(config).__name__}: no plain vision transformer, whose cost is known ({error})"
        ) from None


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
