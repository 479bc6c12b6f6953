"""Dense and pruned models on a GPU: times by the ways to run them, batches in parts, memory and energy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.end_to_end import random_pair
from benchmarks.merged import merge
from benchmarks.timing import recorded
from hf_blockprune import micro_batch
from hf_blockprune.measure.energy import energy_counter, measure_energy
from hf_blockprune.measure.microbatch import whole_batches
from hf_blockprune.measure.stopwatch import by_turns, median, ratio

PART_SIZES = (8, 16, 32, 64)
TOKENS = 197


@dataclass(frozen=True)
class Size:
    """How large the work is.

    Attributes:
        device: "cuda" or "cpu".
        linears: (out_features, in_features) by name.
        batches: images, the one to compare by first.
        archs: of whole models.
        changes: of their configs.
        tokens: of an image, for Linears by themselves.
        seconds: of a timing.
        energy_seconds: of work and of idling.
    """

    device: str
    linears: dict[str, tuple[int, int]]
    batches: tuple[int, ...]
    archs: tuple[str, ...]
    changes: dict[str, Any]
    tokens: int
    seconds: float
    energy_seconds: tuple[float, float]


@dataclass(frozen=True)
class Case:
    """One row: what runs, and whether it is also compiled and its energy measured.

    Attributes:
        arch: of the model.
        block_shape: (rows, cols).
        sparsity: blocks removed from each Linear.
        dtype: of torch, by name.
        batch: images.
        compiled: whether both are also compiled.
        energy: whether it is measured.
        merged: share of the dense model's FLOPs that merging tokens alone would leave; 1 merges none.
    """

    arch: str
    block_shape: tuple[int, int]
    sparsity: float
    dtype: str
    batch: int
    compiled: bool = False
    energy: bool = False
    merged: float = 1.0


@torch.no_grad()
def model_row(size: Size, case: Case) -> dict[str, Any]:
    """Times of a dense and a pruned model, the memory of each, and the energy that an image takes."""
    pair = random_pair(case.arch, case.block_shape, case.sparsity, **size.changes)
    if case.merged < 1:
        merge(pair[1], pair[0], case.merged)
    models: dict[str, nn.Module] = {
        name: model.to(getattr(torch, case.dtype)) for name, model in zip(("dense", "sparse"), pair, strict=True)
    }
    pixels = pixels_for(models["dense"], case.batch, size.device)
    row: dict[str, Any] = {"arch": case.arch, "op": "model", "batch": case.batch, "m": size.tokens * case.batch}
    row |= {"k": None, "n": None, "block_shape": list(case.block_shape), "sparsity": case.sparsity, "dtype": case.dtype}
    row["merged"] = case.merged
    for name, model in models.items():
        row[f"{prefix(name)}peak_memory_bytes"] = peak_memory(model.to(size.device), pixels, size.device)
        model.cpu()
    runs = {name: caller(model.to(size.device), pixels) for name, model in models.items()}
    runs |= {f"{name}_graph": recorded(run, size.device) for name, run in list(runs.items())}
    if case.compiled:
        runs |= {f"{name}_compiled": caller(compiled(model, size.device), pixels) for name, model in models.items()}
    times = by_turns(runs, seconds=8 * size.seconds, device=size.device)
    row["ratio_to_dense"], row["ratio_spread"] = ratio(times, "dense", "sparse")
    for way in ("compiled", "graph"):
        if f"dense_{way}" in times:
            found = ratio(times, f"dense_{way}", f"sparse_{way}")
            row[f"ratio_to_{way}"], row[f"ratio_to_{way}_spread"] = found
    row |= {f"{name}_ms": median(values) for name, values in times.items()}
    parts = [part for part in PART_SIZES if part < case.batch]
    row["sparse_parts_ms"] = {part: in_parts(models["sparse"], part, pixels, size) for part in parts}
    if case.energy:
        for name in models:
            row |= energy(runs[f"{name}_graph"], prefix(name), case.batch, size)
    return row


def prefix(name: str) -> str:
    """Of a row's keys: those of the pruned model have none."""
    return "" if name == "sparse" else f"{name}_"


def compiled(model: Any, device: str) -> Any:
    return torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager")


def energy(run: Callable[[], Any], prefix: str, batch: int, size: Size) -> dict[str, Any]:
    """Of an image, idling subtracted and not; None where no counter can be read."""
    keys = [f"{prefix}{key}" for key in ("energy_mj_per_image", "gross_energy_mj_per_image", "watts", "idle_watts")]
    counter = energy_counter(size.device)
    if counter is None:
        return dict.fromkeys(keys)
    work, idle = size.energy_seconds
    wait = torch.cuda.synchronize if size.device == "cuda" else lambda: None
    found = measure_energy(run, counter, seconds=work, idle_seconds=idle, wait=wait)
    per_image = found.mj_per_call() / batch, found.mj_per_call(net=False) / batch
    return dict(zip(keys, (*per_image, found.watts, found.idle_watts), strict=True))


def caller(model: Any, pixels: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(pixel_values=pixels).logits


def pixels_for(model: Any, batch: int, device: str) -> torch.Tensor:
    side = model.config.image_size
    return torch.randn(batch, 3, side, side).to(device, next(model.parameters()).dtype)


def peak_memory(model: Any, pixels: torch.Tensor, device: str) -> int | None:
    """Most bytes held while the model, alone on the device, runs; its weights included."""
    if device != "cuda":
        return None
    model(pixel_values=pixels)  # prepares kernels
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    model(pixel_values=pixels)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def in_parts(model: Any, part: int, pixels: torch.Tensor, size: Size) -> float:
    """Milliseconds of a batch that goes through in parts, recorded as one graph."""
    run = recorded(caller(micro_batch(model, part), pixels), size.device)
    times = by_turns({"parts": run}, seconds=2 * size.seconds, device=size.device)
    whole_batches(model)
    return median(times["parts"])
