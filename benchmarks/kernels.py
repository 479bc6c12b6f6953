"""Block-sparse products beside torch's dense Linear, and beside torch's own BSR, in one run.

    python benchmarks/kernels.py --device cpu            # about ten minutes; writes benchmarks/results/cpu-<name>.json
    python benchmarks/kernels.py --quick --json          # under a minute, to standard output, writes nothing

A row's ratio says how many times faster than `F.linear` the block-sparse op is, median over rounds in which each runs
once, with its quartiles. The op is called as a layer calls it, but always with the kernels, also where a model would
fall back to the dense product.
"""

import argparse
import json
import warnings
from itertools import product
from typing import Any

import _root  # noqa: F401
import torch
import torch.nn.functional as F

from benchmarks.timing import device_file, random_mask, recorded, store
from hf_blockprune.hub.blockprune_backends import available_backends
from hf_blockprune.hub.blockprune_layout import grid_shape
from hf_blockprune.hub.blockprune_linear import BlockSparseLinear
from hf_blockprune.hub.blockprune_ops import block_sparse_linear
from hf_blockprune.measure.stopwatch import by_turns, median, ratio
from hf_blockprune.runs.environment import environment

WIDTHS = {"deit-tiny": 192, "deit-small": 384, "deit-base": 768}
BLOCK_SHAPES = ((64, 32), (64, 64), (32, 32), (16, 16), (64, 1), (32, 4))
SPARSITIES = (0.0, 0.5, 0.7, 0.8)
TOKENS = (197, 1576)  # one image and eight
BSR_SPARSITIES = (0.5, 0.7)


def main() -> None:
    """Measure every case."""
    options = parse_options()
    torch.manual_seed(0)
    backend = {"cpu": "cpu", "cuda": "triton"}[options.device]
    if backend not in available_backends():
        raise SystemExit(f"no {backend!r} kernels here: {available_backends()}")
    rows = []
    for case in cases(options.arch, quick=options.quick):
        rows.append(measure(case, backend, options.device, seconds=0.1 if options.quick else 0.3))
        if not options.json:
            print(line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps({"environment": environment(), "rows": rows}))
    elif not options.quick:
        store(device_file(options.device), "kernels", rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--arch", nargs="+", choices=WIDTHS, default=list(WIDTHS), help="whose Linears")
    parser.add_argument("--quick", action="store_true", help="few cases, under a minute; writes no file")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output; writes no file")
    return parser.parse_args()


def cases(archs: list[str], *, quick: bool) -> list[dict[str, Any]]:
    """Shapes of each architecture's Linears, block shapes, sparsities and dtypes."""
    archs = archs[-1:] if quick else archs
    tokens = TOKENS[:1] if quick else TOKENS
    shapes = ((32, 32), (16, 16), (64, 1)) if quick else BLOCK_SHAPES
    result = []
    for arch, m in product(archs, tokens):
        width = WIDTHS[arch]
        for (n, k), block_shape, sparsity in product(
            ((width, width), (4 * width, width), (width, 4 * width)), shapes, SPARSITIES
        ):
            case = {"arch": arch, "op": "linear", "m": m, "k": k, "n": n, "block_shape": block_shape}
            result.append({**case, "sparsity": sparsity, "dtype": "float32"})
            if block_shape in ((32, 32), (64, 1)) and arch == "deit-base":
                result.append({**case, "sparsity": sparsity, "dtype": "bfloat16"})
    return result


@torch.inference_mode()
def measure(case: dict[str, Any], backend: str, device: str, *, seconds: float) -> dict[str, Any]:
    dtype = getattr(torch, case["dtype"])
    linear = torch.nn.Linear(case["k"], case["n"], device=device, dtype=dtype)
    grid = grid_shape(case["n"], case["k"], case["block_shape"])
    mask = random_mask(grid, case["sparsity"], torch.Generator().manual_seed(0))
    with torch.inference_mode(False):
        sparse = BlockSparseLinear.from_dense(linear, mask, case["block_shape"]).requires_grad_(False)
    x = torch.randn(case["m"], case["k"], device=device, dtype=dtype)
    weights = sparse.weight, sparse.crow_indices, sparse.col_indices, sparse.bias
    contestants = {
        "dense": lambda: F.linear(x, linear.weight, linear.bias),
        "sparse": lambda: block_sparse_linear(x, *weights, out_features=case["n"], backend=backend),
    }
    contestants = {name: recorded(run, device) for name, run in contestants.items()}
    times = by_turns(contestants, seconds=seconds, device=device)
    faster, spread = ratio(times, "dense", "sparse")
    row = {
        **case,
        "block_shape": list(case["block_shape"]),
        "ratio_to_dense": faster,
        "ratio_spread": spread,
        "dense_ms": median(times["dense"]),
        "sparse_ms": median(times["sparse"]),
    }
    square = case["block_shape"] in ((32, 32), (16, 16))
    if device == "cpu" and case["dtype"] == "float32" and square and case["sparsity"] in BSR_SPARSITIES:
        # In rounds of its own: it takes so long that it would leave cold caches and sleeping threads to the others.
        bsr = torch_bsr(sparse)
        contestants = {"dense": contestants["dense"], "bsr": lambda: F.linear(x, bsr, linear.bias)}
        row["torch_bsr_ratio_to_dense"] = ratio(by_turns(contestants, seconds=seconds / 2), "dense", "bsr")[0]
    return row


def torch_bsr(layer: BlockSparseLinear) -> torch.Tensor:
    """The same matrix in torch's own block-sparse format."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its BSR support a beta state
        return layer.to_dense().weight.detach().to_sparse_bsr(layer.block_shape)


def line(row: dict[str, Any]) -> str:
    low, high = row["ratio_spread"]
    bsr = f", torch BSR {row['torch_bsr_ratio_to_dense']:.2f}" if "torch_bsr_ratio_to_dense" in row else ""
    return (
        f"{row['arch']} {row['dtype']} {row['m']} x {row['n']}x{row['k']}, {'x'.join(map(str, row['block_shape']))}, "
        f"{row['sparsity']:.0%} removed: {row['ratio_to_dense']:.2f} ({low:.2f} to {high:.2f}), "
        f"dense {row['dense_ms']:.3f} ms{bsr}"
    )


if __name__ == "__main__":
    main()
