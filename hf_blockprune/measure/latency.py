"""How fast a pruned model runs here, beside the dense one, by turns in one process."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn

from ..display.stages import stage
from ..hub.blockprune_layers import block_sparse_layers
from ..hub.blockprune_skeleton import channels_of
from ..model.copying import copied
from ..model.modes import evaluating
from ..runs.environment import machine_of
from .stopwatch import by_turns, median, ratio

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

    from ..hub.blockprune_linear import BlockSparseLinear
    from ..types import JsonDict


class LatencyRow(TypedDict):
    """Times at one batch size, see `measure_latency`."""

    batch: int
    dense_latency_ms: float
    latency_ms: float
    dense_throughput_img_s: float
    throughput_img_s: float
    speedup: float
    speedup_quartiles: list[float]


def measure_latency(
    pruned: "PreTrainedModel",
    dense: "PreTrainedModel | None" = None,
    *,
    image_size: tuple[int, int],
    batch_sizes: tuple[int, ...] = (1,),
    seconds: float = 10.0,
) -> "JsonDict":
    """Time forward passes of both models by turns, so that what disturbs the machine disturbs both.

    Args:
        pruned: a transformers classifier or encoder of images with block-sparse layers, on the device to measure.
        dense: the model to compare it with; by default itself with zeros where blocks were removed, which takes as long
            as the dense model that it was made from.
        image_size: (height, width).
        batch_sizes: images in one pass; made-up ones, as their content does not matter.
        seconds: about how long to measure each batch size.

    Returns:
        JSON-ready `device`, `dtype`, `environment`, `backends` (how many layers run on which, at the largest batch) and
        `rows`: for each batch size medians `dense_latency_ms` and `latency_ms`, `dense_throughput_img_s` and
        `throughput_img_s`, and `speedup`, the median of each turn's ratio, with its quartiles `speedup_quartiles`.
    """
    device, dtype = next((p.device, p.dtype) for p in pruned.parameters())
    if dense is None:
        dense = copied(pruned)
        dense.dequantize()
    models: dict[str, nn.Module] = {"dense": dense, "pruned": pruned}
    models["dense"].to(device, dtype)
    rows, pixels = [], torch.empty(0)
    total = seconds * len(batch_sizes)
    with stage("benchmark", total, unit="s", undisturbed=True) as bar, evaluating(*models.values()):
        for number, batch in enumerate(sorted(batch_sizes)):
            pixels = torch.zeros(batch, channels_of(pruned.config, pruned), *image_size, device=device, dtype=dtype)
            rows.append(_row(models, pixels, seconds, lambda share, n=number: bar.reach((n + share) * seconds)))
    return {**machine_of(pruned), "backends": _backends(models["pruned"], pixels), "rows": rows}


@torch.inference_mode()
def _row(
    models: dict[str, nn.Module], pixels: torch.Tensor, seconds: float, on_round: Callable[[float], None]
) -> LatencyRow:
    contestants = {name: lambda model=model: model(pixel_values=pixels) for name, model in models.items()}
    times = by_turns(contestants, seconds=seconds, device=pixels.device.type, on_round=on_round)
    speedup, quartiles = ratio(times, "dense", "pruned")
    dense, pruned = median(times["dense"]), median(times["pruned"])
    batch = len(pixels)
    return {
        "batch": batch,
        "dense_latency_ms": dense,
        "latency_ms": pruned,
        "dense_throughput_img_s": round(1000 * batch / dense, 2),
        "throughput_img_s": round(1000 * batch / pruned, 2),
        "speedup": speedup,
        "speedup_quartiles": quartiles,
    }


def _backends(model: nn.Module, pixels: torch.Tensor) -> dict[str, int]:
    """Number of layers by the backend that multiplies with them."""
    found: Counter[str] = Counter()

    def note(module: "BlockSparseLinear", inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found[module.backend_for(inputs[0])] += 1

    handles = [module.register_forward_hook(note) for _, module in block_sparse_layers(model)]
    try:
        with torch.inference_mode():
            model(pixel_values=pixels)
    finally:
        for handle in handles:
            handle.remove()
    return dict(found)
