"""`model.hardware_cost("h100-sxm")`: what a forward pass of a loaded model takes on a device.

The rows that each Linear multiplies are counted on a copy without weights, on the meta device. A pass of the model
itself, watched by hooks, would take as long as a pass takes, would load what was offloaded, would see nothing of parts
that were compiled before, would call what others hooked to the model, and would disturb whoever uses it at that moment.
Which blocks are kept is read off the layers themselves, packed or not.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .blockprune_cost import ELEMENT_BYTES, Cost, Linear, Profile, VisionTransformer, model_cost
from .blockprune_flops import ModelFlops, UncountableError, count_flops
from .blockprune_heads import CutHeads, cut_heads, layer_number
from .blockprune_layers import is_block_sparse
from .blockprune_profiles import KINDS, DeviceError, named_profile, profile_from_dict, usual_dtype
from .blockprune_skeleton import COMPILED
from .blockprune_tokens import passing_tokens

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedModel


def hardware_cost(
    self: "PreTrainedModel",
    device: str | Mapping[str, object] | Profile,
    *,
    batch: int = 1,
    dtype: str | torch.dtype | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Cost:
    """What a forward pass takes on a device, by the cost model: computed, not measured, and not on this machine.

    A method of every transformers model; it answers for plain vision transformers, dense or block-sparse.

    Args:
        device: a name, such as "h100-sxm"; or a profile of `blockprune_profiles`, or the mapping that a YAML file of
            `blockprune calibrate` holds.
        batch: images.
        dtype: of all numbers, "float32", "bfloat16", "float16" or "int8", or torch's own; by default "float16" on GPUs
            and arrays and "float32" on CPUs, whatever the model is in here.
        image_size: of an image, one number or (height, width); by default the config's, which is not what every image
            processor makes (Dinov2's makes 224 of a config with 518).

    Returns:
        `latency_ms`, `energy_mj`, `flops` (a multiply and an add count as two) and `size_bytes` (that pass through the
        device's memory), of the whole batch.

    Raises:
        DeviceError: no such device, or one without this dtype; a batch below 1.
        UncountableError: a model of another kind, or one that takes no images of this size.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)
        >>> model = ViTForImageClassification(config)
        >>> model.hardware_cost("systolic-32").latency_ms < model.hardware_cost("systolic-16").latency_ms
        True
    """
    profile = profile_of(device)
    dtype = str(dtype or usual_dtype(profile)).removeprefix("torch.")
    if dtype not in ELEMENT_BYTES:
        raise DeviceError(f"dtype: expected one of {', '.join(ELEMENT_BYTES)}, got {dtype!r}")
    if not _is_count(batch):
        raise DeviceError(f"batch: expected a whole number from 1, got {batch!r}")
    flops = _counted(self, image_size)
    works = list(linear_works(self, flops.linear_tokens).values())
    shape = transformer_shape(self.config, flops.image_size, works[0].tokens if works else 0, cut_heads(self), self)
    return model_cost(profile, shape, works, batch=batch, dtype=dtype)


def profile_of(device: str | Mapping[str, object] | Profile) -> Profile:
    """A device's profile by its name, from plain values, or as it is.

    Raises:
        DeviceError: there is none of that name, its values are wrong, or it is no profile.
    """
    if isinstance(device, str):
        try:
            return named_profile(device)
        except DeviceError as error:
            raise DeviceError(f"{error}, or pass the values of a profile of your own") from None
    if isinstance(device, Mapping):
        try:
            return profile_from_dict(device, "device")
        except ValueError as error:
            raise DeviceError(str(error)) from None
    if getattr(device, "kind", None) not in KINDS:  # not by class: it may be that of another copy of this code
        raise DeviceError(f"device: expected a name, a profile or its values, got {type(device).__name__}")
    return device


def _counted(model: "PreTrainedModel", image_size: int | tuple[int, int] | None) -> ModelFlops:
    """What a model's Linears multiply.

    Raises:
        UncountableError: see `hardware_cost`.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and not (len(size) == 2 and all(map(_is_count, size))):
        raise UncountableError(f"image_size: expected a whole number from 1 or (height, width), got {image_size!r}")
    try:
        flops = count_flops(model, size and (size[0], size[1]), merging=True)
    except UncountableError as error:
        raise UncountableError(f"{error}; costs are known of vision models that take pixel_values alone") from None
    if size is not None and flops.image_size != tuple(size):
        raise UncountableError(
            f"image_size: {type(model).__name__} takes {_times(flops.image_size)} (height x width), not {_times(size)}"
        )
    return flops


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def linear_works(model: nn.Module, tokens: Mapping[str, float]) -> dict[str, Linear]:
    """The Linears of a model's repeated layers, dense and block-sparse, as work of one image, by module name.

    Args:
        model: on any device.
        tokens: rows that each multiplies, by its name in a `skeleton`; those without any are left out.

    Raises:
        UncountableError: it is not known which blocks a layer keeps, as its indices have no values.
    """
    works = {}
    for name, module in model.named_modules():
        if not (is_block_sparse(module) or isinstance(module, nn.Linear)):
            continue
        parts = [part for part in name.split(".") if part != COMPILED]
        rows = tokens[".".join(parts)]
        if not rows or not any(map(str.isdigit, parts)):
            continue
        work = Linear(round(rows), module.out_features, module.in_features)
        if is_block_sparse(module):
            if module.col_indices.is_meta or module.crow_indices.is_meta:
                raise UncountableError(
                    f"{name}: which blocks it keeps is not in memory; load the model without offload_buffers, and not "
                    "on the meta device"
                )
            work = work._replace(mask=module.mask().cpu().numpy(), block_shape=module.block_shape)
        works[name] = work
    return works


def transformer_shape(
    config: "PreTrainedConfig",
    size: tuple[int, int],
    tokens: float,
    heads: Sequence[CutHeads] = (),
    model: nn.Module | None = None,
) -> VisionTransformer:
    """A transformers config as the cost model's shape.

    Args:
        config: of a ViT, DeiT, BeiT, Dinov2, or of a CLIP or SigLIP, whose vision part is meant.
        size: (height, width) of an image.
        tokens: of an image in the layers, class tokens included.
        heads: the attentions that are smaller than the config's.
        model: in which tokens may merge.

    Raises:
        UncountableError: a config of another kind of model.
    """
    classes = config.num_labels or 0  # None where the config names none
    config = getattr(config, "vision_config", config)
    try:
        if not isinstance(config.num_attention_heads, int):
            raise TypeError("its stages differ in width")
        patch = _pair(config.patch_size)
        whole = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        cut = {layer_number(attention.query): (attention.heads, attention.head_size) for attention in heads}
        return VisionTransformer(
            image_tokens=(size[0] // patch[0]) * (size[1] // patch[1]),
            patch_inputs=config.num_channels * patch[0] * patch[1],
            tokens=round(tokens),
            width=config.hidden_size,
            heads=config.num_attention_heads,
            layers=config.num_hidden_layers,
            classes=classes,
            attentions=tuple(cut.get(i, whole) for i in range(config.num_hidden_layers)) if cut else None,
            passing=None if model is None else passing_tokens(model, tokens),
        )
    except (AttributeError, TypeError) as error:
        raise UncountableError(
            f"{type(config).__name__}: no plain vision transformer, whose cost is known ({error})"
        ) from None


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
