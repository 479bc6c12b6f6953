"""What benchmarks share: result files, CUDA graphs and random masks."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_blockprune.runs.environment import environment

RESULTS = Path(__file__).parent / "results"
# What tells rows of a result file apart.
KEYS = ("arch", "op", "batch", "m", "k", "n", "block_shape", "sparsity", "dtype", "merged")


def recorded(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The same work as a CUDA graph, so that what Python takes to launch it is not measured; on a CPU, itself."""
    if device != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def device_file(device: str) -> Path:
    """The result file of this machine's processor or GPU."""
    found = environment()
    name = (found["gpu"] or device) if device == "cuda" else found["cpu"]
    return RESULTS / f"{device}-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def store(path: Path, part: str, rows: list[dict[str, Any]]) -> None:
    """Add rows to one part (`kernels`, `end_to_end`) of a device's file, in place of older ones of the same case."""
    results = json.loads(path.read_text()) if path.exists() else {}
    new = [[row.get(key) for key in KEYS] for row in rows]
    old = [row for row in results.get(part, []) if [row.get(key) for key in KEYS] not in new]
    results = {**results, "environment": environment(), part: old + rows}
    partial = path.with_suffix(".partial")
    partial.write_text(
        "{\n" + ",\n".join(f"{json.dumps(key)}: {_text(value)}" for key, value in results.items()) + "\n}\n"
    )
    partial.replace(path)


def _text(value: Any) -> str:
    """JSON with one line a row, so that a changed row is a changed line."""
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"


def load(path: Path) -> dict[str, Any]:
    """A result file of rows, or the beginning of one."""
    return json.loads(path.read_text()) if path.exists() else {"environment": {}, "rows": []}


def save(path: Path, results: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(path)


def random_mask(grid: tuple[int, int], sparsity: float, generator: torch.Generator) -> torch.Tensor:
    """Bool [block_rows, block_cols] with exactly so many blocks removed, anywhere."""
    blocks = grid[0] * grid[1]
    return (torch.randperm(blocks, generator=generator) >= round(sparsity * blocks)).view(grid)
