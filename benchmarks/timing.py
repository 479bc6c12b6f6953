"""Timing by turns: every contestant once a round, so that what disturbs the machine disturbs all of them."""

import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_blockprune.environment import environment

RESULTS = Path(__file__).parent / "results"
# What tells rows of a result file apart.
KEYS = ("arch", "op", "batch", "m", "k", "n", "block_shape", "sparsity", "dtype")


def by_turns(
    contestants: dict[str, Callable[[], Any]], *, seconds: float, rounds: int = 5, device: str = "cpu"
) -> dict[str, list[float]]:
    """Milliseconds of every call, by contestant.

    On a GPU these are its own, between two events; before each call its L2 cache is overwritten, as by the rest of a
    model.

    Args:
        contestants: functions by name.
        seconds: about how long to go on.
        rounds: at least.
        device: "cpu" or "cuda".
    """
    for run in contestants.values():  # caches, packing, compilation
        run()
        run()
    timed = _on_gpu() if device == "cuda" else _on_cpu
    times: dict[str, list[float]] = {name: [] for name in contestants}
    start = time.perf_counter()
    while min(map(len, times.values())) < rounds or time.perf_counter() - start < seconds:
        for name, run in contestants.items():
            times[name].append(timed(run))
    return times


def _on_cpu(run: Callable[[], Any]) -> float:
    before = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - before)


def _on_gpu() -> Callable[[Callable[[], Any]], float]:
    cache = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")

    def timed(run: Callable[[], Any]) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    return timed


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


def ratio(times: dict[str, list[float]], over: str, under: str) -> tuple[float, list[float]]:
    """(median, first and third quartile) of how many times faster `under` was than `over`, round by round."""
    ratios = [a / b for a, b in zip(times[over], times[under], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return round(quartiles[1], 3), [round(quartiles[0], 3), round(quartiles[2], 3)]


def median(times: list[float]) -> float:
    """Rounded to a tenth of a microsecond."""
    return round(statistics.median(times), 4)


def device_file(device: str) -> Path:
    """The result file of this machine's processor or GPU."""
    found = environment()
    name = found["gpu"] if device == "cuda" else found["cpu"]
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


def random_mask(grid: tuple[int, int], sparsity: float, generator: torch.Generator) -> torch.Tensor:
    """Bool [block_rows, block_cols] with exactly so many blocks removed, anywhere."""
    blocks = grid[0] * grid[1]
    return (torch.randperm(blocks, generator=generator) >= round(sparsity * blocks)).view(grid)
