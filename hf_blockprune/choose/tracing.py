"""Removal traces of a model's layers, shared out over processes, and kept for a run that goes on."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import BlockPruneConfig
from ..display.stages import Stage, stage
from ..errors import ModelError
from ..score.methods import TraceSettings
from ..score.shrink import column_trace
from ..score.statistics import LayerStatistics
from ..score.trace import RemovalTrace, gone_first
from .state import SelectionState

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Tracer:
    """Takes layers' traces, again and again as their statistics are corrected.

    Args:
        targets: the Linears by name.
        config: how to prune.
        accelerator: the processes.
        gone: blocks that left before, bool [block_rows, block_cols] by name.
        state: keeps traces, and gives back those of an interrupted run.

    Attributes:
        seconds: time that each layer's traces took so far, on the processes that made them.
    """

    targets: dict[str, nn.Linear]
    config: BlockPruneConfig
    accelerator: "Accelerator"
    gone: dict[str, Tensor]
    state: SelectionState
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    _times: int = field(default=0, init=False)

    def stage(self, name: str, layers: list[str], rounds: int = 1) -> AbstractContextManager[Stage]:
        """Show a stage that takes the traces of layers, in so many rounds at most."""
        mine = self._mine(layers)
        work = rounds * sum(self._work(layer) for layer in mine)
        return stage(name, rounds * len(mine) or None, unit="layers", work=work)

    def layers(self, statistics: dict[str, LayerStatistics]) -> list[str]:
        """The layers with statistics, or all where the method needs none."""
        return [name for name in self.targets if name in statistics] or list(self.targets)

    def traces(
        self,
        statistics: dict[str, LayerStatistics],
        bar: Stage,
        linears: Mapping[str, nn.Linear] | None = None,
        *,
        columns: bool = False,
    ) -> dict[str, RemovalTrace]:
        """Traces of the layers that `layers` names; each made by one process.

        Args:
            statistics: of the layers, by name.
            bar: the stage that shows it.
            linears: the layers as they are now, by name; as they were by default.
            columns: let whole columns leave instead of blocks, in steps that make up a block's rows.

        Raises:
            ModelError: a layer's inputs are too dependent, or memory is too little.
        """
        from accelerate.utils import gather_object

        names, made = self.layers(statistics), []
        linears = linears or self.targets
        number, self._times = self._times, self._times + 1
        stored = {name: self.state.trace(number, name, self.targets[name].weight.device) for name in names}
        kept = {name: trace for name, trace in stored.items() if trace is not None}
        for name in [name for name in self._mine(names) if name in kept]:
            bar.advance(work=self._work(name), measured=False)
        for name in self._mine([name for name in names if name not in kept]):
            start = perf_counter()
            weight = linears[name].weight.detach()
            trace = self._trace(name, weight, statistics.get(name), columns)
            made.append((name, (trace, perf_counter() - start)))
            self.state.keep_trace(number, name, *made[-1][1])
            bar.advance(work=self._work(name))
        every = kept | dict(gather_object(made) if self.accelerator.num_processes > 1 else made)
        for name in names:
            self.seconds[name] = self.seconds.get(name, 0.0) + every[name][1]
        return {name: every[name][0] for name in names}

    def _mine(self, names: list[str]) -> list[str]:
        """This process's share of layers."""
        return names[self.accelerator.process_index :: self.accelerator.num_processes]

    def _work(self, name: str) -> float:
        """How long a layer's trace takes beside others, by what it has to compute."""
        linear = self.targets[name]
        return float(linear.out_features * linear.in_features**self.config.scoring.in_features_power)

    def _trace(self, name: str, weight: Tensor, statistics: LayerStatistics | None, columns: bool) -> RemovalTrace:
        config = self.config
        settings = TraceSettings(config.damping, config.memory_mb << 20)
        try:
            if columns:
                assert statistics is not None  # of a method that has some
                return column_trace(weight, statistics, config.damping, config.block_shape[0])
            trace = config.scoring.trace(weight, statistics, config.block_shape, settings)
            return gone_first(trace, self.gone[name]) if name in self.gone else trace
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise ModelError(
                f"{name}: its inputs are too dependent for {config.method} ({error}); raise damping or use more "
                "calibration images"
            ) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ModelError(f"{name}: too little memory for even one block row at a time ({error})") from error
