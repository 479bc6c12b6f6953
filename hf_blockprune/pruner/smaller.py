"""A model that becomes smaller in place, and what an interrupted run keeps of that."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..choose.shrinking import Shrunk
from ..hub.blockprune_heads import CutHeads, restore_heads, set_heads
from ..model.copying import copied
from ..model.layers import linear_from, linear_in
from ..model.shrunk import KeptFeatures, LayerShape, kept_features
from ..model.structure import TransformerLayer
from ..types import JsonDict

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Smaller:
    """Which Linears of a model become smaller, and their weights; nothing where none does.

    Attributes:
        shapes: of the layers with any.
        tensors: weights and biases by parameter name.
    """

    shapes: tuple[LayerShape, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, shrunk: Shrunk) -> "Smaller":
        """What was chosen."""
        tensors = {
            f"{name}.{parameter}": value.detach()
            for name in shrunk.kept()
            for parameter, value in shrunk.linears[name].named_parameters()
        }
        return cls(tuple(shape for shape in shrunk.shapes if shape.kept()), tensors)

    @property
    def kept(self) -> dict[str, KeptFeatures]:
        """What stays of each Linear that becomes smaller, by name."""
        return kept_features(self.shapes)

    @property
    def heads(self) -> list[CutHeads]:
        """What is left of the attentions that become smaller."""
        return [cut for shape in self.shapes if (cut := shape.cut_heads()) is not None]

    @contextmanager
    def applied(self, model: "PreTrainedModel") -> Iterator["PreTrainedModel | None"]:
        """Make a model smaller in place, for good unless the block fails; gives a copy as it was, None where it stays.

        The copy is there as long as the block lasts.
        """
        if not self.shapes:
            yield None
            return
        dense = copied(model)
        try:
            for name in self.kept:
                model.set_submodule(name, self._linear(name, linear_in(model, name)))
            for cut in self.heads:
                set_heads(model, cut)
            yield dense
        except BaseException:
            for name in self.kept:
                model.set_submodule(name, dense.get_submodule(name))
            restore_heads(model)
            raise

    def _linear(self, name: str, whole: nn.Linear) -> nn.Linear:
        weight, bias = self.tensors[f"{name}.weight"].to(whole.weight), self.tensors.get(f"{name}.bias")
        return linear_from(weight, None if bias is None else bias.to(whole.weight), whole)

    def to_dict(self) -> list[JsonDict]:
        """The shapes as plain values."""
        return [
            {
                "query": shape.layer.query,
                "heads": list(shape.heads),
                "head_size": shape.head_size,
                "dense_head_size": shape.dense_head_size,
                "units": list(shape.units),
                "dense_units": shape.dense_units,
            }
            for shape in self.shapes
        ]

    @classmethod
    def from_dict(
        cls, values: Sequence[JsonDict], tensors: Mapping[str, Tensor], layers: Sequence[TransformerLayer]
    ) -> "Smaller":
        """What `to_dict` gave, with the tensors, for a model of these layers."""
        by_query = {layer.query: layer for layer in layers}
        shapes = [
            LayerShape(
                by_query[value["query"]],
                tuple(value["heads"]),
                value["head_size"],
                value["dense_head_size"],
                tuple(value["units"]),
                value["dense_units"],
            )
            for value in values
        ]
        return cls(tuple(shapes), dict(tensors))
