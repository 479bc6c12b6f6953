"""Hidden states of all images that are learned from, as they move on from layer to layer."""

from itertools import zip_longest
from typing import cast

import torch
from torch import Tensor, nn

from ..model.layers import Layer, MergedStates, States, hidden_states

IMAGES_AT_ONCE = 32  # where nothing is learned


@torch.no_grad()
def advanced(layer: Layer, states: States, module: nn.Module | None = None) -> States:
    """States after a layer, or after another in its place; written over those before it where they fit."""
    count = len(hidden_states(states))
    ends: list[Tensor] = []
    for chosen in torch.arange(count).split(IMAGES_AT_ONCE):
        parts = _tensors(layer.run(of_images(states, chosen), module))
        if not ends:
            ends = [_room(before, part, count) for before, part in zip_longest(_tensors(states), parts)][: len(parts)]
        for end, part in zip(ends, parts, strict=True):
            end[chosen] = part
    if len(ends) > 1:
        return cast(MergedStates, tuple(ends))
    return ends[0] if ends else states


def _room(before: Tensor | None, part: Tensor | None, count: int) -> Tensor:
    """Where what some images give is put for all of them: in place of what was before where that has the same form."""
    if part is None or (before is not None and before.shape[1:] == part.shape[1:]):
        assert before is not None
        return before
    return part.new_empty(count, *part.shape[1:])


def _tensors(states: States) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


def of_images(states: States, chosen: Tensor) -> States:
    """The states of some images."""
    if isinstance(states, tuple):
        return states[0][chosen], states[1][chosen], states[2][chosen]
    return states[chosen]
