"""The built-in demonstration: a small vision transformer on real images, from training to a pruned model loaded back.

scikit-learn's digits (1797 scans of handwritten digits, 8x8 pixels; Alpaydin and Kaynak, UCI 1998) come with that
package, so nothing is downloaded.
"""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from transformers import ViTConfig, ViTForImageClassification

from ..budget import Budget
from ..checkpoint.folder import CONFIG_FILE, check_output, staged_directory
from ..config import BlockPruneConfig
from ..cost.profiles import load_profile
from ..display.console import folding_table
from ..display.stages import planned, stage
from ..errors import CheckpointError, ModelError
from ..pruner.measuring import evaluation_stages
from ..pruner.pruner import BlockPruner
from ..pruner.pruning import pruning_stages
from ..types import ImageProcessor, JsonDict

if TYPE_CHECKING:
    from datasets import Dataset

EPOCHS = 16
BATCH_SIZE = 16  # many small steps teach it as much as larger ones in half the time
LEARNING_RATE = 4e-4
TRAIN_IMAGES = 1347  # three quarters; the rest measures accuracy

# Runs in a new process that sees the saved folders alone.
_LOAD_AND_TIME = """
import json, sys, time
import torch
import hf_blockprune
from transformers import AutoModelForImageClassification

models = [AutoModelForImageClassification.from_pretrained(folder) for folder in sys.argv[1:3]]
pixels = torch.load(sys.argv[3], weights_only=True)
logits, seconds = [], [[], []]
with torch.inference_mode():
    for repeat in range(30):
        for i, model in enumerate(models):
            start = time.perf_counter()
            output = model(pixel_values=pixels).logits
            seconds[i].append(time.perf_counter() - start)
            if repeat == 0:
                logits.append(output)
print(json.dumps({
    "classes": [type(model).__name__ for model in models],
    "sparse_layers": sum(isinstance(m, hf_blockprune.BlockSparseLinear) for m in models[1].modules()),
    "latency_ms": [1000 * sorted(s)[len(s) // 2] for s in seconds],
    "predictions": [output.argmax(-1).tolist() for output in logits],
}))
"""


class _Loaded(TypedDict):
    """What the new process says of the dense and the pruned model, in this order."""

    classes: list[str]
    sparse_layers: int
    latency_ms: list[float]
    predictions: list[list[int]]


class ModelFigures(TypedDict):
    """Figures of one of both models; `latency_ms` is of 64 images, `top1` a share of the images."""

    top1: float
    size_bytes: int
    kept_blocks: int
    latency_ms: float


class DemoFigures(TypedDict):
    """What the demonstration came to.

    Keys:
        num_images: that accuracy was measured on.
        train_seconds, prune_seconds: that training and pruning took.
        flops_ratio: kept share of the FLOPs.
        evaluation: see `Evaluation.to_dict`.
        loaded_class: of the pruned model in the new process.
        dense, pruned: figures of both models.
    """

    num_images: int
    train_seconds: float
    prune_seconds: float
    flops_ratio: float
    evaluation: JsonDict
    loaded_class: str
    dense: ModelFigures
    pruned: ModelFigures


def run_demo(output: str | Path | None = None, *, budget: Budget | None = None, overwrite: bool = False) -> DemoFigures:
    """Train, prune, save, and load both models back in a new process.

    Args:
        output: keep the dense and the pruned model in this folder; by default they are deleted again.
        budget: what may remain; 75 % of the FLOPs by default.
        overwrite: replace the models of an earlier run in `output`.

    Returns:
        JSON-ready figures of the dense and the pruned model.

    Raises:
        CheckpointError: `output` is a checkpoint itself, holds models and `overwrite` is off, or cannot be written.
        ConfigError: the budget's device is not known.
        ModelError: scikit-learn is missing, or the pruned model does not load back as it was.
    """
    config = BlockPruneConfig(block_shape=(16, 16), budget=budget or Budget("flops", 0.75))
    if config.budget.device is not None:
        load_profile(config.budget.device)
    if output is not None:
        _check_folder(Path(output).expanduser(), overwrite)
    with ExitStack() as stack:
        folder = Path(output).expanduser() if output else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        train, test = _digits()
        later = [*pruning_stages(config), *evaluation_stages(folder), "saving", "loading in a new process"]
        stack.enter_context(planned(["training", *later]))
        start = time.perf_counter()
        model, processor = _train(train)
        train_seconds = time.perf_counter() - start
        dense = folder / "dense"
        with staged_directory(dense, overwrite=overwrite) as staging:
            model.save_pretrained(staging)
            processor.save_pretrained(staging)
        pruner = BlockPruner.from_pretrained(dense, config)
        pruner.prune(train)
        evaluation = pruner.evaluate(test, against=dense)
        pruned = folder / "pruned"
        with stage("saving", aside=True):
            pruner.save_pretrained(pruned, overwrite=overwrite)
        with stage("loading in a new process"):
            loaded = _load_in_new_process(dense, pruned, processor, test)
        _check_loaded(loaded, pruner, processor, test)
        return _figures(pruner.report(), evaluation.to_dict(), loaded, dense, train_seconds)


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder before the training.

    Raises:
        CheckpointError: it is a file or a checkpoint, holds models and `overwrite` is off, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; name a folder")
    if (folder / CONFIG_FILE).exists():
        raise CheckpointError(f"{folder}: is a saved model itself, and the demo writes two; name another folder")
    for name in ("dense", "pruned"):
        check_output(folder / name, overwrite=overwrite)


def _digits() -> "tuple[Dataset, Dataset]":
    """Training and test images of 8x8 pixels with the classes 0 to 9, drawn once.

    Raises:
        ModelError: scikit-learn is missing.
    """
    import datasets
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ModelError("the demo needs scikit-learn's digits: pip install 'hf_blockprune[demo]'") from error
    pixels, classes = load_digits(return_X_y=True)  # [images, 64] from 0 to 16, [images]
    scans = (np.asarray(pixels).reshape(-1, 8, 8) * (255 / 16)).astype("uint8")
    order = torch.randperm(len(scans), generator=torch.Generator().manual_seed(0)).tolist()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})

    def subset(indices: list[int]) -> datasets.Dataset:
        images = [Image.fromarray(scans[i]).convert("RGB") for i in indices]
        return datasets.Dataset.from_dict(
            {"image": images, "label": [int(classes[i]) for i in indices]}, features=features
        )

    return subset(order[:TRAIN_IMAGES]), subset(order[TRAIN_IMAGES:])


def _processor() -> ImageProcessor:
    """Brings pictures to 32x32 pixels from -1 to 1."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # as in model/loading.py

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 32, "width": 32},
            "resample": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        Path(folder, "preprocessor_config.json").write_text(json.dumps(settings))
        return AutoImageProcessor.from_pretrained(folder)


def _train(train: "Dataset") -> tuple[ViTForImageClassification, ImageProcessor]:
    """A vision transformer of 800 thousand weights, from scratch, and its image processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            id2label={digit: str(digit) for digit in range(10)},
        )
        model = ViTForImageClassification(config)
        processor = _processor()
        pixels = processor(images=list(train["image"]), return_tensors="pt")["pixel_values"]
        labels = torch.tensor(train["label"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=True)
        steps = EPOCHS * -(-len(labels) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
        model.train()
        with stage("training", steps) as bar:
            for _ in range(EPOCHS):
                for rows in torch.randperm(len(labels)).split(BATCH_SIZE):
                    loss = F.cross_entropy(model(pixel_values=pixels[rows]).logits, labels[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    bar.advance(loss=loss.item(), lr=optimizer.param_groups[0]["lr"])
                    schedule.step()
    return model.eval(), processor


def _load_in_new_process(dense: Path, pruned: Path, processor: ImageProcessor, test: "Dataset") -> _Loaded:
    with tempfile.TemporaryDirectory() as folder:
        pixels = Path(folder) / "pixels.pt"
        torch.save(_first_pixels(processor, test), pixels)
        command = [sys.executable, "-c", _LOAD_AND_TIME, str(dense), str(pruned), str(pixels)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ModelError(f"the saved models do not load in a new process: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _first_pixels(processor: ImageProcessor, test: "Dataset") -> torch.Tensor:
    """pixel_values of 64 images, [64, 3, 32, 32]."""
    return processor(images=list(test["image"][:64]), return_tensors="pt")["pixel_values"]


def _check_loaded(loaded: _Loaded, pruner: BlockPruner, processor: ImageProcessor, test: "Dataset") -> None:
    with torch.inference_mode():
        expected = pruner.model(pixel_values=_first_pixels(processor, test)).logits.argmax(-1).tolist()
    if loaded["predictions"][1] != expected or not loaded["sparse_layers"]:
        raise ModelError("the pruned model loaded back in a new process gives other predictions")


def _figures(report: JsonDict, evaluation: JsonDict, loaded: _Loaded, dense: Path, train_seconds: float) -> DemoFigures:
    blocks = sum(layer["blocks"] for layer in report["layers"])
    return {
        "num_images": evaluation["num_images"],
        "train_seconds": round(train_seconds, 1),
        "prune_seconds": round(sum(report["seconds"].values()), 1),
        "flops_ratio": report["flops_ratio"],
        "evaluation": evaluation,
        "loaded_class": loaded["classes"][1],
        "dense": {
            "top1": evaluation["baseline_top1"],
            "size_bytes": (dense / "model.safetensors").stat().st_size,
            "kept_blocks": blocks,
            "latency_ms": loaded["latency_ms"][0],
        },
        "pruned": {
            "top1": evaluation["top1"],
            "size_bytes": report["size_bytes"],
            "kept_blocks": sum(layer["kept_blocks"] for layer in report["layers"]),
            "latency_ms": loaded["latency_ms"][1],
        },
    }


def demo_table(result: DemoFigures) -> Table:
    """Figures of the dense beside those of the pruned model."""
    table = folding_table(
        *("", "dense", "pruned"),
        title=f"A small ViT on scikit-learn's digits, {result['flops_ratio']:.1%} of the FLOPs kept",
        caption=f"pruned model loaded in a new process as {result['loaded_class']}",
    )
    dense, pruned = result["dense"], result["pruned"]
    table.add_row(f"accuracy on {result['num_images']} images", f"{dense['top1']:.1%}", f"{pruned['top1']:.1%}")
    table.add_row("bytes on disk", f"{dense['size_bytes']:,}", f"{pruned['size_bytes']:,}")
    table.add_row("kept 16x16 blocks", f"{dense['kept_blocks']:,}", f"{pruned['kept_blocks']:,}")
    table.add_row("latency of 64 images", f"{dense['latency_ms']:.1f} ms", f"{pruned['latency_ms']:.1f} ms")
    return table
