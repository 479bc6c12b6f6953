"""The same budget on two devices: which blocks go, and what the masks of each cost on both.

    python benchmarks/two_devices.py --model MODEL --calibration IMAGES \\
        --output benchmarks/results/two-devices-deit-tiny.json

Divergence is KL(dense || pruned) of the predictions in nats, on calibration images that were not drawn.
"""

import argparse
from pathlib import Path
from typing import Any

import _root  # noqa: F401
from accelerate import Accelerator

from benchmarks.ablation import judges, logits
from benchmarks.timing import save
from hf_blockprune import BlockPruneConfig, BlockPruner
from hf_blockprune.checkpoint.simulation import predict
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from hf_blockprune.model.tasks import SingleLabel
from hf_blockprune.runs.environment import environment

DEVICES = ("cpu-avx512", "systolic-32")


def main() -> None:
    """Prune for each device and cost the result on both."""
    options = parse_options()
    accelerator = Accelerator()
    dense = BlockPruner.from_pretrained(options.model, accelerator=accelerator)
    pixels = judges(dense, options.calibration, options.samples, options.judges, seed=0)
    wanted = logits(dense, pixels)
    whole = {device: predict(dense.model, device, batch=options.batch).latency_ms for device in DEVICES}
    rows: list[dict[str, Any]] = []
    for device in DEVICES:
        pruner = prune(options, device, accelerator)
        each = SingleLabel(wanted.shape[-1]).divergence(wanted, logits(pruner, pixels))
        layers = dict(block_sparse_layers(pruner.model))
        row: dict[str, Any] = {"device": device, "asked": options.ratio, "batch": options.batch}
        for other in DEVICES:
            row[f"of_dense_on_{other}"] = predict(pruner.model, other, batch=options.batch).latency_ms / whole[other]
        row |= {"divergence": float(each.mean()), "flops_ratio": pruner.report()["flops_ratio"]}
        row["density"] = {name: round(layer.density, 3) for name, layer in layers.items()}
        rows.append(row)
        print({key: value for key, value in row.items() if key != "density"}, flush=True)
    save(options.output, {"environment": environment(), "rows": rows})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="dense model: a Hub name or a folder")
    parser.add_argument("--calibration", required=True, help="calibration images, more than are drawn")
    parser.add_argument("--ratio", type=float, default=0.6, help="latency kept")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--judges", type=int, default=256, help="other images to judge on")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def prune(options: argparse.Namespace, device: str, accelerator: Accelerator) -> BlockPruner:
    budget = {"metric": "latency", "ratio": options.ratio, "device": device, "batch": options.batch}
    config = BlockPruneConfig.from_dict(
        {
            "block_shape": [32, 32],
            "budget": budget,
            "calibration": {"samples": options.samples},
            "moves": ["blocks"],
        }
    )
    pruner = BlockPruner.from_pretrained(options.model, config, accelerator=accelerator)
    pruner.prune(options.calibration)
    return pruner


if __name__ == "__main__":
    main()
