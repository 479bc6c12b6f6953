"""A model run again and again from one of its layers on, where only layers from there on have changed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..hub.blockprune_tokens import OF_TOKENS, is_merging
from ..model.layers import Layer, layer_chain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATES_BYTES = 1 << 30  # of hidden states that are held


class Suffixes:
    """Runs a model on the same images, and skips layers before the first that was changed.

    A model whose layers are no chain of tensors, or whose states are too many to hold, runs as a whole each time.

    Args:
        model: of transformers, before any change.
        names: of modules that may change.
        batches: pixels [images, channels, height, width].

    Attributes:
        outputs: what the model gave for each batch, as it was.
    """

    def __init__(self, model: "PreTrainedModel", names: Iterable[str], batches: list[Tensor]) -> None:
        self.model, self.batches = model, batches
        try:
            self.layers = layer_chain(model, list(names))
        except ModelError:
            self.layers: list[Layer] = []
        # Before each layer, by batch: hidden states, and what else travels with them.
        self._states: list[list[tuple[Tensor, dict[str, object]]]] = []
        self.outputs = [self._learn(pixels) for pixels in batches]

    @torch.no_grad()
    def _learn(self, pixels: Tensor) -> object:
        """The model's output; its states before each layer are held."""
        states: list[tuple[Tensor, dict[str, object]]] = []

        def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            if args and isinstance(args[0], Tensor):
                states.append((args[0], {name: kwargs[name] for name in OF_TOKENS if name in kwargs}))

        def after(module: nn.Module, args: object, output: object) -> None:
            if not isinstance(output, Tensor) and not is_merging(module):
                states.clear()
                self.layers = []  # what else it gives cannot be made up

        handles = [layer.module.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers]
        handles += [layer.module.register_forward_hook(after) for layer in self.layers]
        try:
            output = self.model(pixel_values=pixels)
        finally:
            for handle in handles:
                handle.remove()
        held = sum(s.numel() * s.element_size() for s, _ in states) * len(self.batches)
        if len(states) != len(self.layers) or held > STATES_BYTES:
            self.layers = []
        self._states.append(states if self.layers else [])
        return output

    @torch.no_grad()
    def run(self, changed: Iterable[str]) -> Iterator[object]:
        """What the model gives now for each batch.

        Args:
            changed: names of the modules that are not as they were.
        """
        first = self._first(list(changed))
        for pixels, states in zip(self.batches, self._states, strict=True):
            if first:
                with self._from(first, *states[first]):
                    yield self.model(pixel_values=pixels)
            else:
                yield self.model(pixel_values=pixels)

    def _first(self, changed: list[str]) -> int:
        """Number of the first layer that holds a changed module; 0 where one lies outside of the layers."""
        places = [
            next((i for i, layer in enumerate(self.layers) if name.startswith(f"{layer.name}.")), 0) for name in changed
        ]
        return min(places, default=0)

    @contextmanager
    def _from(self, first: int, states: Tensor, of_tokens: dict[str, object]) -> Iterator[None]:
        """While it lasts, layers before one do nothing, and that one gets the states that it had."""

        def pass_on(hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
            return hidden

        def replace(
            module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
        ) -> tuple[tuple[object, ...], dict[str, object]]:
            return (states, *args[1:]), kwargs | of_tokens

        # A module may have a forward of its own, such as one that moves its weights first.
        skipped = [(layer.module, vars(layer.module).get("forward")) for layer in self.layers[:first]]
        handle = self.layers[first].module.register_forward_pre_hook(replace, with_kwargs=True)
        try:
            for module, _ in skipped:
                vars(module)["forward"] = pass_on
            yield
        finally:
            handle.remove()
            for module, own in skipped:
                if own is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = own
