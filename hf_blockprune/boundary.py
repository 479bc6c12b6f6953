"""Hidden states of all calibration images at one layer's boundary, in the dense and in the pruned model.

Both move on from layer to layer, so no part of the network is run again from its beginning.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .data import ImageSet, batches
from .errors import ModelError

if TYPE_CHECKING:
    from accelerate import Accelerator

HELD_BACK_EVERY = 8  # every eighth image chooses settings, the others are fitted


class StopForward(Exception):
    """Ends a forward pass once everything that was wanted has been seen."""


@dataclass
class BoundaryBatch:
    """One batch of images at the boundary of a layer.

    Attributes:
        dense: the dense model's hidden states, [images, tokens, width].
        pruned: the pruned model's.
        held_back: bool [images], the images that choose settings.
        args, kwargs: what else the layers are called with.
    """

    dense: Tensor
    pruned: Tensor
    held_back: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, states: Tensor) -> Tensor:
        """The layer's output."""
        return layer(states, *self.args, **self.kwargs)


def layer_list(model: nn.Module, names: Any) -> tuple[str, nn.ModuleList]:
    """Name and modules of the list of layers that holds all named modules.

    Raises:
        ModelError: they do not lie in one list.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(target.startswith(f"{name}.") for target in names):
            return name, module
    raise ModelError(f"{type(model).__name__}: the pruned Linears lie in several lists of layers; refit needs one")


@torch.no_grad()
def at_boundary(model: nn.Module, layer: nn.Module, pixels: Tensor) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """(hidden states before a layer, other args, kwargs that it is called with); what lies behind does not run.

    Args:
        model: a transformers image classifier.
        layer: one of its layers.
        pixels: [images, channels, height, width].
    """
    seen: list[tuple[Any, ...]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0], args[1:], kwargs))
        raise StopForward

    handle = layer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        model(pixel_values=pixels)
    except StopForward:
        pass
    finally:
        handle.remove()
    return seen[0]  # type: ignore[return-value]


def first_inputs(
    model: nn.Module, first: nn.Module, images: ImageSet, processor: Any, *, accelerator: "Accelerator", batch_size: int
) -> list[BoundaryBatch]:
    """This process's share of the images at the boundary of the first layer."""
    kept: list[BoundaryBatch] = []
    stream = batches(images, processor, batch_size=batch_size, accelerator=accelerator, model_config=model.config)
    for batch in stream:
        if "pixel_values" in batch:
            states, args, kwargs = at_boundary(model, first, batch["pixel_values"])
            kept.append(BoundaryBatch(states, states, held_back(batch["index"]), args, kwargs))
    return kept


def held_back(index: Tensor) -> Tensor:
    """Bool [images]: which images, by position, choose settings."""
    return index % HELD_BACK_EVERY == HELD_BACK_EVERY - 1


@torch.no_grad()
def advance(dense: nn.Module, pruned: nn.Module, kept: list[BoundaryBatch]) -> None:
    """Move on to the next layer's boundary."""
    for batch in kept:
        batch.dense, batch.pruned = batch.run(dense, batch.dense), batch.run(pruned, batch.pruned)
