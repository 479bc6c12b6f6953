"""Time of work on a device, waiting for what was handed to a GPU."""

import time
from collections.abc import Callable
from typing import Any

import torch


def milliseconds(run: Callable[[], Any], device: torch.device | str) -> float:
    """How long a call takes from start to end; work that the device had before is waited for first."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)
