"""What a pruning run did, as JSON-ready values."""

from typing import Any

from torch import nn

from .allocation import Allocation
from .blocks import block_sizes
from .hardware.flops import ModelFlops
from .hub.blockprune_cost import linear_flops
from .layerwise import LayerRefit


class PruneReport(dict[str, Any]):
    """A report of plain values, which JSON can write; `rich.print` shows it as tables."""

    def __rich__(self) -> Any:
        from rich.console import Group

        from .tables import layer_table, summary_table

        return Group(layer_table(self), summary_table(self))


def describe_masks(
    targets: dict[str, nn.Linear],
    flops: ModelFlops,
    allocation: Allocation,
    block_shape: tuple[int, int],
    loss_factors: dict[str, float],
    trace_seconds: dict[str, float],
) -> dict[str, Any]:
    """What the masks keep, in all and layer by layer.

    Args:
        targets: the Linears by name.
        flops: FLOPs of the dense model.
        allocation: the chosen masks and their predicted losses.
        block_shape: (rows, cols).
        loss_factors: true over predicted loss by name, empty where it was not measured; predicted losses hold it.
        trace_seconds: time that each layer's removal traces took, by name.

    Returns:
        `flops_ratio` (whole model), `linear_flops_ratio` (targets alone), `params_ratio` (weights of the whole
        model), `dense_flops`, `density` and `layers`.
    """
    layers, dense, removed, removed_weights = [], 0.0, 0.0, 0
    for name, mask in allocation.masks.items():
        shape = (targets[name].out_features, targets[name].in_features)
        sizes, tokens = block_sizes(shape, block_shape), flops.linear_tokens[name]
        dense += linear_flops(tokens, float(sizes.sum()))
        removed += linear_flops(tokens, float(sizes[~mask].sum()))
        removed_weights += int(sizes[~mask].sum())
        layers.append(
            {
                "name": name,
                "shape": list(shape),
                "block_shape": list(block_shape),
                "kept_blocks": int(mask.sum()),
                "blocks": mask.numel(),
                "density": float(mask.float().mean()),
                "predicted_loss": allocation.loss[name],
                "loss_factor": loss_factors.get(name),
                "ridge": None,
                "error_after_refit": None,
                "cut_units": 0,
                "seconds": round(trace_seconds[name], 3),
            }
        )
    return {
        "flops_ratio": 1 - removed / flops.total,
        "linear_flops_ratio": 1 - removed / dense,
        "params_ratio": 1 - removed_weights / flops.parameters,
        "dense_flops": flops.total,
        "density": sum(layer["kept_blocks"] for layer in layers) / sum(layer["blocks"] for layer in layers),
        "layers": layers,
    }


def add_refits(report: dict[str, Any], refits: dict[str, LayerRefit]) -> None:
    """Write into a report's layers what the refit came to, by name."""
    for layer in report["layers"]:
        refit = refits.get(layer["name"])
        if refit is not None:
            layer["ridge"], layer["error_after_refit"] = refit.ridge, refit.error
            layer["seconds"] = round(layer["seconds"] + refit.seconds, 3)


def add_cuts(report: dict[str, Any], cuts: dict[str, int]) -> None:
    """Write into a report's layers how many of an fc1's outputs were cut, with fc2's inputs, by its name."""
    for layer in report["layers"]:
        layer["cut_units"] = cuts.get(layer["name"], 0)
