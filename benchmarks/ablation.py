"""What each part of `obs` brings: one part switched off at a time, judged on calibration images that were not drawn.

    python benchmarks/ablation.py --model MODEL --calibration IMAGES --output benchmarks/results/ablation-deit-tiny.json
    python benchmarks/ablation.py --of moves --model MODEL --calibration IMAGES \
        --output benchmarks/results/ablation-moves-deit-tiny.json

Divergence is KL(dense || pruned) of the predictions in nats, agreement the share of images on which both name the same
class. Rows that the output file already holds are kept. A budget that a variant cannot meet is noted in its row.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.timing import load, save
from hf_blockprune import BlockPruneConfig, BlockPruner
from hf_blockprune.calibration.shared import SharedCalibration
from hf_blockprune.data.batches import load_images, load_pixels
from hf_blockprune.errors import BudgetError
from hf_blockprune.model.tasks import SingleLabel
from hf_blockprune.runs.environment import environment

PARTS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "magnitude + refit": {"method": "magnitude", "refit": True},
    "taylor": {"method": "taylor"},
    "taylor + refit": {"method": "taylor", "refit": True},
    "obs": {},
    "obs without permutations": {"permute": False},
    "obs without coupling": {"coupling_rounds": 0},
    "obs without true losses": {"true_loss_rounds": 0},
    "obs without refit": {"refit": False},
    "obs without residual-stream targets": {"residual_targets": False},
    "obs without token weights": {"token_weights": 0.0},
    "obs with ten times the damping": {"damping": 0.1},
    "obs with a tenth of the damping": {"damping": 0.001},
}
# Each move and each pair switched off.
MOVES: dict[str, dict[str, Any]] = {
    "blocks, units and heads": {},
    "units and heads": {"moves": ("units", "heads")},
    "blocks and heads": {"moves": ("blocks", "heads")},
    "blocks and units": {"moves": ("blocks", "units")},
    "heads": {"moves": ("heads",)},
    "units": {"moves": ("units",)},
    "blocks": {"moves": ("blocks",)},
    "blocks, heads rotated": {"moves": ("blocks",), "rotate": True},
    "blocks, units and whole heads, not rotated": {"rotate": False},
}
# What was measured before there were other moves is of blocks alone.
VARIANTS = {"parts": {name: {"moves": ("blocks",), **changes} for name, changes in PARTS.items()}, "moves": MOVES}
IMAGES_AT_ONCE = 32


def main() -> None:
    """Measure every variant that is not in the output file yet."""
    options = parse_options()
    results, shared = load(options.output), SharedCalibration()
    accelerator = Accelerator()
    dense = BlockPruner.from_pretrained(options.model, accelerator=accelerator)
    pixels = judges(dense, options.calibration, options.samples, options.judges, options.seed)
    wanted = logits(dense, pixels)
    for name, changes in VARIANTS[options.of].items():
        point: dict[str, Any] = {
            "variant": name,
            "block_shape": options.block_shape,
            "budget": f"flops={options.budget}",
        }
        point |= {"budget": f"flops={options.budget}", "samples": options.samples, "seed": options.seed}
        if any(point.items() <= row.items() for row in results["rows"]):
            continue
        config = BlockPruneConfig(
            block_shape=tuple(int(size) for size in options.block_shape.split("x")),  # type: ignore[arg-type]
            budget={"metric": "flops", "ratio": options.budget},  # type: ignore[arg-type]
            calibration={"samples": options.samples, "seed": options.seed},  # type: ignore[arg-type]
            **changes,
        )
        try:
            row = {**point, "changes": changes, **measure(options, config, shared, pixels, wanted)}
            told = f"divergence {row['divergence']:.4f}, agreement {row['agreement']:.3f}"
        except BudgetError as error:
            row, told = {**point, "changes": changes, "refused": str(error)}, str(error)
        results["rows"].append(row)
        results["environment"] = environment()
        save(options.output, results)
        print(f"{name}: {told}", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="dense model: a Hub name or a folder")
    parser.add_argument("--calibration", required=True, help="calibration images, more than are drawn")
    parser.add_argument("--of", choices=list(VARIANTS), default="parts", help="what is switched off")
    parser.add_argument("--block-shape", default="16x16")
    parser.add_argument("--budget", type=float, default=0.75, help="FLOPs kept")
    parser.add_argument("--samples", type=int, default=512, help="images to calibrate on")
    parser.add_argument("--judges", type=int, default=488, help="other images to judge on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write or go on with")
    return parser.parse_args()


def measure(
    options: argparse.Namespace, config: BlockPruneConfig, shared: SharedCalibration, pixels: Tensor, wanted: Tensor
) -> dict[str, Any]:
    accelerator = Accelerator()
    pruner = BlockPruner.from_pretrained(options.model, config, accelerator=accelerator)
    start = time.perf_counter()
    pruner.prune(options.calibration, shared=shared)
    seconds = time.perf_counter() - start
    have = logits(pruner, pixels)
    each = SingleLabel(wanted.shape[-1]).divergence(wanted, have)
    report = pruner.report()
    return {
        "divergence": float(each.mean()),
        "standard_error": float(each.std() / len(each) ** 0.5),
        "agreement": float((have.argmax(-1) == wanted.argmax(-1)).float().mean()),
        "num_images": len(each),
        "flops_ratio": report["flops_ratio"],
        "seconds": {**report["seconds"], "all": round(seconds, 1)},
    }


def judges(dense: BlockPruner, calibration: str, samples: int, count: int, seed: int) -> Tensor:
    """Pixels of calibration images other than the `samples` that pruning draws."""
    images = load_images(calibration).sample(samples + count, seed)
    options = {"accelerator": dense.accelerator, "model_config": dense.model.config}
    return load_pixels(images, dense.processor, **options)[0][samples:]


@torch.no_grad()
def logits(pruner: BlockPruner, pixels: Tensor) -> Tensor:
    """Of all images, in double precision [images, classes]."""
    device = pruner.accelerator.device
    pruner.model.to(device).eval()
    parts = [pruner.model(pixel_values=p.to(device).float()).logits.cpu() for p in pixels.split(IMAGES_AT_ONCE)]
    return torch.cat(parts).double()


if __name__ == "__main__":
    main()
