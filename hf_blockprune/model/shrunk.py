"""What is left of a layer of ViT's form of which hidden units, heads, or features of heads leave."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..hub.blockprune_heads import CutHeads
from .structure import TransformerLayer

KeptFeatures: TypeAlias = tuple[Tensor | None, Tensor | None]
"""(outputs, inputs) of a Linear that stay, int64; None for all of them."""


@dataclass(frozen=True)
class LayerShape:
    """Which features of a layer stay.

    Attributes:
        layer: its Linears.
        heads: heads that stay, in the dense model's order.
        head_size: so many first features of each stay.
        dense_head_size: features of a head in the dense model.
        units: hidden units that stay, in the dense model's order.
        dense_units: hidden units of the dense model.
    """

    layer: TransformerLayer
    heads: tuple[int, ...]
    head_size: int
    dense_head_size: int
    units: tuple[int, ...]
    dense_units: int

    @property
    def cuts_heads(self) -> bool:
        """Whether the attention becomes smaller."""
        return len(self.heads) * self.head_size < self.layer.heads * self.dense_head_size

    @property
    def cuts_units(self) -> bool:
        """Whether the MLP becomes smaller."""
        return len(self.units) < self.dense_units

    def features(self) -> Tensor:
        """Features of heads that stay, int64, head by head."""
        heads = torch.tensor(self.heads)[:, None] * self.dense_head_size
        return (heads + torch.arange(self.head_size)).flatten()

    def gone_features(self) -> Tensor:
        """Features of heads that leave, int64, rising."""
        return _others(self.features(), self.layer.heads * self.dense_head_size)

    def gone_units(self) -> Tensor:
        """Hidden units that leave, int64, rising."""
        return _others(torch.tensor(self.units), self.dense_units)

    def kept(self) -> dict[str, KeptFeatures]:
        """What stays of each Linear that becomes smaller, by name."""
        found: dict[str, KeptFeatures] = {}
        if self.cuts_heads:
            features = self.features()
            found |= dict.fromkeys((self.layer.query, self.layer.key, self.layer.value), (features, None))
            found[self.layer.out] = None, features
        if self.cuts_units:
            units = torch.tensor(self.units)
            found |= {self.layer.fc1: (units, None), self.layer.fc2: (None, units)}
        return found

    def cut_heads(self) -> CutHeads | None:
        """What is left of the attention, None where it is whole."""
        if not self.cuts_heads:
            return None
        names = (self.layer.query, self.layer.key, self.layer.value, self.layer.out)
        return CutHeads(*names, len(self.heads), self.head_size, self.layer.heads, self.dense_head_size)


def kept_features(shapes: Iterable[LayerShape]) -> dict[str, KeptFeatures]:
    """What stays of each Linear that becomes smaller in any of these layers, by name."""
    return {name: features for shape in shapes for name, features in shape.kept().items()}


def _others(chosen: Tensor, count: int) -> Tensor:
    left = torch.ones(count, dtype=torch.bool)
    left[chosen] = False
    return left.nonzero().squeeze(1)
