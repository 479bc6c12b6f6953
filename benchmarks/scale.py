"""What `obs` takes on a larger model: its pipeline on one, two and three layers of it, extrapolated to all.

    python benchmarks/scale.py --model MODEL --calibration IMAGES --output benchmarks/results/scale-cpu.json

Layers have random weights and the full width; the work hardly depends on their values. Every stage takes a constant and
so much for each layer, but for true losses, which run the whole model for each pair of Linears and so grow with the
square as well. `benchmarks/accuracy.py` measures the whole of DeiT-Ti, which tells how well this extrapolates.
"""

import argparse
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the processes that measure inherit the path
    import _root  # noqa: F401
import numpy as np
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from benchmarks.timing import load, save
from hf_blockprune import BlockPruneConfig, BlockPruner
from hf_blockprune.runs.environment import environment

WIDTHS = {"deit-tiny": (192, 3), "deit-small": (384, 6), "deit-base": (768, 12)}
MEASURED_LAYERS = (1, 2, 3)
LAYERS = 12
# Width, width of the MLP, layers, images a side over the patch's, of ViTs that are estimated from DeiT-B.
LARGER = {
    "vit-large-patch16": (1024, 4096, 24, 14),
    "vit-huge-patch14": (1280, 5120, 32, 16),
    "vit-giant-patch14": (1408, 6144, 40, 16),
}
BASE = (768, 3072, LAYERS, 14)


def main() -> None:
    """Measure what is not in the output file yet, and extrapolate from all that is."""
    options = parse_options()
    results = load(options.output)
    points = results.setdefault("points", [])
    for arch in options.archs:
        point = {"arch": arch, "block_shape": options.block_shape, "images": options.samples}
        for layers in options.layers:
            if not any({**point, "layers": layers}.items() <= row.items() for row in points):
                points.append({**point, **measure(options, arch, layers)})
                results["environment"] = environment()
                save(options.output, results)
    results["rows"] = [extrapolate(arch, points) for arch in options.archs]
    base = [row for row in results["rows"] if row["arch"] == "deit-base"]
    results["estimates"] = [estimate(name, row) for row in base for name in LARGER]
    save(options.output, results)
    for row in results["rows"]:
        print(f"{row['arch']}: {row['all_seconds']:.0f} s, {row['peak_memory_bytes'] / 1e9:.1f} GB", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a ViT or DeiT, for its config and image processor")
    parser.add_argument("--calibration", required=True, help="calibration images")
    parser.add_argument("--archs", nargs="+", choices=WIDTHS, default=["deit-tiny", "deit-base"])
    parser.add_argument(
        "--layers", nargs="+", type=int, default=MEASURED_LAYERS, help="how many to measure, each alone"
    )
    parser.add_argument("--block-shape", default="16x16")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write or go on with")
    return parser.parse_args()


def measure(options: argparse.Namespace, arch: str, layers: int) -> dict[str, Any]:
    """Prune so many layers of an architecture, in a process of its own for its peak memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(prune, options, arch, layers).result()


def prune(options: argparse.Namespace, arch: str, layers: int) -> dict[str, Any]:
    width, heads = WIDTHS[arch]
    config = AutoConfig.from_pretrained(
        options.model,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
    )
    model = AutoModelForImageClassification.from_config(config).eval()
    rows, cols = (int(size) for size in options.block_shape.split("x"))
    settings = BlockPruneConfig.from_dict(
        {
            "block_shape": [rows, cols],
            "budget": {"metric": "density", "ratio": 0.7},
            "calibration": {"samples": options.samples},
            "moves": ["blocks"],
        }
    )
    pruner = BlockPruner(model, AutoImageProcessor.from_pretrained(options.model), settings, name=arch)
    pruner.prune(options.calibration)
    return {
        "layers": layers,
        "seconds": pruner.report()["seconds"],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def extrapolate(arch: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Least squares through what was measured of an architecture, at all layers."""
    measured = [point for point in points if point["arch"] == arch]
    layers = [row["layers"] for row in measured]
    seconds = {}
    for stage in measured[0]["seconds"]:
        powers = (1, 2) if stage == "true losses" else (0, 1)
        seconds[stage] = round(fit(layers, [row["seconds"][stage] for row in measured], powers), 1)
    memory = fit(layers, [row["peak_memory_bytes"] for row in measured], (0, 1))
    return {
        **{key: measured[0][key] for key in ("arch", "block_shape", "images")},
        "layers_measured": layers,
        "seconds": seconds,
        "all_seconds": round(sum(seconds.values()), 1),
        "peak_memory_bytes": round(memory),
    }


def estimate(name: str, base: dict[str, Any]) -> dict[str, Any]:
    """What a larger ViT takes on the same machine, each stage of DeiT-B's multiplied by what its work grows with.

    Removal traces go through in_features / cols steps for each block row, whose work grows with in_features^2. True
    losses run the whole model once for each pair of Linears.
    """
    size = LARGER[name]
    forward, traces = (work(size) / work(BASE) for work in (_forward, _traces))
    growth = {"saliency": traces, "allocation": traces, "true losses": forward * size[2] / LAYERS}
    seconds = {stage: round(value * growth.get(stage, forward)) for stage, value in base["seconds"].items()}
    more = _kept_bytes(size, base["images"]) - _kept_bytes(BASE, base["images"])
    return {
        "arch": name,
        "block_shape": base["block_shape"],
        "images": base["images"],
        "seconds": seconds,
        "all_seconds": sum(seconds.values()),
        "peak_memory_bytes": base["peak_memory_bytes"] + more,
    }


def _linears(size: tuple[int, int, int, int]) -> list[tuple[int, int]]:
    """(out_features, in_features) of a layer's Linears."""
    width, hidden, _, _ = size
    return [(width, width)] * 4 + [(hidden, width), (width, hidden)]


def _forward(size: tuple[int, int, int, int]) -> float:
    width, _, layers, side = size
    tokens = side * side + 1
    return layers * (sum(2 * tokens * n * k for n, k in _linears(size)) + 4 * tokens * tokens * width)


def _traces(size: tuple[int, int, int, int]) -> float:
    return size[2] * sum(n * k**3 for n, k in _linears(size))


def _kept_bytes(size: tuple[int, int, int, int], images: int) -> int:
    """Weights and two layers' inputs of all images in single precision, second moments in double."""
    width, _, layers, side = size
    weights = layers * sum(4 * n * k + 8 * k * k for n, k in _linears(size))
    return weights + 2 * 4 * images * (side * side + 1) * width


def fit(layers: list[int], values: list[float], powers: tuple[int, int]) -> float:
    """The value at `LAYERS` of the sum of two powers that fits best."""
    terms = np.array([[float(n) ** power for power in powers] for n in layers])
    weights = np.linalg.lstsq(terms, np.array(values), rcond=None)[0]
    return float(weights @ [float(LAYERS) ** power for power in powers])


if __name__ == "__main__":
    main()
