"""Before blocks are chosen: features of a model change places, so that those worth little share blocks.

The model's function stays the same. See `reorder.hidden` and `reorder.stream` for which orders are good ones.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from ..config import BlockPruneConfig
from ..display.stages import Stage, stage
from ..model.structure import TransformerLayer, find_residual_stream
from ..runs.processes import agreed
from ..score.statistics import LayerStatistics
from ..types import JsonDict
from .changes import Changes
from .hidden import Move, apply_moves, block_saliency_kept, packing_moves, sorting_moves
from .rotation import Rotation, apply_rotation, choose_rotation
from .state import ReorderingState
from .stream import choose_order, permute_statistics, permute_stream

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Reordered:
    """What `Reordering.run` did.

    Attributes:
        statistics: of the Linears as they are now, by name.
        permutation: how well saliency is packed into blocks before and after, and the residual stream's new order, for
            reports.
    """

    statistics: dict[str, LayerStatistics]
    permutation: JsonDict


@dataclass(frozen=True)
class Reordering:
    """Lets hidden units, heads and their features, and features of the residual stream change places.

    Args:
        model: the dense model.
        layers: those of its form whose features may move; some.
        targets: the Linears by name.
        config: how to prune.
        accelerator: the processes.
        changes: what changes the model, and can undo it.
        state: keeps the orders, and gives back those of an interrupted run.
    """

    model: "PreTrainedModel"
    layers: list[TransformerLayer]
    targets: dict[str, nn.Linear]
    config: BlockPruneConfig
    accelerator: "Accelerator"
    changes: Changes
    state: ReorderingState

    def run(self, statistics: dict[str, LayerStatistics], share: float) -> Reordered:
        """Reorder the model in place.

        Args:
            statistics: of the Linears, by name.
            share: of the blocks, for which the report says how much of the saliency they hold.
        """
        names = {name for layer in self.layers for name in layer.names()}
        coupled = {name: linear for name, linear in self.targets.items() if name in names}
        shape, state = self.config.block_shape, self.state
        with stage("permutation", len(self.layers), unit="layers") as bar:
            before = block_saliency_kept(coupled, statistics, shape, share)
            statistics = self._rotated(statistics)
            moves = state.moves("sorting", lambda: agreed(self._sorted(statistics), self.accelerator))
            sorted_ = apply_moves(moves, self.targets, statistics, self.changes)
            streamed, order = self._reorder_stream(coupled, sorted_)
            moves = state.moves("packing", lambda: agreed(self._packed(streamed, bar), self.accelerator))
            packed = apply_moves(moves, self.targets, streamed, self.changes)
            after = block_saliency_kept(coupled, packed, shape, share)
        permutation = {
            "block_share": share,
            "saliency_kept_before": before,
            "saliency_kept_after": after,
            "residual_order": order,
            "rotated_heads": self.config.rotates,
        }
        return Reordered(packed, permutation)

    def _sorted(self, statistics: dict[str, LayerStatistics]) -> list[Move]:
        return sorting_moves(self.layers, self.targets, statistics, rotated=self.config.rotates)

    def _rotated(self, statistics: dict[str, LayerStatistics]) -> dict[str, LayerStatistics]:
        """The statistics after heads were rotated, where they are to be."""
        for number, layer in enumerate(self.layers if self.config.rotates else []):
            rotation = self.state.rotation(number, partial(self._rotation, layer, statistics))
            moved = apply_rotation(layer, rotation, self.targets, statistics, self.changes)
            statistics = statistics | moved
        return statistics

    def _rotation(self, layer: TransformerLayer, statistics: dict[str, LayerStatistics]) -> Rotation:
        return agreed(choose_rotation(layer, self.targets, statistics), self.accelerator)

    def _packed(self, statistics: dict[str, LayerStatistics], bar: Stage) -> list[Move]:
        each = [self._packing_moves(layer, statistics) for layer in bar.over(self.layers)]
        return [move for moves in each for move in moves]

    def _packing_moves(self, layer: TransformerLayer, statistics: dict[str, LayerStatistics]) -> list[Move]:
        shape, rotated = self.config.block_shape, self.config.rotates
        return packing_moves([layer], self.targets, statistics, shape, rotated=rotated)

    def _reorder_stream(
        self, linears: dict[str, nn.Linear], statistics: dict[str, LayerStatistics]
    ) -> tuple[dict[str, LayerStatistics], list[int] | None]:
        """(statistics, the new order of the residual stream); None where it stays, or was not found."""
        stream = find_residual_stream(self.model) if self.config.permutes_stream else None
        if stream is None:
            return statistics, None
        shape = self.config.block_shape
        order = self.state.order(
            "stream", lambda: agreed(choose_order(stream, linears, statistics, shape), self.accelerator)
        )
        permute_stream(self.model, stream, order, self.changes)
        return permute_statistics(stream, statistics, order), order.tolist()
