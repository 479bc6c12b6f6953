"""Accuracy of other one-shot methods that shrink a model in closed form, in the harness of `accuracy.py`.

    python benchmarks/baselines.py --model MODEL --calibration IMAGES --evaluation LABELLED_IMAGES \
        --output benchmarks/results/baselines-deit-tiny.json

Calibration images are those that `blockprune prune` draws with the same seed. What a method leaves open is chosen by
KL(dense || pruned) on every eighth of them, one setting after the other, with the moments of the others; the moments of
all make the final model. Each point has a process of its own, and rows that the output file already holds are kept.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import _root  # noqa: F401
import torch
from torch import Tensor, nn

from benchmarks import corp, dvbp
from benchmarks.accuracy import ACCURACY, POINT
from benchmarks.moments import IMAGES_AT_ONCE, collect
from benchmarks.timing import load, save
from hf_blockprune import BlockPruner
from hf_blockprune.cost.flops import ModelFlops, count_flops
from hf_blockprune.data.batches import load_images, load_pixels
from hf_blockprune.data.model_input import find_input, picture_size
from hf_blockprune.model.layers import linear_in
from hf_blockprune.model.structure import TransformerLayer, find_transformer_layers
from hf_blockprune.model.tasks import SingleLabel
from hf_blockprune.refit.boundary import HELD_BACK_EVERY
from hf_blockprune.runs.environment import environment
from hf_blockprune.runs.timing import timed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS: dict[str, ModuleType] = {"corp": corp, "dvbp-ob2c": dvbp}


def main() -> None:
    """Measure every point that is not in the output file yet."""
    options = parse_options()
    if options.row:
        print(json.dumps(measure(options.methods[0], options.budgets[0], options)))
        return
    results = load(options.output)
    for method, budget in product(options.methods, options.budgets):
        point = dict(zip(POINT, (method, None, f"flops={budget}", options.seed, options.samples), strict=True))
        if any(point.items() <= row.items() for row in results["rows"]):
            continue
        row = {**point, **measured_apart(method, budget)}
        results["rows"].append(row)
        results["environment"] = environment()
        save(options.output, results)
        print(f"{method} {budget}: top-1 {row['top1']:.4f} (dense {row['baseline_top1']:.4f})", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="dense model: a folder")
    parser.add_argument("--calibration", required=True, help="calibration images")
    parser.add_argument("--evaluation", required=True, help="labelled images that nothing was chosen on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.75, 0.6, 0.5])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write or go on with")
    parser.add_argument("--row", action="store_true", help="measure the first point in this process and print it")
    return parser.parse_args()


def measured_apart(method: str, budget: float) -> dict[str, Any]:
    """`measure` in a new process; its time and peak memory are those of all of it."""
    own = ["--methods", method, "--budgets", str(budget), "--row"]
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], *own], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"failed: {method} at {budget}")
    return {
        **json.loads(printed[-1]),
        "wall_seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }


def measure(method: str, budget: float, options: argparse.Namespace) -> dict[str, Any]:
    """What one point adds to its row."""
    seconds: dict[str, float] = {}
    dense = BlockPruner.from_pretrained(options.model)
    model = dense.model.eval()
    layers = layers_of(model)
    size = picture_size(model, dense.processor)
    flops = count_flops(model, size)
    with timed(seconds, "calibration"):
        fit, held = calibration_pixels(dense, options)
        fitting, judging = (collect(model, layers, part, heads=METHODS[method].HEADS) for part in (fit, held))
    with timed(seconds, "choice"):
        asked = (budget * flops.total, size)
        settings, tried = choose(METHODS[method], (model, layers, fitting, *asked), held)
    with timed(seconds, "pruning"):
        moments = [one + other for one, other in zip(fitting, judging, strict=True)]
        pruned = METHODS[method].prune(model, layers, moments, *asked, settings)
    after = count_flops(pruned, size)
    pruner = BlockPruner(pruned, dense.processor, name=dense.name, accelerator=dense.accelerator)
    found = pruner.evaluate(options.evaluation, against=dense.predictions(options.evaluation)).to_dict()
    return {
        **{key: found[key] for key in ACCURACY},
        "recovered": None,
        "flops_ratio": after.total / flops.total,
        "linear_flops_ratio": linear_flops(pruned, after, layers) / linear_flops(model, flops, layers),
        "parameters_ratio": after.parameters / flops.parameters,
        "settings": settings,
        "tried": tried,
        "units": [linear_in(pruned, layer.fc1).out_features for layer in layers],
        "dimensions": [linear_in(pruned, layer.query).out_features // layer.heads for layer in layers],
        "seconds": seconds,
        "cpu": environment()["cpu"],
        "command": command(method, budget, options),
    }


def layers_of(model: "PreTrainedModel") -> list[TransformerLayer]:
    """A ViT's layers."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not (layers := find_transformer_layers(model, linears)):
        raise SystemExit(f"{type(model).__name__}: its layers are not of ViT's form")
    return layers


def calibration_pixels(dense: BlockPruner, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Of the images that pruning draws, pixels [images, channels, height, width]: (of most, of those that choose)."""
    images = replace(
        load_images(options.calibration, labels=False), model_input=find_input(dense.model, dense.processor)
    )
    drawn = images.sample(options.samples, options.seed)
    settings = {"accelerator": dense.accelerator, "model_config": dense.model.config}
    pixels, index = load_pixels(drawn, dense.processor, **settings)
    held_back = index % HELD_BACK_EVERY == HELD_BACK_EVERY - 1
    return pixels[~held_back], pixels[held_back]


def choose(
    method: ModuleType, arguments: tuple[Any, ...], pixels: Tensor
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings that do best, and what was tried.

    Args:
        method: one of `METHODS`.
        arguments: of its `prune`, without settings.
        pixels: of images that its moments have not seen.
    """
    wanted = logits(arguments[0], pixels)
    best = {key: values[0] for key, values in method.CHOICES.items()}
    tried: list[dict[str, Any]] = []
    for key, values in method.CHOICES.items():
        for value in values:
            settings = {**best, key: value}
            if any(row["settings"] == settings for row in tried):
                continue
            try:
                have = logits(method.prune(*arguments, settings), pixels)
            except ValueError:  # the budget is out of reach so
                continue
            divergence = float(SingleLabel(wanted.shape[-1]).divergence(wanted, have).mean())
            tried.append({"settings": settings, "divergence": divergence})
        if not tried:
            raise SystemExit(f"the budget is out of reach with any {key} of {values}")
        best = min(tried, key=lambda row: row["divergence"])["settings"]
    return best, tried


@torch.inference_mode()
def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """Of all images, in double precision [images, classes]."""
    return torch.cat([model(pixel_values=part.float()).logits for part in pixels.split(IMAGES_AT_ONCE)]).double()


def linear_flops(model: nn.Module, flops: ModelFlops, layers: list[TransformerLayer]) -> float:
    """FLOPs of the layers' Linears."""
    found = ((flops.linear_tokens[name], linear_in(model, name)) for layer in layers for name in layer.names())
    return sum(2 * tokens * linear.in_features * linear.out_features for tokens, linear in found)


def command(method: str, budget: float, options: argparse.Namespace) -> str:
    """What measures this point alone, without this machine's folders."""
    arguments = ["python", "benchmarks/baselines.py", "--model", options.model, "--calibration", options.calibration]
    arguments += ["--evaluation", options.evaluation, "--methods", method, "--budgets", str(budget)]
    arguments += ["--samples", str(options.samples), "--seed", str(options.seed), "--output", "OUT"]
    return shlex.join(arguments).replace(str(Path(options.model).parents[1]), "$SHARED")


if __name__ == "__main__":
    main()
