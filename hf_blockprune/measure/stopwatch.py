"""Time of work on a device, waiting for what was handed to a GPU; and of several by turns, to compare them."""

import statistics
import time
from collections.abc import Callable

import torch


def milliseconds(run: Callable[[], object], device: torch.device | str) -> float:
    """How long a call takes from start to end; work that the device had before is waited for first."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def by_turns(
    contestants: dict[str, Callable[[], object]],
    *,
    seconds: float,
    rounds: int = 5,
    device: str = "cpu",
    on_round: Callable[[float], None] = lambda share: None,
) -> dict[str, list[float]]:
    """Milliseconds of every call, by contestant.

    On a GPU these are its own, between two events; before each call its L2 cache is overwritten, as by the rest of a
    model.

    Args:
        contestants: functions by name.
        seconds: about how long to go on.
        rounds: at least.
        device: "cpu" or "cuda".
        on_round: called after each round, outside of what is timed, with the share of all that is done.
    """
    for run in contestants.values():  # caches, packing, compilation
        run()
        run()
    timed = _on_gpu() if device == "cuda" else _on_cpu
    times: dict[str, list[float]] = {name: [] for name in contestants}
    start, share = time.perf_counter(), 0.0
    while share < 1:
        for name, run in contestants.items():
            times[name].append(timed(run))
        share = share_done(start, seconds, min(map(len, times.values())), rounds)
        on_round(share)
    return times


def share_done(start: float, seconds: float, done: int, rounds: int) -> float:
    """How much of a measurement is over, that goes on for so many seconds and rounds at least."""
    passed = time.perf_counter() - start
    return min(1.0, done / rounds, passed / seconds if seconds else 1.0)


def _on_cpu(run: Callable[[], object]) -> float:
    before = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - before)


def _on_gpu() -> Callable[[Callable[[], object]], float]:
    cache = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")

    def timed(run: Callable[[], object]) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    return timed


def ratio(times: dict[str, list[float]], over: str, under: str) -> tuple[float, list[float]]:
    """(median, first and third quartile) of how many times faster `under` was than `over`, round by round."""
    ratios = [a / b for a, b in zip(times[over], times[under], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return round(quartiles[1], 3), [round(quartiles[0], 3), round(quartiles[2], 3)]


def median(times: list[float]) -> float:
    """Rounded to a tenth of a microsecond."""
    return round(statistics.median(times), 4)
