"""Everything that needs a GPU, in one command of at most nine minutes, straight from a checkout.

    PYTHONPATH=. python benchmarks/gpu_suite.py                         # benchmarks/results/cuda-<name>.json and .png
    PYTHONPATH=. python benchmarks/gpu_suite.py --sections kernels fit  # goes on with these files
    PYTHONPATH=. python benchmarks/gpu_suite.py --dry-run --output DIR  # each step, tiny, on a CPU; times mean nothing

Sections: correctness, kernels (beside cuBLAS, 2:4 and torch's BSR), end_to_end (eager, compiled, CUDA graph, batches in
parts, memory, energy), fit (of a cost model to the kernels' times). Each has a share of the time, does the most
important cases first, and leaves the rest out when its time is up; it prints how many those were.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ |= {"TRITON_INTERPRET": "1", "BLOCKPRUNE_BACKEND": "triton"}

import _root  # noqa: F401
import torch
from torch import nn
from transformers.utils import logging

from benchmarks.end_to_end import random_pair
from benchmarks.gpu_models import TOKENS, Case, Size, caller, model_row
from benchmarks.kernels import measure as measure_kernel
from benchmarks.merged import merge
from benchmarks.rivals import rivals
from benchmarks.timing import device_file, random_mask, recorded, store
from hf_blockprune import BlockSparseLinear
from hf_blockprune.cost.profiles import load_profile
from hf_blockprune.hub.blockprune_cost import Linear
from hf_blockprune.hub.blockprune_layout import grid_shape
from hf_blockprune.hub.blockprune_ops import block_sparse_linear
from hf_blockprune.hub.blockprune_profiles import GpuProfile
from hf_blockprune.measure.calibrate import Measurement, blank_gpu, fit_profile, rank_correlation

MINUTES = {"correctness": 1.0, "kernels": 3.5, "end_to_end": 4.0, "fit": 0.1}
MAX_RELATIVE_ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}
BLOCK_SHAPES = ((64, 32), (32, 32), (16, 16), (128, 64), (64, 1), (32, 4))
LINEARS = {"proj": (768, 768), "qkv": (2304, 768), "fc1": (3072, 768), "fc2": (768, 3072)}  # of DeiT-B
SPARSITIES = (0.5, 0.7, 0.8)
MERGED = ((0.0, 0.5), (0.0, 0.65), (0.5, 0.65))  # blocks removed, share of the FLOPs that merging alone would leave


def main() -> None:
    """Run the sections that were asked for; exit with 1 where a kernel is wrong."""
    options = parse_options()
    logging.set_verbosity_error()
    size = TINY if options.dry_run else FULL
    if size.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --dry-run walks through every step on a CPU")
    path = (options.output / "dry-run.json") if options.output else device_file(size.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    wrong = 0
    for section in options.sections:
        deadline = time.perf_counter() + 60 * MINUTES[section]
        rows: list[dict[str, Any]] = []
        left_out = 0
        for work in SECTIONS[section](size, path):
            if time.perf_counter() > deadline:
                left_out += 1
                continue
            rows += work()
            print(section, rows[-1], flush=True)
        store(path, section, rows)
        print(f"{section}: {len(rows)} rows, {left_out} cases left out for want of time", flush=True)
        wrong += sum(not row.get("correct", True) for row in rows)
    if wrong:
        raise SystemExit(f"{wrong} results are wrong")
    plot(path)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=MINUTES, default=list(MINUTES))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU; needs --output")
    parser.add_argument("--output", type=Path, help="folder for the result file, instead of benchmarks/results")
    options = parser.parse_args()
    if options.dry_run and options.output is None:
        parser.error("--dry-run needs --output, so that its times do not end up among results")
    return options


FULL = Size("cuda", LINEARS, (64, 16, 1, 256), ("deit-base", "deit-small"), {}, TOKENS, 0.15, (5.0, 3.0))
TINY_MODEL = {
    "image_size": 32,
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
TINY = Size("cpu", {"fc1": (256, 64)}, (3, 1), ("deit-tiny",), TINY_MODEL, 5, 0.0, (0.2, 0.2))
Work = Callable[[], list[dict[str, Any]]]


def correctness(size: Size, path: Path) -> Iterator[Work]:
    """Relative errors against float64, outputs poisoned before."""
    shapes = list(size.linears.values())[-1:] if size.device == "cpu" else [(3072, 768), (768, 3072)]
    for block_shape, dtype, (n, k) in product(BLOCK_SHAPES, MAX_RELATIVE_ERROR, shapes):
        yield lambda case=(block_shape, dtype, n, k): [check(*case, device=size.device)]
    yield lambda: [check_merged(size)]


@torch.no_grad()
def check_merged(size: Size) -> dict[str, Any]:
    """Merging as a graph on the device against the same on the processor, in float32."""
    dense, sparse = random_pair(size.archs[-1], BLOCK_SHAPES[2], 0.5, **size.changes)
    pixels = torch.randn(size.batches[-1], 3, dense.config.image_size, dense.config.image_size)
    expected = merge(sparse, dense, MERGED[1][1])(pixel_values=pixels).logits
    run, logits = caller(nn.Module.to(sparse, size.device), pixels.to(size.device)), []
    recorded(lambda: logits.append(run()), size.device)()
    if size.device == "cuda":
        torch.cuda.synchronize()
    error = float((logits[-1].cpu() - expected).norm() / expected.norm())
    return {"op": "merged model", "arch": size.archs[-1], "relative_error": error, "correct": error < 1e-3}


@torch.no_grad()
def check(block_shape: tuple[int, int], dtype: str, n: int, k: int, *, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    mask = random_mask(grid_shape(n, k, block_shape), 0.5, torch.Generator().manual_seed(0))
    layer = BlockSparseLinear.from_dense(torch.nn.Linear(k, n), mask, block_shape).to(device, getattr(torch, dtype))
    x = torch.randn(TOKENS, k, device=device, dtype=layer.weight.dtype)
    expected = torch.nn.functional.gelu(layer.to_dense().double()(x.double()))
    torch.full((TOKENS, n), torch.nan, device=device, dtype=x.dtype)  # the next output's memory, freed again
    options = {"out_features": n, "activation": "gelu", "backend": "triton"}
    y = block_sparse_linear(x, layer.weight, layer.crow_indices, layer.col_indices, layer.bias, **options)
    error = float((y.double() - expected).norm() / expected.norm())
    key = {"op": "linear", "m": TOKENS, "k": k, "n": n, "block_shape": list(block_shape), "dtype": dtype}
    return {**key, "relative_error": error, "correct": error < MAX_RELATIVE_ERROR[dtype]}


def kernels(size: Size, path: Path) -> Iterator[Work]:
    """Single Linears in bfloat16, and what else can multiply with sparse weights."""
    for batch, (name, (n, k)) in product(size.batches[:1], size.linears.items()):
        yield lambda case=(batch, name, n, k): [rival_row(size, *case)]
    for batch, block_shape, sparsity, (name, (n, k)) in product(
        size.batches, BLOCK_SHAPES, SPARSITIES, size.linears.items()
    ):
        case = {
            "arch": size.archs[0],
            "op": name,
            "batch": batch,
            "m": size.tokens * batch,
            "k": k,
            "n": n,
            "block_shape": block_shape,
            "sparsity": sparsity,
            "dtype": "bfloat16",
        }
        yield lambda case=case: [measure_kernel(case, "triton", size.device, seconds=size.seconds)]


def rival_row(size: Size, batch: int, name: str, n: int, k: int) -> dict[str, Any]:
    x = torch.randn(size.tokens * batch, k, device=size.device, dtype=torch.bfloat16)
    row = {"arch": size.archs[0], "op": f"{name} elsewhere", "batch": batch, "m": len(x), "k": k, "n": n}
    return {**row, "dtype": "bfloat16", **rivals(x, n, seconds=size.seconds, device=size.device)}


def end_to_end(size: Size, path: Path) -> Iterator[Work]:
    """Whole models; the first rows are those that are compared with what others state."""
    batch, *others = size.batches
    arch, block_shape = size.archs[0], BLOCK_SHAPES[0]
    cases = [
        Case(arch, block_shape, sparsity, "bfloat16", batch, compiled=True, energy=True) for sparsity in SPARSITIES
    ]
    cases += [
        Case(arch, block_shape, sparsity, "bfloat16", batch, compiled=True, merged=share) for sparsity, share in MERGED
    ]
    cases.append(Case(arch, block_shape, 0.5, "float32", batch, energy=True))
    cases += [Case(small, block_shape, s, "bfloat16", batch, True) for small, s in product(size.archs[1:], SPARSITIES)]
    cases += [Case(*case) for case in product(size.archs, (block_shape,), SPARSITIES[:2], ("bfloat16",), others)]
    cases += [Case(arch, shape, 0.5, "bfloat16", batch) for shape in BLOCK_SHAPES[1:3]]
    for case in cases:
        yield lambda case=case: [model_row(size, case)]


def fit(size: Size, path: Path) -> Iterator[Work]:
    """The hardware model, fitted to every other kernel time and judged on the rest."""
    yield lambda: [fit_row(read(path).get("kernels", []), size.device)]


def fit_row(rows: list[dict[str, Any]], device: str) -> dict[str, Any]:
    measured = [measurement(row) for row in rows if "sparse_ms" in row]
    if len(measured) < 8:
        return {"op": "cost model", "held_out_error": None, "measurements": len(measured)}
    base = blank_gpu("fitted") if device == "cuda" else load_profile("h100-sxm")
    assert isinstance(base, GpuProfile)
    profile = fit_profile(base, measured)
    return {
        "op": "cost model",
        "profile": {key: value for key, value in asdict(profile).items() if key != "source"},
        "held_out_error": profile.held_out_error,
        "rank_correlation": rank_correlation(profile, measured),
        "measurements": len(measured),
    }


def measurement(row: dict[str, Any]) -> Measurement:
    block_shape = (row["block_shape"][0], row["block_shape"][1])
    grid = grid_shape(row["n"], row["k"], block_shape)
    mask = random_mask(grid, row["sparsity"], torch.Generator().manual_seed(0)).numpy()
    work = Linear(row["m"], row["n"], row["k"], row["dtype"], mask, block_shape)
    return Measurement(work, row["dense_ms"], row["sparse_ms"])


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def plot(path: Path) -> None:
    """How many times faster than dense, by sparsity: Linears of the first batch size, and whole models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = read(path)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, part, label in zip(axes, ("kernels", "end_to_end"), ("block_shape", "arch"), strict=True):
        rows = [row for row in results.get(part, []) if "ratio_to_dense" in row and row.get("merged", 1) == 1]
        rows = [row for row in rows if row["batch"] == rows[0]["batch"] and row["dtype"] == "bfloat16"]
        for name in dict.fromkeys(str(row[label]) for row in rows):
            chosen = [row for row in rows if str(row[label]) == name]
            values = [row.get("ratio_to_graph", row["ratio_to_dense"]) for row in chosen]
            axis.plot([row["sparsity"] for row in chosen], values, "o", label=name)
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(title=part.replace("_", " "), xlabel="blocks removed")
        axis.legend()
    axes[0].set_ylabel("times as fast as dense")
    figure.savefig(path.with_suffix(".png"), dpi=120, bbox_inches="tight")
    pyplot.close(figure)


SECTIONS: dict[str, Callable[[Size, Path], Iterator[Work]]] = {
    "correctness": correctness,
    "kernels": kernels,
    "end_to_end": end_to_end,
    "fit": fit,
}

if __name__ == "__main__":
    main()
