"""Which tokens of images merge in a model, layer by layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..cost.flops import dtype_of
from ..errors import ModelError
from ..hub.blockprune_tokens import merging_layers
from ..model.layers import MergedStates
from ..model.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MergedLayer:
    """The tokens after a layer.

    Attributes:
        tokens: how many an image has.
        places: which of them each token of the whole image is in, int64 [images, all tokens].
    """

    tokens: int
    places: Tensor


@torch.no_grad()
def merged_layers(model: "PreTrainedModel", pixels: Tensor) -> list[MergedLayer]:
    """What has merged after each layer of a model.

    Args:
        model: of transformers, in which tokens merge.
        pixels: of images, [images, channels, height, width].

    Raises:
        ModelError: no tokens merge in it.
        UnmergeableError: its attention cannot be that of merged tokens.
    """
    layers = [layer for _, layer in merging_layers(model)]
    if not layers:
        raise ModelError(f"{type(model).__name__}: no tokens merge in it; set a schedule first")
    found: list[MergedLayer] = []

    def after(module: nn.Module, args: object, output: object) -> None:
        # Before the first patches leave, a layer gives nothing but states.
        states, places = (output, None) if isinstance(output, Tensor) else cast(MergedStates, output)[::2]
        images, tokens = states.shape[:2]
        whole = torch.arange(tokens, device=states.device).expand(images, -1)
        found.append(MergedLayer(tokens, whole if places is None else places))

    handles = [layer.register_forward_hook(after) for layer in layers]
    try:
        with evaluating(model):
            model(pixel_values=pixels.to(dtype_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return found
