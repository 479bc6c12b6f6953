"""What closed-form pruning knows of a dense model: moments of hidden units, and of each head's queries and keys."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hf_blockprune.model.structure import TransformerLayer

IMAGES_AT_ONCE = 32
ACTIVE = 0.01  # a unit is active on a token where it is larger than this share of the layer's root mean square


@dataclass
class Hidden:
    """Sums over tokens of what fc2 reads, float64.

    Attributes:
        first: sum of x, [units].
        second: sum of x x', [units, units].
        active: number of tokens on which a unit is active, [units].
        tokens, images: how many were summed.
    """

    first: Tensor
    second: Tensor
    active: Tensor
    tokens: int = 0
    images: int = 0

    def add(self, x: Tensor) -> None:
        """Add images, [images, tokens, units]."""
        threshold = ACTIVE * x.square().mean((1, 2), keepdim=True).sqrt()
        self.active += (x.abs() > threshold).sum((0, 1))
        rows = x.flatten(0, 1).double()
        self.first += rows.sum(0)
        self.second += rows.T @ rows
        self.tokens += len(rows)
        self.images += len(x)

    @property
    def mean(self) -> Tensor:
        """[units]."""
        return self.first / self.tokens

    @property
    def covariance(self) -> Tensor:
        """[units, units]."""
        return self.second / self.tokens - torch.outer(self.mean, self.mean)


@dataclass
class Moments:
    """Of one layer.

    Attributes:
        hidden: of its hidden units.
        queries: of each image and head the sum over tokens of [q, 1] [q, 1]', [images, heads, d + 1, d + 1].
        keys: the same of k less its mean over the image's tokens, [images, heads, d, d]; a softmax over tokens does
            not see that mean.
    """

    hidden: Hidden
    queries: Tensor
    keys: Tensor

    def __add__(self, other: "Moments") -> "Moments":
        """Of both sets of images."""
        a, b = self.hidden, other.hidden
        sums = (a.first + b.first, a.second + b.second, a.active + b.active)
        hidden = Hidden(*sums, a.tokens + b.tokens, a.images + b.images)
        return Moments(hidden, torch.cat([self.queries, other.queries]), torch.cat([self.keys, other.keys]))


@torch.inference_mode()
def collect(model: nn.Module, layers: list[TransformerLayer], pixels: Tensor, *, heads: bool) -> list[Moments]:
    """Moments of each layer in one pass.

    Args:
        model: the dense one, in evaluation mode.
        layers: its layers.
        pixels: [images, channels, height, width].
        heads: whether those of queries and keys are wanted; they take 4 images x heads x d x 2d bytes a layer.
    """
    found: list[Hidden] = []
    queries: list[list[Tensor]] = [[] for _ in layers]
    keys: list[list[Tensor]] = [[] for _ in layers]
    hooks = []
    for number, layer in enumerate(layers):
        units = model.get_submodule(layer.fc2).get_parameter("weight").shape[1]
        empty = partial(torch.zeros, dtype=torch.float64)
        found.append(Hidden(empty(units), empty(units, units), empty(units)))
        hooks.append(model.get_submodule(layer.fc2).register_forward_pre_hook(_reading(found[-1].add)))
        if heads:
            into_queries, into_keys = queries[number].append, keys[number].append
            query, key = model.get_submodule(layer.query), model.get_submodule(layer.key)
            hooks.append(query.register_forward_hook(_writing(into_queries, partial(_query_moments, layer.heads))))
            hooks.append(key.register_forward_hook(_writing(into_keys, partial(_key_moments, layer.heads))))
    try:
        for batch in pixels.split(IMAGES_AT_ONCE):
            model(pixel_values=batch.float())
    finally:
        for hook in hooks:
            hook.remove()
    none = [torch.empty(0)]
    parts = zip(found, queries, keys, strict=True)
    return [Moments(hidden, torch.cat(q or none), torch.cat(k or none)) for hidden, q, k in parts]


def _reading(add: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        add(inputs[0])

    return hook


def _writing(add: Callable[[Tensor], None], of: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        add(of(output))

    return hook


def _query_moments(heads: int, output: Tensor) -> Tensor:
    split = by_head(output, heads)
    split = torch.cat([split, torch.ones_like(split[..., :1])], dim=-1)
    return (split.mT @ split).float()


def _key_moments(heads: int, output: Tensor) -> Tensor:
    split = by_head(output, heads)
    split = split - split.mean(-2, keepdim=True)
    return (split.mT @ split).float()


def by_head(output: Tensor, heads: int) -> Tensor:
    """A Linear's output [images, tokens, heads x d] as [images, heads, tokens, d], in double precision."""
    return output.double().unflatten(-1, (heads, -1)).transpose(1, 2)
