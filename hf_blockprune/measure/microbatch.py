"""Big batches in parts, so that what passes between layers stays in a GPU's L2 cache."""

import statistics
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import ConfigError
from .stopwatch import milliseconds

INPUT = "pixel_values"
PARTS = (8, 16, 32, 64)  # images, tried where they are to be measured
ROUNDS = 3


def micro_batch(model: nn.Module, images: int | Literal["auto"] = "auto") -> nn.Module:
    """Let a model take its batches in parts, in place; outputs stay the same, but for rounding.

    Batches with labels, and all while gradients are recorded, go through whole: a loss is no sum over parts.

    Args:
        model: an image model of transformers, compiled or not, also inside a pipeline.
        images: of a part at most; "auto" times whole batches and parts when a batch size comes for the first time, and
            keeps what was fastest.

    Returns:
        The model.

    Raises:
        ConfigError: no such number of images.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(image_size=32, hidden_size=48, num_attention_heads=3, num_hidden_layers=1)
        >>> model = micro_batch(ViTForImageClassification(config).eval(), 4)
        >>> with torch.no_grad():
        ...     model(pixel_values=torch.zeros(10, 3, 32, 32)).logits.shape
        torch.Size([10, 2])
    """
    if images != "auto" and (type(images) is not int or images < 1):
        raise ConfigError(f"micro_batch: images must be 'auto' or at least 1, got {images!r}")
    whole_batches(model)
    model.forward = _InParts(model.forward, images)
    return model


def whole_batches(model: nn.Module) -> nn.Module:
    """Undo `micro_batch`, in place."""
    if isinstance(model.forward, _InParts):
        whole = model.forward.whole
        del model.forward
        if model.forward != whole:  # a compiled model has its own
            model.forward = whole
    return model


class _InParts:
    """A model's forward pass, part by part."""

    def __init__(self, whole: Callable[..., object], images: int | Literal["auto"]) -> None:
        self.whole = whole
        self._images = images
        self._fastest: dict[tuple[torch.device, torch.dtype, torch.Size], int] = {}

    def __call__(self, *args: object, **kwargs: object) -> object:
        if args and INPUT not in kwargs:
            args, kwargs = args[1:], {INPUT: args[0], **kwargs}
        pixels = kwargs.get(INPUT)
        if not isinstance(pixels, Tensor) or args or kwargs.get("labels") is not None or torch.is_grad_enabled():
            return self.whole(*args, **kwargs)
        images = self._images if isinstance(self._images, int) else self._measured(pixels, kwargs)
        return self.whole(**kwargs) if len(pixels) <= images else self._run(pixels, kwargs, images)

    def _run(self, pixels: Tensor, kwargs: dict[str, object], images: int) -> object:
        outputs = [self.whole(**{**kwargs, INPUT: part}) for part in pixels.split(images)]
        structure = tree_flatten(outputs[0])[1]
        leaves = zip(*(tree_flatten(output)[0] for output in outputs), strict=True)
        return tree_unflatten([_joined(parts) for parts in leaves], structure)

    def _measured(self, pixels: Tensor, kwargs: dict[str, object]) -> int:
        """Images of the parts that are fastest for batches like this one."""
        key = (pixels.device, pixels.dtype, pixels.shape)
        if key not in self._fastest:
            sizes = [len(pixels), *(size for size in PARTS if size < len(pixels))]
            for size in sizes:  # compiles, and prepares kernels
                self._run(pixels, kwargs, size)
            times: dict[int, list[float]] = {size: [] for size in sizes}
            for _ in range(ROUNDS):
                for size in sizes:
                    times[size].append(milliseconds(lambda size=size: self._run(pixels, kwargs, size), pixels.device))
            self._fastest[key] = min(sizes, key=lambda size: statistics.median(times[size]))
        return self._fastest[key]


def _joined(parts: tuple[object, ...]) -> object:
    """The same output of all parts, in one."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return torch.cat(tensors) if len(tensors) == len(parts) else parts[0]
