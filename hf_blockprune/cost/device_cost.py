"""Latency or energy of a whole model on a device, as the masks of its layers decide it."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from ..hub.blockprune_cost import Cost, Linear, Profile, VisionTransformer, attention_cost, layer_cost, other_cost
from ..hub.blockprune_profiles import usual_dtype
from ..score.blocks import used_units

__all__ = ["DeviceCost", "usual_dtype"]

QUANTITIES = {"latency": "latency_ms", "energy": "energy_mj"}


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
        mlps: (fc1, fc2) of each MLP whose hidden units are cut where they have no blocks.
        whole: cost of the dense model, where these layers are smaller than its, or read fewer tokens.
    """

    profile: Profile
    metric: str
    model: VisionTransformer
    linears: dict[str, Linear]
    block_shape: tuple[int, int]
    batch: int = 1
    mlps: tuple[tuple[str, str], ...] = ()
    whole: float | None = None
    _seen: dict[tuple[str, tuple[int, ...], bytes], float] = field(default_factory=dict, repr=False)

    @cached_property
    def rest(self) -> float:
        """What pruning leaves alone."""
        dtype = next(iter(self.linears.values())).dtype
        return self._quantity(other_cost(self.profile, self.model, batch=self.batch, dtype=dtype))

    @cached_property
    def dense(self) -> float:
        """Of the dense model."""
        return self.unpruned if self.whole is None else self.whole

    @property
    def unpruned(self) -> float:
        """Of the model with all blocks of these layers."""
        return self.rest + sum(self._quantity(self.profile.dense(work)) for work in self.linears.values())

    def linear(self, name: str, shape: tuple[int, int]) -> float:
        """Of a target layer, dense and of (out_features, in_features)."""
        work = self.linears[name]._replace(out_features=shape[0], in_features=shape[1])
        return self._quantity(self.profile.dense(work))

    def products(self, query: str, heads: int, head_size: int) -> float:
        """Of what an attention, of which a Linear is named, computes between its Linears."""
        work = self.linears[query]
        tokens = work.tokens // self.batch
        return self._quantity(
            attention_cost(self.profile, tokens, heads, head_size, batch=self.batch, dtype=work.dtype)
        )

    def shrunk(self, shapes: dict[str, tuple[int, int]], attentions: dict[int, tuple[int, int]]) -> "DeviceCost":
        """The same where layers are smaller.

        Args:
            shapes: (out_features, in_features) of the target layers.
            attentions: (heads, features of each) of some layers by number; the others' are the dense model's.
        """
        linears = {
            name: work._replace(out_features=shapes[name][0], in_features=shapes[name][1])
            for name, work in self.linears.items()
        }
        dense = (self.model.heads, self.model.width // self.model.heads)
        model = replace(self.model, attentions=tuple(attentions.get(i, dense) for i in range(self.model.layers)))
        return replace(self, linears=linears, model=model, whole=self.dense, _seen={})

    def of(self, masks: dict[str, Tensor]) -> float:
        """Of the model with these masks; layers without one are dense."""
        masked = self._works(masks)
        return self.rest + sum(
            self._layer(name, masked[name]) if name in masked else self._quantity(self.profile.dense(work))
            for name, work in self.linears.items()
        )

    def runs_dense(self, name: str, masks: dict[str, Tensor]) -> bool:
        """Whether the dense layer is at least as fast as the one with its mask."""
        masked = layer_cost(self.profile, self._works(masks)[name])
        return self.profile.dense(self.linears[name]).latency_ms <= masked.latency_ms

    def _works(self, masks: dict[str, Tensor]) -> dict[str, Linear]:
        """The layers with masks, in the shapes that they will have."""
        works = {name: self._masked(name, masks[name].numpy()) for name in self.linears if name in masks}
        rows, cols = self.block_shape
        for fc1, fc2 in self.mlps:
            if fc1 in works and fc2 in works:
                units = self.linears[fc1].out_features
                stays = used_units(masks[fc1], masks[fc2], self.block_shape, units).numpy()
                kept = int(stays.sum())
                writer, reader = masks[fc1].numpy()[stays[::rows]], masks[fc2].numpy()[:, stays[::cols]]
                works[fc1] = works[fc1]._replace(mask=writer, out_features=kept)
                works[fc2] = works[fc2]._replace(mask=reader, in_features=kept)
        return works

    def block_cost(self, name: str, grid: tuple[int, int]) -> float:
        """What a block more costs where that is most: from none to half of the blocks, or from half to all of them."""
        order = np.random.default_rng(0).permutation(grid[0] * grid[1]).reshape(grid)
        counts = [0, order.size // 2, order.size]
        costs = [self._quantity(self.profile.sparse(self._masked(name, order < count))) for count in counts]
        steps = [(b - a) / max(n - m, 1) for a, b, m, n in zip(costs, costs[1:], counts, counts[1:], strict=False)]
        return max(*steps, 1e-12)

    def _masked(self, name: str, mask: np.ndarray) -> Linear:
        return self.linears[name]._replace(mask=mask, block_shape=self.block_shape)

    def _layer(self, name: str, work: Linear) -> float:
        assert work.mask is not None
        key = name, work.mask.shape, np.packbits(work.mask).tobytes()
        if key not in self._seen:
            self._seen[key] = self._quantity(layer_cost(self.profile, work))
        return self._seen[key]

    def _quantity(self, cost: Cost) -> float:
        return getattr(cost, QUANTITIES[self.metric])
