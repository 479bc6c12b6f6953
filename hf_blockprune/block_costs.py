"""What blocks of a model's layers cost under a budget: FLOPs, weights, time or energy."""

from typing import Any

import torch
from torch import Tensor, nn

from .allocation import CostBudget
from .blocks import block_sizes
from .config import Budget
from .hardware.device_cost import DeviceCost, usual_dtype
from .hardware.flops import ModelFlops
from .hardware.profiles import load_profile
from .hardware.shapes import transformer_shape
from .hub.blockprune_cost import Linear, linear_flops, weights_energy_mj


def cost_budget(
    budget: Budget,
    targets: dict[str, nn.Linear],
    flops: ModelFlops,
    shape: tuple[int, int],
    device: DeviceCost | None = None,
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


def device_cost(
    budget: Budget,
    config: Any,
    targets: dict[str, nn.Linear],
    flops: ModelFlops,
    shape: tuple[int, int],
    mlps: tuple[tuple[str, str], ...],
) -> DeviceCost | None:
    """The model on a budget's device; None for budgets without one.

    Args:
        budget: what is asked.
        config: the model's.
        targets: the Linears to prune.
        flops: of the dense model.
        shape: of blocks.
        mlps: (fc1, fc2) of each MLP.

    Raises:
        ConfigError: no such profile.
        ModelError: a model whose cost is not known.
    """
    if budget.device is None:
        return None
    profile = load_profile(budget.device)
    tokens = {name: flops.linear_tokens[name] for name in targets}
    linears = {
        name: Linear(round(budget.batch * tokens[name]), linear.out_features, linear.in_features, usual_dtype(profile))
        for name, linear in targets.items()
    }
    model = transformer_shape(config, flops.image_size, max(tokens.values()))
    return DeviceCost(profile, budget.metric, model, linears, shape, budget.batch, mlps)


def block_power(targets: dict[str, nn.Linear], flops: ModelFlops, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Energy in mJ of keeping each block."""
    return {
        name: block_sizes((linear.out_features, linear.in_features), shape)
        * weights_energy_mj(flops.linear_tokens[name], 1)
        for name, linear in targets.items()
    }
