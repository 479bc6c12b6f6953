"""What a model costs with masks, under a budget: FLOPs, weights, blocks, time or energy."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import DEVICE_METRICS, BlockPruneConfig, Budget
from ..cost.device_cost import DeviceCost, usual_dtype
from ..cost.flops import ModelFlops
from ..cost.profiles import load_profile
from ..cost.shapes import transformer_shape
from ..hub.blockprune_cost import Linear, linear_flops, weights_energy_mj
from ..model.structure import find_transformer_layers
from ..score.blocks import block_sizes
from ..types import JsonDict
from .allocation import CostBudget

if TYPE_CHECKING:
    from transformers import PreTrainedModel


UNITS = {"flops": "FLOPs", "params": "weights", "density": "blocks", **DEVICE_METRICS}


@dataclass(frozen=True)
class ModelBudget:
    """A budget of one model, and what masks cost in its unit.

    Attributes:
        wanted: what is asked for.
        blocks: what each block costs; on a device, what one more does.
        device: the model on the budget's device, None where costs are the same on all and add up.
    """

    wanted: Budget
    blocks: CostBudget
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
    return ModelBudget(budget, _block_costs(budget, targets, flops, shape, device), device)


def _block_costs(
    budget: Budget,
    targets: dict[str, nn.Linear],
    flops: ModelFlops,
    shape: tuple[int, int],
    device: DeviceCost | None,
) -> CostBudget:
    """What every block costs in a budget's unit, and all that is no block of the targets.

    On a device that is what a block more costs; the dense model's cost is the whole.
    """
    sizes = {name: block_sizes((linear.out_features, linear.in_features), shape) for name, linear in targets.items()}
    if budget.metric == "density":
        return CostBudget({n: torch.ones_like(s) for n, s in sizes.items()}, budget.ratio or 1.0, name=budget.metric)
    if device is not None:
        costs = {n: s * (device.block_cost(n, (s.shape[0], s.shape[1])) / float(s.mean())) for n, s in sizes.items()}
        whole = device.dense
    elif budget.metric == "params":
        costs, whole = sizes, float(flops.parameters)
    else:
        costs, whole = {n: s * linear_flops(flops.linear_tokens[n], 1) for n, s in sizes.items()}, flops.total
    fixed = whole - sum(float(c.sum()) for c in costs.values())
    ratio = budget.ratio if budget.value is None else budget.value / whole
    assert ratio is not None
    return CostBudget(costs, min(ratio, 1.0), fixed, f"{budget.metric} budget")


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
    whole = transformer_shape(model.config, flops.image_size, max(tokens.values()))
    return DeviceCost(profile, budget.metric, whole, linears, shape, budget.batch, mlps)


def block_power(targets: dict[str, nn.Linear], flops: ModelFlops, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Energy in mJ of keeping each block."""
    return {
        name: block_sizes((linear.out_features, linear.in_features), shape)
        * weights_energy_mj(flops.linear_tokens[name], 1)
        for name, linear in targets.items()
    }
