"""What a model costs with masks, under a budget: FLOPs, weights, blocks, time or energy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..budget import DEVICE_METRICS, Budget
from ..config import BlockPruneConfig
from ..cost.device_cost import DeviceCost, usual_dtype
from ..cost.flops import ModelFlops
from ..cost.profiles import load_profile
from ..cost.shapes import transformer_shape
from ..hub.blockprune_cost import Linear, linear_flops, weights_energy_mj
from ..hub.blockprune_heads import layer_number
from ..model.layers import shape_of
from ..model.shrunk import LayerShape
from ..model.structure import TransformerLayer, find_transformer_layers
from ..score.blocks import block_sizes
from ..types import JsonDict
from .allocation import CostBudget

if TYPE_CHECKING:
    from transformers import PreTrainedModel


UNITS = {"flops": "FLOPs", "params": "weights", "density": "blocks", **DEVICE_METRICS}


@dataclass(frozen=True)
class AddedCosts:
    """Costs that are the same on all devices and add up: FLOPs, weights or blocks.

    Attributes:
        entry: of a weight, by name of its Linear; None where each block counts as one.
        products: of the dense attention's products of queries with keys and of probabilities with values, by query.
        block_shape: (rows, cols).
    """

    entry: dict[str, float] | None
    products: dict[str, float]
    block_shape: tuple[int, int]

    def blocks(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Of each block of a Linear [out_features, in_features], float64 [block_rows, block_cols]."""
        sizes = block_sizes(shape, self.block_shape)
        return torch.ones_like(sizes) if self.entry is None else sizes * self.entry[name]


@dataclass(frozen=True)
class ModelBudget:
    """A budget of one model, and what masks cost in its unit.

    Attributes:
        wanted: what is asked for.
        blocks: what each block costs; on a device, what one more does.
        costs: what parts cost where costs add up.
        device: the model on the budget's device, None where they do.
    """

    wanted: Budget
    blocks: CostBudget
    costs: AddedCosts
    device: DeviceCost | None = None

    @property
    def asked(self) -> float:
        """What may remain."""
        return self.blocks.ratio * self.blocks.whole

    def of(self, masks: dict[str, Tensor]) -> float:
        """Cost of the model with a mask for each of the target layers, bool [block_rows, block_cols] by name."""
        return self.blocks.kept(masks) + self.blocks.fixed if self.device is None else self.device.of(masks)

    def left(self, masks: dict[str, Tensor]) -> float:
        """How much more may remain; negative where the masks cost too much."""
        return self.asked - self.of(masks)

    def account(self, masks: dict[str, Tensor]) -> JsonDict:
        """What was asked for, and what remains of the dense model's cost, for reports: the promise."""
        return {
            "metric": self.wanted.metric,
            "device": self.wanted.device,
            "batch": self.wanted.batch,
            "unit": UNITS[self.wanted.metric],
            "dense": self.blocks.whole,
            "asked": self.asked,
            "reached": self.asked - self.left(masks),  # and not the cost itself, which rounds otherwise
        }

    def with_ratio(self, ratio: float) -> "ModelBudget":
        """Another one, under which this share of the model's cost may remain."""
        return replace(self, blocks=replace(self.blocks, ratio=ratio))

    def linear(self, name: str, shape: tuple[int, int]) -> float:
        """Cost of one of the target layers, dense and of (out_features, in_features)."""
        if self.device is not None:
            return self.device.linear(name, shape)
        return float(self.costs.blocks(name, shape).sum())

    def products(self, layer: TransformerLayer, heads: int, head_size: int, dense_head_size: int) -> float:
        """Cost of what an attention with so many heads computes between its Linears."""
        if self.device is not None:
            return self.device.products(layer.query, heads, head_size)
        return self.costs.products.get(layer.query, 0.0) * heads * head_size / (layer.heads * dense_head_size)

    def shrunk(self, linears: Mapping[str, nn.Linear], shapes: Sequence[LayerShape]) -> "ModelBudget":
        """The same budget where layers are smaller.

        Args:
            linears: the target layers by name, as small as they are.
            shapes: of the layers that may be smaller.
        """
        sizes = {name: shape_of(linear) for name, linear in linears.items()}
        saved = 0.0
        for s in shapes:
            whole = self.products(s.layer, s.layer.heads, s.dense_head_size, s.dense_head_size)
            saved += whole - self.products(s.layer, len(s.heads), s.head_size, s.dense_head_size)
        device = None
        if self.device is not None:
            heads = {layer_number(s.layer.query): (len(s.heads), s.head_size) for s in shapes}
            device = self.device.shrunk(sizes, heads)
            costs = {name: _on_device_costs(name, size, device) for name, size in sizes.items()}
        else:
            costs = {name: self.costs.blocks(name, size) for name, size in sizes.items()}
        blocks = replace(self.blocks, costs=costs, fixed=self.blocks.fixed - saved, dense=self.blocks.whole)
        return replace(self, blocks=blocks, device=device)


def model_budgets(
    config: BlockPruneConfig, model: "PreTrainedModel", targets: dict[str, nn.Linear], flops: ModelFlops
) -> list[ModelBudget]:
    """All budgets of a config, as `model_budget` has them."""
    wanted = [budget for budget in (config.budget, config.second_budget) if budget is not None]
    return [model_budget(budget, model, targets, flops, config.block_shape) for budget in wanted]


def model_budget(
    budget: Budget,
    model: "PreTrainedModel",
    targets: dict[str, nn.Linear],
    flops: ModelFlops,
    shape: tuple[int, int],
) -> ModelBudget:
    """What a budget comes to for a model.

    Args:
        budget: what is asked for.
        model: whose cost it is, of transformers.
        targets: its Linears to prune by name, dense or block-sparse, in the shapes of the dense model.
        flops: of the dense model.
        shape: of blocks, (rows, cols).

    Raises:
        ConfigError: no such device.
        ModelError: a model whose cost on it is not known.
    """
    device = None if budget.device is None else _on_device(budget, model, targets, flops, shape)
    entry: dict[str, float] | None = None
    if budget.metric == "params":
        entry = dict.fromkeys(targets, 1.0)
    elif budget.metric == "flops":
        entry = {name: linear_flops(flops.linear_tokens[name], 1) for name in targets}
    products = {}
    if budget.metric == "flops":
        layers = find_transformer_layers(model, targets)
        products = {layer.query: flops.attention.get(layer.query.rpartition(".")[0], 0.0) for layer in layers}
    added = AddedCosts(entry, products, shape)
    return ModelBudget(budget, _block_costs(budget, targets, flops, added, device), added, device)


def _block_costs(
    budget: Budget, targets: dict[str, nn.Linear], flops: ModelFlops, added: AddedCosts, device: DeviceCost | None
) -> CostBudget:
    """What every block costs in a budget's unit, and all that is no block of the targets.

    On a device that is what a block more costs; the dense model's cost is the whole.
    """
    shapes = {name: shape_of(linear) for name, linear in targets.items()}
    if device is not None:
        costs, whole = {n: _on_device_costs(n, size, device) for n, size in shapes.items()}, device.dense
    else:
        costs = {name: added.blocks(name, size) for name, size in shapes.items()}
        if budget.metric == "density":
            return CostBudget(costs, budget.ratio or 1.0, name=budget.metric)
        whole = float(flops.parameters) if budget.metric == "params" else flops.dense.total
    now = flops.total if budget.metric == "flops" else whole if device is None else device.unpruned
    fixed = now - sum(float(c.sum()) for c in costs.values())
    ratio = budget.ratio if budget.value is None else budget.value / whole
    assert ratio is not None
    return CostBudget(costs, min(ratio, 1.0), fixed, f"{budget.metric} budget", whole)


def _on_device_costs(name: str, shape: tuple[int, int], device: DeviceCost) -> Tensor:
    sizes = block_sizes(shape, device.block_shape)
    return sizes * (device.block_cost(name, (sizes.shape[0], sizes.shape[1])) / float(sizes.mean()))


def _on_device(
    budget: Budget, model: "PreTrainedModel", targets: dict[str, nn.Linear], flops: ModelFlops, shape: tuple[int, int]
) -> DeviceCost:
    assert budget.device is not None
    profile = load_profile(budget.device)
    tokens = {name: flops.linear_tokens[name] for name in targets}
    linears = {
        name: Linear(round(budget.batch * tokens[name]), linear.out_features, linear.in_features, usual_dtype(profile))
        for name, linear in targets.items()
    }
    mlps = tuple((layer.fc1, layer.fc2) for layer in find_transformer_layers(model, targets))
    of_model = transformer_shape(model.config, flops.image_size, max(tokens.values()), model=model)
    cost = DeviceCost(profile, budget.metric, of_model, linears, shape, budget.batch, mlps)
    if flops.unmerged is None:
        return cost
    read = {name: round(budget.batch * flops.unmerged.linear_tokens[name]) for name in linears}
    unmerged = {name: work._replace(tokens=read[name]) for name, work in linears.items()}
    whole = replace(cost, linears=unmerged, model=replace(of_model, passing=None), _seen={})
    return replace(cost, whole=whole.dense, _seen={})


def block_power(targets: dict[str, nn.Linear], flops: ModelFlops, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Energy in mJ of keeping each block."""
    return {
        name: block_sizes(shape_of(linear), shape) * weights_energy_mj(flops.linear_tokens[name], 1)
        for name, linear in targets.items()
    }
