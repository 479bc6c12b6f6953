"""Where a speed-up of 3.93 on dedicated hardware can come from: DeiT-B's Linears on a systolic array, part by part.

    python benchmarks/systolic_study.py     # writes benchmarks/results/systolic-study.json and docs/systolic.png

Blocks have the array's size and are kept at random, seed 0. Nothing here is measured: cycles follow from the closed
forms that the tests hold against SCALE-Sim's counts and against arrays simulated cycle by cycle.
"""

import json
import time
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from hf_blockprune.hub.blockprune_systolic import block_sparse_cycles, dense_cycles

ROOT = Path(__file__).parents[1]
SIZE = 32
RESULTS = ROOT / "benchmarks/results/systolic-study.json"
LINEARS = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]  # out x in, of each of the twelve layers
LAYERS = 12
TOKENS, ALIGNED = 197, 192
HEADS, HEAD_WIDTH = 12, 64
# Changes to the whole recipe, one at a time: 29 % of the FLOPs of the Linears, output-stationary, overlapped, aligned.
RECIPE = {"density": 0.29, "dataflow": "os", "overlap": True, "tokens": ALIGNED, "balanced": True, "block": SIZE}
VARIANTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "50 % of the FLOPs": {"density": 0.5},
    "no overlap": {"overlap": False},
    "197 tokens": {"tokens": TOKENS},
    "rows not balanced, 4 arrays": {"balanced": False, "arrays": 4},
    "balanced, 4 arrays": {"arrays": 4},
    "blocks of 16x16": {"block": 16, "balanced": False},
    "blocks of 64x64": {"block": 64, "balanced": False},
    "weights stationary": {"dataflow": "ws"},
    "inputs stationary": {"dataflow": "is"},
    "50 % of the FLOPs, blocks alone": {"density": 0.5, "tokens": TOKENS},
    "29 % of the FLOPs, blocks alone": {"tokens": TOKENS},
}


def main() -> None:
    """Write results and picture."""
    rows = [row(name, {**RECIPE, **changes}) for name, changes in VARIANTS.items()]
    text = ",\n".join(map(json.dumps, rows))  # a line a row, so that a changed row is a changed line
    RESULTS.write_text(f'{{"array": {SIZE}, "rows": [\n{text}\n]}}\n')
    plot(rows)
    for each in rows:
        print(f"{each['variant']:34} {each['linear_speedup']:.2f} {each['speedup']:.2f} {each['analysis_seconds']} s")


def row(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Speed-ups over the dense model with all of its 197 tokens, on the same array."""
    options = {"rows": SIZE, "cols": SIZE, "dataflow": case["dataflow"], "overlap": case["overlap"]}
    options["arrays"] = case.get("arrays", 1)
    found, block_shape = masks(case), (case["block"], case["block"])
    start = time.perf_counter()
    pruned = sum(block_sparse_cycles(case["tokens"], mask, block_shape=block_shape, **options) for mask in found)
    seconds = time.perf_counter() - start
    dense = LAYERS * sum(dense_cycles(TOKENS, k, n, **options) for n, k in LINEARS)
    others, dense_others = attention(case["tokens"], options), attention(TOKENS, options)
    return {
        "variant": name,
        **case,
        "kept": sum(int(mask.sum()) for mask in found) * case["block"] ** 2 / (LAYERS * sum(n * k for n, k in LINEARS)),
        "cycles": pruned,
        "dense_cycles": dense,
        "linear_speedup": dense / pruned,
        "speedup": (dense + dense_others) / (pruned + others),
        "analysis_seconds": round(seconds, 2),
    }


def masks(case: dict[str, Any]) -> list[np.ndarray]:
    """A mask for each Linear of the model."""
    random, found = np.random.default_rng(0), []
    for n, k in LINEARS * LAYERS:
        down, across = n // case["block"], k // case["block"]
        if case["balanced"]:
            order = random.permuted(np.tile(np.arange(across), (down, 1)), axis=1)
            found.append(order < round(case["density"] * across))
        else:
            order = random.permutation(down * across).reshape(down, across)
            found.append(order < round(case["density"] * down * across))
    return found


def attention(tokens: int, options: dict[str, Any]) -> int:
    """Cycles of the products that pruning leaves alone, of all heads and layers."""
    scores = dense_cycles(tokens, HEAD_WIDTH, tokens, **options)
    values = dense_cycles(tokens, tokens, HEAD_WIDTH, **options)
    return LAYERS * HEADS * (scores + values)


def plot(rows: list[dict[str, Any]]) -> None:
    """Bars of both speed-ups."""
    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    places = np.arange(len(rows))[::-1]
    axis.barh(places + 0.2, [each["linear_speedup"] for each in rows], height=0.4, label="Linears")
    axis.barh(places - 0.2, [each["speedup"] for each in rows], height=0.4, label="with attention products")
    axis.axvline(3.93, color="grey", linestyle="--", linewidth=1)
    axis.text(3.93, len(rows) - 0.4, " 3.93 (LPViT)", color="grey", fontsize=8)
    axis.set(yticks=places, yticklabels=[each["variant"] for each in rows], xlabel="times as fast as dense, 197 tokens")
    axis.legend(loc="upper left", bbox_to_anchor=(0, 1.12), ncols=2, frameon=False)
    figure.savefig(ROOT / "docs/systolic.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
