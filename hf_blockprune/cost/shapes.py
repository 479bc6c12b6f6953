"""A model's shape for the cost model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from ..errors import ModelError
from ..hub import blockprune_model_cost
from ..hub.blockprune_cost import VisionTransformer
from ..hub.blockprune_flops import UncountableError
from ..hub.blockprune_heads import CutHeads

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig


def transformer_shape(
    config: "PreTrainedConfig",
    size: tuple[int, int],
    tokens: float,
    heads: Sequence[CutHeads] = (),
    model: nn.Module | None = None,
) -> VisionTransformer:
    """See `hub.blockprune_model_cost.transformer_shape`.

    Raises:
        ModelError: a config of another kind of model.
    """
    try:
        return blockprune_model_cost.transformer_shape(config, size, tokens, heads, model)
    except UncountableError as error:
        raise ModelError(str(error)) from None
