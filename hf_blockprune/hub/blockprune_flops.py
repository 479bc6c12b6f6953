"""FLOPs of a whole model, counted by torch on a copy without weights: nothing is allocated, nothing computed."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .blockprune_heads import CutHeads, is_attention
from .blockprune_merging import split_sizes
from .blockprune_skeleton import channels_of, skeleton
from .blockprune_tokens import merging_layers, passing_here, tokens_read

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedModel

    from .blockprune_config import JsonDict


class UncountableError(ValueError):
    """A model is of a kind whose work is not known."""


@dataclass(frozen=True)
class ModelFlops:
    """Dense FLOPs of one image.

    Attributes:
        total: of the whole model: patch embedding, Linears, attention products, heads. A multiply and an add count
            as two.
        parameters: weights of the whole model.
        linear_tokens: rows that each Linear multiplies in one forward pass, by module name; 0 where it sees none.
        image_size: (height, width) of the image.
        attention: of the products of queries with keys and of probabilities with values, by the name of the module that
            computes them; a part of the total.
        unmerged: the same where tokens do not merge, None where these numbers are that.
    """

    total: float
    parameters: int
    linear_tokens: dict[str, float]
    image_size: tuple[int, int]
    attention: dict[str, float] = field(default_factory=dict)
    unmerged: "ModelFlops | None" = None

    @property
    def dense(self) -> "ModelFlops":
        """Of the dense model, in which no tokens merge."""
        return self.unmerged or self

    def without_heads(self, cuts: Iterable[CutHeads]) -> float:
        """FLOPs of products of attentions that are saved where heads, or features of them, were cut."""
        return sum(self.attention[cut.attention] * (1 - cut.features / cut.dense_features) for cut in cuts)


def image_size(config: "PreTrainedConfig", processing: "JsonDict | None" = None) -> tuple[int, int]:
    """(height, width) of the images that a model is given, as far as settings say.

    Args:
        config: its config.
        processing: settings of its image processor. They win: some models, such as Dinov2, take other sizes than their
            config's, and are given them.

    Raises:
        UncountableError: neither says.
    """
    for size in _sizes(config, processing or {}):
        return size
    raise UncountableError(f"{type(config).__name__}: its config has no image_size")


def _sizes(config: "PreTrainedConfig", processing: "JsonDict") -> Iterator[tuple[int, int]]:
    """(height, width) by the processor's settings, by the config, and by the configs in it."""
    crop = processing.get("crop_size") if processing.get("do_center_crop") else None
    resized = processing.get("size") if processing.get("do_resize") is not False else None
    parts = (config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config")))
    timm = getattr(config, "pretrained_cfg", None) or processing.get("pretrained_cfg") or {}
    for size in (
        crop,
        resized,
        *(getattr(part, "image_size", None) for part in parts),
        list(timm.get("input_size") or ())[1:],
    ):
        if isinstance(size, Mapping):
            size = (size.get("height"), size.get("width"))
        height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
        if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
            yield height, width


def count_flops(model: "PreTrainedModel", size: tuple[int, int] | None = None, *, merging: bool = False) -> ModelFlops:
    """Count the FLOPs of one image through the dense form of a model.

    Args:
        model: a transformers vision model, dense or block-sparse, on any device; it does not run itself.
        size: (height, width) of the image; the config's by default.
        merging: whether tokens merge in that form as they do in the model, or not at all.

    Raises:
        UncountableError: the model does not answer images alone, or takes no images of this size.
    """
    dense = skeleton(model)
    _, pixels = dry_run(dense, size or image_size(dense.config))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dense(pixel_values=pixels)
    flops = _read_counter(counter, dense, (pixels.shape[-2], pixels.shape[-1]))
    return merged_flops(model, flops) if merging else flops


def merged_flops(model: nn.Module, flops: ModelFlops) -> ModelFlops:
    """FLOPs of the dense form of a model as its tokens merge, from those where none do: what torch would count."""
    total, tokens, attention = flops.total, dict(flops.linear_tokens), dict(flops.attention)
    for name, layer in merging_layers(model):
        inside = {linear: whole for linear, whole in flops.linear_tokens.items() if whole and _lies_in(linear, name)}
        for linear, whole in inside.items():
            tokens[linear] = tokens_read(model, linear, whole)
            total -= 2 * (whole - tokens[linear]) * math.prod(_dense_shape(model.get_submodule(linear)))
        all_tokens = max(inside.values())
        before, after, prefix = passing_here(layer, all_tokens)
        for product in (each for each in attention if _lies_in(each, name)):
            attention[product] *= (before / all_tokens) ** 2
            total -= flops.attention[product] - attention[product]
        if before > after:
            width = _dense_shape(model.get_submodule(next(iter(inside))))[1]  # the first one reads what is compared
            total += 2 * math.prod(split_sizes(before - prefix, before - after)) * width
    merged = tokens != flops.linear_tokens
    return replace(flops, total=total, linear_tokens=tokens, attention=attention, unmerged=flops) if merged else flops


def _dense_shape(linear: Any) -> tuple[int, int]:
    """(out_features, in_features) of a Linear, dense or block-sparse, in the architecture."""
    return getattr(linear, "dense_shape", None) or (linear.out_features, linear.in_features)


@torch.no_grad()
def dry_run(dense: "PreTrainedModel", size: tuple[int, int]) -> tuple[object, Tensor]:
    """What a skeleton gives for one image, and that image, [1, channels, height, width] without values.

    Args:
        dense: what `skeleton` made.
        size: (height, width) to try first; then those of its config. One that the processor makes and the model does
            not take is refused elsewhere, with the images.

    Raises:
        UncountableError: it does not answer images alone, or takes none of these sizes.
    """
    refused: Exception | None = None
    for height, width in dict.fromkeys((size, *_sizes(dense.config, {}))):
        pixels = torch.empty(1, channels_of(dense.config, dense), height, width, dtype=dtype_of(dense), device="meta")
        try:
            return dense(pixel_values=pixels), pixels
        except Exception as error:  # what a model's code does with inputs that it does not take
            refused = refused or error
    raise UncountableError(
        f"{type(dense).__name__}: does not answer images of {size[0]}x{size[1]} (height x width) alone "
        f"({_first_line(refused)})"
    ) from refused


def _first_line(error: BaseException | None) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _read_counter(counter: FlopCounterMode, dense: nn.Module, size: tuple[int, int]) -> ModelFlops:
    counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    tokens = {
        name: counts.get(name, 0) / (2 * module.in_features * module.out_features)
        for name, module in dense.named_modules()
        if isinstance(module, nn.Linear)
    }
    attention = {
        name: float(counts.get(name, 0) - sum(counts.get(linear, 0) for linear in tokens if _lies_in(linear, name)))
        for name, module in dense.named_modules()
        if is_attention(module)
    }
    parameters = sum(p.numel() for p in dense.parameters())
    return ModelFlops(float(counter.get_total_flops()), parameters, tokens, size, attention)


def _lies_in(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The floating-point type that a model computes in."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
