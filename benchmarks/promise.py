"""How well the hardware model predicts whole models on this CPU: calibrate, then time them at once.

    python benchmarks/promise.py      # about two minutes; writes benchmarks/results/promise-<name>.json

Calibrating and timing are one run, because a machine that is shared runs at another speed an hour later.
"""

import argparse
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import torch
from transformers.utils import logging

from benchmarks.end_to_end import random_pair
from benchmarks.timing import device_file, store
from hf_blockprune.checkpoint.simulation import predict
from hf_blockprune.cost.profiles import save_profile
from hf_blockprune.measure.calibrate import calibrate, rank_correlation
from hf_blockprune.measure.stopwatch import by_turns, median

BLOCK_SHAPE = (32, 32)
CASES = list(product(("deit-base", "deit-small", "deit-tiny"), (0.5, 0.7), (1, 8)))


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long each model takes to time")
    options = parser.parse_args()
    logging.set_verbosity_error()
    profile, measured = calibrate("cpu")
    path = device_file("cpu")
    path = path.with_name(path.name.replace("cpu-", "promise-", 1))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "profile.yaml")
        written = save_profile(profile, file)
        rows = [measure(str(file), *case, seconds=options.seconds) for case in CASES]
    calibrated = {**written, "measurements": len(measured), "rank_correlation": rank_correlation(profile, measured)}
    store(path, "calibration", [calibrated])
    store(path, "end_to_end", rows)


@torch.no_grad()
def measure(profile: str, arch: str, sparsity: float, batch: int, *, seconds: float) -> dict[str, Any]:
    dense, sparse = random_pair(arch, BLOCK_SHAPE, sparsity)
    pixels = torch.randn(batch, 3, 224, 224)
    times = by_turns(
        {"dense": lambda: dense(pixel_values=pixels), "sparse": lambda: sparse(pixel_values=pixels)}, seconds=seconds
    )
    row: dict[str, Any] = {"arch": arch, "op": "model", "batch": batch, "m": 197 * batch, "k": None, "n": None}
    row |= {"block_shape": list(BLOCK_SHAPE), "sparsity": sparsity, "dtype": "float32"}
    for name, model in (("dense", dense), ("sparse", sparse)):
        row[f"{name}_ms"] = median(times[name])
        row[f"{name}_predicted_ms"] = round(predict(model, profile, batch=batch).latency_ms, 4)
        row[f"{name}_error"] = round(row[f"{name}_predicted_ms"] / row[f"{name}_ms"] - 1, 4)
    print(arch, batch, sparsity, {key: row[key] for key in row if key.endswith(("_ms", "error"))}, flush=True)
    return row


if __name__ == "__main__":
    main()
