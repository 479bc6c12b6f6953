"""Which of the moves that a config allows a model supports."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..choose.shrink_options import can_cut_heads
from ..config import BlockPruneConfig, MoveName
from ..errors import ConfigError
from ..model.structure import TransformerLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def supported_moves(
    model: "PreTrainedModel", layers: Sequence[TransformerLayer], config: BlockPruneConfig
) -> tuple[MoveName, ...]:
    """What may leave a model.

    Args:
        model: the dense model.
        layers: those of its layers whose Linears are all pruned, and known to feed each other.
        config: how to prune.

    Raises:
        ConfigError: a move that it names cannot be made.
    """
    lacking = _lacking(model, layers)
    for move in config.moves or ():
        if move in lacking:
            raise ConfigError(f"moves: {lacking[move]}; leave {move!r} out")
    return tuple(move for move in config.allowed_moves if move not in lacking)


def _lacking(model: "PreTrainedModel", layers: Sequence[TransformerLayer]) -> dict[MoveName, str]:
    """Moves that the model does not support, and why."""
    kind = type(model).__name__
    if not layers:
        why = f"are not known of {kind}, or of layers that are pruned in part"
        return {"units": f"units {why}", "heads": f"heads {why}"}
    if not all(can_cut_heads(model, layer) for layer in layers):
        return {"heads": f"attention of {kind} does not run with other heads"}
    return {}
