"""Tokens of a model in which a schedule can be set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..hub.blockprune_tokens import TokenSchedule, mergeable_layers, set_schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Merging:
    """The tokens of a model, before any schedule.

    Attributes:
        model: of transformers.
        names: of Linears of its layers.
        layers: how many there are.
        patches: of an image.
        prefix: tokens before them.
    """

    model: "PreTrainedModel"
    names: tuple[str, ...]
    layers: int
    patches: int
    prefix: int

    @classmethod
    def of(cls, model: "PreTrainedModel", tokens: Mapping[str, float]) -> "Merging":
        """Of a model in which none merge.

        Args:
            model: of transformers.
            tokens: that Linears of its layers read, by name.

        Raises:
            UnmergeableError: it is of a kind whose tokens cannot merge, saying why.
        """
        layers, prefix = mergeable_layers(model, tokens)
        return cls(model, tuple(tokens), len(layers), round(max(tokens.values())) - prefix, prefix)

    def set(self, leave: Sequence[int]) -> None:
        """Let so many patches leave each layer.

        Raises:
            BlockSparseFormatError: these are numbers for another model, or leave too few tokens.
        """
        set_schedule(self.model, TokenSchedule(tuple(leave), self.patches), self.names)
