"""What a model takes, and whether its image processor makes that of pictures: looked at before the work begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..cost.flops import image_size
from ..errors import DataError, ModelError, first_line
from ..hub.blockprune_skeleton import channels_of
from ..model.modes import evaluating
from ..sources.pictures import MODES
from ..types import ImageProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PROBES = ((160, 120), (96, 144))  # (width, height) of pictures that show whether all are brought to one size


@dataclass(frozen=True)
class ModelInput:
    """What a model takes.

    Attributes:
        channels: 1, 3 or 4.
        size: (height, width) of all its images; None where they may differ.
    """

    channels: int = 3
    size: tuple[int, int] | None = None

    def check(self, pixels: Tensor, name: str) -> None:
        """Raise DataError where pixel_values [images, channels, height, width] are not what the model takes."""
        if pixels.dim() != 4 or pixels.shape[1] != self.channels:
            raise DataError(
                f"{name}: expected pixel_values [images, {self.channels}, height, width], got {list(pixels.shape)}"
            )
        if self.size is not None and tuple(pixels.shape[-2:]) != self.size:
            raise DataError(
                f"{name}: an image is {_times(pixels.shape[-2:])}, the model takes {_times(self.size)} (height x "
                "width); let the image processor resize (do_resize=True and its size)"
            )


def find_input(model: "PreTrainedModel", processor: ImageProcessor) -> ModelInput:
    """What a model takes, with the image processor that goes with it.

    Raises:
        ModelError: pictures cannot be made into that: by the channels, or by what the processor makes of them.
    """
    channels = channels_of(model.config, model)
    if channels not in MODES:
        raise ModelError(
            f"{type(model).__name__}: takes images of {channels} channels; pictures can be made grey, RGB or RGBA "
            "(1, 3 or 4)"
        )
    try:
        own = image_size(model.config)
    except ModelError:
        own = None
    probes = [Image.new(MODES[channels], size) for size in PROBES]
    shapes = [preprocess(processor, [probe], channels).shape for probe in probes]
    sizes = [(shape[-2], shape[-1]) for shape in shapes]
    if sizes[0] != sizes[1]:
        # Pictures keep shapes of their own, which a model either takes as they come or not at all.
        takes_any = not any(_refusal(model, channels, size) for size in sizes)
        return ModelInput(channels, None if takes_any else own)
    if sizes[0] != own and (refusal := _refusal(model, channels, sizes[0])):
        expected = "another size" if own is None else _times(own)
        raise ModelError(
            f"the image processor brings pictures to {_times(sizes[0])} (height x width), {type(model).__name__} takes "
            f"{expected} ({refusal}); set the processor's size (and crop_size) to that, or load the processor that "
            "belongs to the model"
        )
    return ModelInput(channels, sizes[0])


def picture_size(model: "PreTrainedModel", processor: ImageProcessor) -> tuple[int, int]:
    """(height, width) that pictures have when they reach a model, and the config's where each keeps its own.

    Raises:
        ModelError: as of `find_input`; or pictures keep their own, and the config says nothing.
    """
    return find_input(model, processor).size or image_size(model.config, processor.to_dict())


def shared_picture_size(one: Any, other: Any) -> tuple[int, int]:
    """(height, width) that pictures have when they reach either of two `BlockPruner`s.

    Raises:
        ModelError: their processors bring pictures to different sizes; or as of `picture_size`.
    """
    sizes = [picture_size(each.model, each.processor) for each in (one, other)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{one.name} takes pictures of {_times(sizes[0])}, {other.name} of {_times(sizes[1])} (height x width), so "
            "their times do not compare; name the dense model that it was pruned from"
        )
    return sizes[0]


def preprocess(processor: ImageProcessor, pictures: Sequence[Image.Image], channels: int, **options: Any) -> Tensor:
    """pixel_values [images, channels, height, width] of pictures that have a model's channels.

    Raises:
        ModelError: the processor is not one for such pictures.
        DataError: it does not bring pictures to one size.
    """
    kind = type(processor).__name__
    for key in ("image_mean", "image_std"):
        values = getattr(processor, key, None)
        if isinstance(values, (list, tuple)) and getattr(processor, "do_normalize", True) and len(values) != channels:
            raise ModelError(
                f"{kind}: its {key} has {len(values)} values, the model takes images of {channels} channels; set "
                f"{key} to {channels} value{'s' * (channels > 1)}"
            )
    try:
        found = processor(images=list(pictures), return_tensors="pt", **options)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        sizes = sorted({picture.size[::-1] for picture in pictures})
        if len(sizes) > 1:
            raise DataError(
                f"{kind}: does not bring pictures of different sizes ({_times(sizes[0])}, {_times(sizes[-1])}) to one; "
                f"let it resize or crop (do_resize=True and its size) ({first_line(error)[:200]})"
            ) from error
        raise ModelError(
            f"{kind}: fails on a picture of {channels} channels, {_times(sizes[0])} ({first_line(error)[:200]}); load "
            "the image processor that belongs to the model"
        ) from error
    pixels = found.get("pixel_values") if hasattr(found, "get") else None
    if pixels is None:
        given = ", ".join(found) if hasattr(found, "keys") else type(found).__name__
        raise ModelError(f"{kind}: gives {given}, not pixel_values; load the image processor that belongs to the model")
    if not torch.is_tensor(pixels):
        raise DataError(f"{kind}: does not bring pictures to one size; let it resize or crop (do_resize=True)")
    if pixels.dim() != 4 or pixels.shape[1] != channels:
        raise ModelError(
            f"{kind}: makes pixel_values {list(pixels.shape)} of {len(pictures)} pictures, expected [{len(pictures)}, "
            f"{channels}, height, width]; set do_convert_rgb=False for models of other channels than three, or load "
            "the image processor that belongs to the model"
        )
    return pixels


def stacked(pixels: Sequence[Tensor], name: str) -> Tensor:
    """pixel_values of each image as those of a batch; DataError where their sizes differ."""
    shapes = sorted({tuple(one.shape) for one in pixels})
    if len(shapes) > 1:
        raise DataError(f"{name}: its pixel_values have several shapes, {list(shapes[0])} and {list(shapes[-1])}")
    return torch.stack(list(pixels))


@torch.no_grad()
def _refusal(model: "PreTrainedModel", channels: int, size: tuple[int, ...]) -> str | None:
    """What a model says of an image of a size; None where it takes it."""
    parameter = next(model.parameters())
    try:
        with evaluating(model):
            model(pixel_values=torch.zeros(1, channels, *size, device=parameter.device, dtype=parameter.dtype))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what does not fit raises what the place in the model's code does that it does not fit
        return first_line(error)[:200]
    return None


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
