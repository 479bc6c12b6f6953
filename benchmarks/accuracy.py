"""Accuracy of pruned models over methods, block shapes and budgets, each point in a process of its own.

    python benchmarks/accuracy.py --model MODEL --calibration IMAGES --evaluation LABELLED_IMAGES \
        --output benchmarks/results/accuracy-deit-tiny.json

Rows that the output file already holds are kept, so an interrupted run goes on where it stopped. With --recover a row
holds the accuracy before (`top1`, ...) and after (`recovered`) of the same model. `evaluation_divergence` is
KL(dense || pruned) of the predictions for the evaluation images in nats, before and, in `recovered`, after.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import _root  # noqa: F401

from benchmarks.ablation import logits
from benchmarks.timing import load, save
from hf_blockprune import BlockPruner
from hf_blockprune.data.batches import load_images, load_pixels
from hf_blockprune.model.tasks import SingleLabel
from hf_blockprune.runs.environment import environment

POINT = ("method", "block_shape", "budget", "seed", "samples")
KEYS = (*POINT, "moves", "tokens")
UNSAID = {"moves": "blocks", "tokens": "keep"}  # in rows that do not say


def main() -> None:
    """Measure every point that is not in the output file yet."""
    options = parse_options()
    results = load(options.output)
    for method, shape, budget in product(options.methods, options.block_shapes, options.budgets):
        point: dict[str, Any] = {
            "method": method,
            "block_shape": shape,
            "budget": f"flops={budget}",
            "seed": options.seed,
            "samples": options.samples,
            "moves": options.moves,
            "tokens": options.tokens,
        }
        same = [row for row in results["rows"] if all(row.get(key, UNSAID.get(key)) == point[key] for key in KEYS)]
        if any(row.get("recovered") or not options.recover for row in same):
            continue
        row = measure(point, options)
        results["rows"] = [row for row in results["rows"] if row not in same] + [row]
        results["environment"] = environment()
        save(options.output, results)
        after = f", recovered {row['recovered']['top1']:.4f}" if row.get("recovered") else ""
        print(
            f"{method} {shape} {options.moves}, tokens {options.tokens}, {budget}: "
            f"top-1 {row['top1']:.4f}{after} (dense {row['baseline_top1']:.4f})",
            flush=True,
        )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="dense model: a Hub name or a folder")
    parser.add_argument("--calibration", required=True, help="calibration images")
    parser.add_argument("--evaluation", required=True, help="labelled images that nothing was chosen on")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "taylor"])
    parser.add_argument("--block-shapes", nargs="+", default=["16x16"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.9, 0.75, 0.5])
    parser.add_argument("--moves", default=UNSAID["moves"], help="what may leave, such as blocks,units,heads, or none")
    parser.add_argument("--tokens", default=UNSAID["tokens"], help="auto, keep, or patches that leave each layer")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recover", action="store_true", help="also recover, and measure before and after")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write or go on with")
    return parser.parse_args()


def measure(point: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Prune and evaluate in a new process, and recover in another; with the times and peak memory of the commands."""
    images = ["--dataset", options.calibration, "--evaluate-on", options.evaluation]
    settings = [part for name in KEYS for part in (f"--{name.replace('_', '-')}", str(point[name]))]
    with tempfile.TemporaryDirectory() as folder:
        pruned, recovered = f"{folder}/pruned", f"{folder}/recovered"
        report, used = run("prune", options.model, *images, *settings, "--output", pruned)
        distance = divergence(pruned, options.model, options.evaluation)
        after = recover(pruned, recovered, images, options) if options.recover else None
    command = shlex.join(["blockprune", "prune", options.model, *images, *settings])
    return {
        **point,
        **{key: report["evaluation"].get(key) for key in ACCURACY},
        "evaluation_divergence": distance,
        "recovered": after,
        **{key: report[key] for key in ("flops_ratio", "linear_flops_ratio", "density", "size_bytes", "seconds")},
        "schedule": report["tokens"] and report["tokens"]["leave"],
        "trials": report["tokens"] and report["tokens"]["trials"],
        **used,
        "cpu": environment()["cpu"],
        "command": command.replace(str(Path(options.model).parents[1]), "$SHARED"),
    }


def recover(pruned: str, output: str, images: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """What `blockprune recover` makes of the pruned model in `pruned`."""
    report, used = run("recover", pruned, "--teacher", options.model, *images, "--output", output)
    return {
        **{key: report["evaluation"].get(key) for key in ACCURACY},
        **{key: report["recovery"][key] for key in ("num_images", "divergence", "kept", "settings")},
        "evaluation_divergence": divergence(output, options.model, options.evaluation),
        **used,
    }


def run(*arguments: str) -> tuple[dict[str, Any], dict[str, float]]:
    """A command in a process of its own: its report, and what the process used."""
    with tempfile.TemporaryFile("w+") as out:
        start = time.perf_counter()
        command = [sys.executable, "-m", "hf_blockprune.cli", *arguments, "--quiet", "--json"]
        process = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"failed: blockprune {shlex.join(arguments)}")
        out.seek(0)
        return json.load(out), {
            "wall_seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_memory_bytes": usage.ru_maxrss * 1024,
        }


def divergence(pruned: str, dense: str, images: str) -> float:
    """KL(dense || pruned) in nats, the mean over images."""
    models = [BlockPruner.from_pretrained(name) for name in (dense, pruned)]
    processor, accelerator, config = models[0].processor, models[0].accelerator, models[0].model.config
    pixels, _ = load_pixels(load_images(images), processor, accelerator=accelerator, model_config=config)
    wanted, have = (logits(pruner, pixels) for pruner in models)
    return float(SingleLabel(wanted.shape[-1]).divergence(wanted, have).mean())


ACCURACY = (
    "top1",
    "top5",
    "num_images",
    "baseline_top1",
    "delta",
    "interval",
    "flipped_to_wrong",
    "flipped_to_right",
)

if __name__ == "__main__":
    main()
