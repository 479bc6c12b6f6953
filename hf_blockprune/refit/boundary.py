"""Hidden states of all calibration images at one layer's boundary, in the dense and in the pruned model.

Both move on from layer to layer, so no part of the network is run again from its beginning.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..data.batches import ImageSet, batches
from ..errors import ModelError
from ..hub.blockprune_tokens import OF_TOKENS
from ..model.layers import Layer, States, hidden_states
from ..types import ImageProcessor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

HELD_BACK_EVERY = 8  # every eighth image chooses settings, the others are fitted


class StopForward(Exception):
    """Ends a forward pass once everything that was wanted has been seen."""


@dataclass
class BoundaryBatch:
    """One batch of images at the boundary of a layer.

    Attributes:
        dense: the dense model's hidden states, [images, all tokens, width].
        pruned: the pruned model's, in which tokens may have merged.
        held_back: bool [images], the images that choose settings.
    """

    dense: Tensor
    pruned: States
    held_back: Tensor


@torch.no_grad()
def learn_calls(model: "PreTrainedModel", layers: list[Layer], pixels: Tensor) -> None:
    """Run some images, and note what each layer is called with beside hidden states.

    Args:
        model: of transformers.
        layers: its layers.
        pixels: [images, channels, height, width].

    Raises:
        ModelError: a layer does not take what the one before it gives.
    """
    last: list[tuple[str, Tensor]] = []
    broken: list[str] = []

    def before(layer: Layer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not args or (last and args[0] is not last[-1][1]):
            broken.append(layer.name)
        layer.args = args[1:]
        layer.kwargs = {name: value for name, value in kwargs.items() if name not in OF_TOKENS}

    def after(layer: Layer, output: object) -> None:
        last.append((layer.name, hidden_states(output)))

    handles = []
    for layer in layers:
        handles += [
            layer.module.register_forward_pre_hook(lambda _, a, k, layer=layer: before(layer, a, k), with_kwargs=True),
            layer.module.register_forward_hook(lambda _m, _i, output, layer=layer: after(layer, output)),
        ]
    try:
        model(pixel_values=pixels)
    finally:
        for handle in handles:
            handle.remove()
    if broken or [name for name, _ in last] != [layer.name for layer in layers]:
        where = broken[0] if broken else layers[0].name
        raise ModelError(
            f"{type(model).__name__}: {where} does not take what the layer before it gives, which refit and recovery "
            "need; prune without them"
        )


@torch.no_grad()
def at_boundary(model: "PreTrainedModel", layer: nn.Module, pixels: Tensor) -> Tensor:
    """Hidden states before a layer; what lies behind does not run.

    Args:
        model: of transformers.
        layer: one of its layers.
        pixels: [images, channels, height, width].
    """
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise StopForward

    handle = layer.register_forward_pre_hook(record)
    try:
        model(pixel_values=pixels)
    except StopForward:
        pass
    finally:
        handle.remove()
    return seen[0]


def first_inputs(
    model: "PreTrainedModel",
    layers: list[Layer],
    images: ImageSet,
    processor: ImageProcessor,
    *,
    accelerator: "Accelerator",
    batch_size: int,
) -> list[BoundaryBatch]:
    """This process's share of the images at the boundary of the first layer; layers learn how they are called."""
    kept: list[BoundaryBatch] = []
    images = images.without_labels()
    stream = batches(images, processor, batch_size=batch_size, accelerator=accelerator, model_config=model.config)
    for batch in stream:
        if "pixel_values" in batch:
            if not kept:
                learn_calls(model, layers, batch["pixel_values"][:1])
            states = at_boundary(model, layers[0].module, batch["pixel_values"])
            kept.append(BoundaryBatch(states, states, held_back(batch["index"])))
    return kept


def held_back(index: Tensor) -> Tensor:
    """Bool [images]: which images, by position, choose settings."""
    return index % HELD_BACK_EVERY == HELD_BACK_EVERY - 1


@torch.no_grad()
def advance(layer: Layer, dense: Iterable[Tensor], kept: list[BoundaryBatch]) -> None:
    """Move on to the boundary of the next layer; `dense` is what the layer gave before it was pruned, by batch."""
    for batch, states in zip(kept, dense, strict=True):
        batch.dense, batch.pruned = states, layer.run(batch.pruned)
