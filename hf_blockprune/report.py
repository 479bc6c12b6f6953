"""What a pruning run did, as JSON-ready values."""

from typing import Any

from torch import nn

from .allocation import Allocation
from .blocks import block_sizes
from .hardware.flops import ModelFlops
from .hub.blockprune_cost import linear_flops


def describe_masks(
    targets: dict[str, nn.Linear],
    flops: ModelFlops,
    allocation: Allocation,
    block_shape: tuple[int, int],
    ridges: dict[str, float],
) -> dict[str, Any]:
    """What the masks keep, in all and layer by layer.

    Args:
        targets: the Linears by name.
        flops: FLOPs of the dense model.
        allocation: the chosen masks and their predicted losses.
        block_shape: (rows, cols).
        ridges: ridge of the refit by name, empty without one.

    Returns:
        `flops_ratio` (whole model), `linear_flops_ratio` (targets alone), `dense_flops`, `density` and `layers`.
    """
    layers, dense, removed = [], 0.0, 0.0
    for name, mask in allocation.masks.items():
        shape = (targets[name].out_features, targets[name].in_features)
        sizes = block_sizes(shape, block_shape) * linear_flops(flops.linear_tokens[name], 1)
        dense, removed = dense + float(sizes.sum()), removed + float(sizes[~mask].sum())
        layers.append(
            {
                "name": name,
                "shape": list(shape),
                "block_shape": list(block_shape),
                "kept_blocks": int(mask.sum()),
                "blocks": mask.numel(),
                "density": float(mask.float().mean()),
                "predicted_loss": allocation.loss[name],
                "ridge": ridges.get(name),
            }
        )
    return {
        "flops_ratio": 1 - removed / flops.total,
        "linear_flops_ratio": 1 - removed / dense,
        "dense_flops": flops.total,
        "density": sum(layer["kept_blocks"] for layer in layers) / sum(layer["blocks"] for layer in layers),
        "layers": layers,
    }
