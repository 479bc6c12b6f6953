"""Small models of which little was removed, beside their dense ones: none of them may be slower.

    python benchmarks/small_models.py               # about five minutes; writes benchmarks/results/small-<name>.json

Blocks lie at random places, so that 8x8 blocks share strips with almost everything: pruned models have more order. One
thread, as threads of a small product wait for each other wherever another process wants a core.
"""

import argparse
from itertools import product
from typing import Any

import _root  # noqa: F401
import torch
from transformers.utils import logging

from benchmarks.end_to_end import random_pair
from benchmarks.timing import device_file, store
from hf_blockprune._cpu.library import find_library
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from hf_blockprune.measure.stopwatch import by_turns, median, ratio

# The model of `blockprune demo`, and DeiT-Ti: changes of the latter, and the pixels of a side.
MODELS: dict[str, tuple[dict[str, int], int]] = {
    "demo": (
        {
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "intermediate_size": 512,
            "image_size": 32,
            "patch_size": 8,
        },
        32,
    ),
    "deit-tiny": ({}, 224),
}
BLOCK_SHAPES = ((8, 8), (16, 16), (32, 32))
SPARSITIES = (0.1, 0.3, 0.5)
BATCHES = (1, 8)


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="about how long each row takes to time")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    path = device_file("cpu")
    library, _ = find_library()
    isa = "no-kernels" if library is None else library.isa
    path = path.with_name(f"{path.stem.replace('cpu-', 'small-', 1)}-{isa}.json")
    cases = product(MODELS, BLOCK_SHAPES, SPARSITIES, BATCHES)
    rows = [{**measure(*case, seconds=options.seconds), "kernels": isa} for case in cases]
    store(path, "end_to_end", rows)


@torch.inference_mode()
def measure(name: str, shape: tuple[int, int], sparsity: float, batch: int, *, seconds: float) -> dict[str, Any]:
    changes, side = MODELS[name]
    dense, sparse = random_pair("deit-tiny", shape, sparsity, **changes)
    pixels = torch.randn(batch, 3, side, side)
    times = by_turns(
        {"dense": lambda: dense(pixel_values=pixels), "sparse": lambda: sparse(pixel_values=pixels)}, seconds=seconds
    )
    row: dict[str, Any] = {"arch": name, "op": "model", "batch": batch, "m": None, "k": None, "n": None}
    row |= {"block_shape": list(shape), "sparsity": sparsity, "dtype": "float32"}
    row["ratio_to_dense"], row["ratio_spread"] = ratio(times, "dense", "sparse")
    row |= {f"{key}_ms": median(values) for key, values in times.items()}
    row["unpacked"] = sum(layer.is_unpacked for _, layer in block_sparse_layers(sparse))
    print(name, batch, shape, sparsity, row["ratio_to_dense"], row["ratio_spread"], flush=True)
    return row


if __name__ == "__main__":
    main()
