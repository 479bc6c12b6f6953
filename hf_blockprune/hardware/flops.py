"""FLOPs of a whole model, counted by torch on a weightless copy: nothing is allocated, nothing computed."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import ModelError


@dataclass(frozen=True)
class ModelFlops:
    """Dense FLOPs of one image.

    Attributes:
        total: of the whole model: patch embedding, Linears, attention products, heads. A multiply and an add count
            as two.
        parameters: weights of the whole model.
        linear_tokens: rows that each Linear multiplies in one forward pass, by module name.
        image_size: (height, width) of the image.
    """

    total: float
    parameters: int
    linear_tokens: dict[str, float]
    image_size: tuple[int, int]


def image_size(config: Any, processing: Mapping[str, Any] | None = None) -> tuple[int, int]:
    """(height, width) of the images that a model is given.

    Args:
        config: its config.
        processing: settings of its image processor. They win: some models, such as Dinov2, take other sizes than their
            config's, and are given them.

    Raises:
        ModelError: neither says.
    """
    processing = processing or {}
    crop = processing.get("crop_size") if processing.get("do_center_crop") else None
    resized = processing.get("size") if processing.get("do_resize") is not False else None
    for size in (crop, resized, getattr(config, "image_size", None)):
        if isinstance(size, Mapping):
            size = (size.get("height"), size.get("width"))
        height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
        if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
            return height, width
    raise ModelError(f"{type(config).__name__}: its config has no image_size; only vision models can be pruned")


def count_flops(model_class: type, config: Any, processing: Mapping[str, Any] | None = None) -> ModelFlops:
    """Count the FLOPs of one image through the dense architecture.

    Args:
        model_class: a transformers vision model class.
        config: its config; a block-sparse checkpoint's `quantization_config` is left out of account.
        processing: settings of its image processor, see `image_size`.

    Raises:
        ModelError: the model does not take images of `config.image_size`.
    """
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    height, width = image_size(config, processing)
    config.image_size = height if height == width else (height, width)
    with torch.device("meta"):
        model = model_class(config).eval()
        pixels = torch.empty(1, config.num_channels, height, width, dtype=next(model.parameters()).dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=pixels)
    counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    tokens = {
        name: counts.get(name, 0) / (2 * module.in_features * module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return ModelFlops(float(counter.get_total_flops()), model.num_parameters(), tokens, (height, width))
