"""Latency or energy of a whole model on a device, as the masks of its layers decide it."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from ..hub.blockprune_cost import Cost, Linear, Profile, VisionTransformer, layer_cost, other_cost

QUANTITIES = {"latency": "latency_ms", "energy": "energy_mj"}


def usual_dtype(profile: Any) -> str:
    """What models are run in on such a device."""
    return "float32" if profile.kind == "cpu" else "float16"


@dataclass
class DeviceCost:
    """The cost of a model, for budgets.

    Args:
        profile: device.
        metric: "latency" or "energy".
        model: shape of the model.
        linears: the dense target layers by name, with the tokens of a whole batch.
        block_shape: of the masks.
        batch: images.
    """

    profile: Profile
    metric: str
    model: VisionTransformer
    linears: dict[str, Linear]
    block_shape: tuple[int, int]
    batch: int = 1
    _seen: dict[tuple[str, bytes], float] = field(default_factory=dict, repr=False)

    @cached_property
    def rest(self) -> float:
        """What pruning leaves alone."""
        dtype = next(iter(self.linears.values())).dtype
        return self._quantity(other_cost(self.profile, self.model, batch=self.batch, dtype=dtype))

    @cached_property
    def dense(self) -> float:
        """Of the dense model."""
        return self.rest + sum(self._quantity(self.profile.dense(work)) for work in self.linears.values())

    def of(self, masks: dict[str, Tensor]) -> float:
        """Of the model with these masks; layers without one are dense."""
        total = self.rest
        for name, work in self.linears.items():
            mask = masks.get(name)
            total += self._quantity(self.profile.dense(work)) if mask is None else self._layer(name, mask.numpy())
        return total

    def runs_dense(self, name: str, mask: Tensor) -> bool:
        """Whether a dense product is at least as fast as one with the kept blocks."""
        work = self._masked(name, mask.numpy())
        return work.is_dense or self.profile.dense(work).latency_ms <= self.profile.sparse(work).latency_ms

    def block_cost(self, name: str, grid: tuple[int, int]) -> float:
        """What a block more costs where that is most: from none to half of the blocks, or from half to all of them."""
        order = np.random.default_rng(0).permutation(grid[0] * grid[1]).reshape(grid)
        counts = [0, order.size // 2, order.size]
        costs = [self._quantity(self.profile.sparse(self._masked(name, order < count))) for count in counts]
        steps = [(b - a) / max(n - m, 1) for a, b, m, n in zip(costs, costs[1:], counts, counts[1:], strict=False)]
        return max(*steps, 1e-12)

    def _masked(self, name: str, mask: np.ndarray) -> Linear:
        return self.linears[name]._replace(mask=mask, block_shape=self.block_shape)

    def _layer(self, name: str, mask: np.ndarray) -> float:
        key = name, np.packbits(mask).tobytes()
        if key not in self._seen:
            self._seen[key] = self._quantity(layer_cost(self.profile, self._masked(name, mask)))
        return self._seen[key]

    def _quantity(self, cost: Cost) -> float:
        return getattr(cost, QUANTITIES[self.metric])
