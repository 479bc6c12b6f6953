"""What rounding to int8 costs: each model as it is and in int8, on the same images.

    python benchmarks/rounded.py MODEL ... --evaluation IMAGES --output benchmarks/results/rounded-deit-tiny.json

A dense model is taken with all its blocks kept, as this package stores and runs it.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import torch
from transformers.utils import logging

from benchmarks.timing import load, save
from hf_blockprune import BlockPruneConfig, BlockPruner, sparsify
from hf_blockprune.data.batches import load_images
from hf_blockprune.evaluate.accuracy import predict
from hf_blockprune.hub.blockprune_layers import is_pruned
from hf_blockprune.model.layers import shape_of
from hf_blockprune.model.targets import find_targets
from hf_blockprune.runs.environment import environment
from hf_blockprune.score.blocks import grid_shape

BLOCK_SHAPE = (32, 32)  # of dense models


def main() -> None:
    """Measure every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of dense or pruned models")
    parser.add_argument("--evaluation", type=Path, required=True, help="labelled images")
    parser.add_argument("--output", type=Path, help="JSON file to add rows to")
    options = parser.parse_args()
    logging.set_verbosity_error()
    for model in options.models:
        row = measure(model, options.evaluation)
        print(json.dumps(row), flush=True)
        if options.output is not None:
            results = load(options.output)
            others = [each for each in results["rows"] if each["model"] != row["model"]]
            save(options.output, {"environment": environment(), "rows": [*others, row]})


def measure(folder: Path, images: Path) -> dict[str, Any]:
    """Both models' accuracy, the change with its interval, and the divergence of their answers."""
    pruner = BlockPruner.from_pretrained(folder)
    if not is_pruned(pruner.model):
        keep_all(pruner)
    found = load_images(images, labels=True).fitted(pruner.model, pruner.processor)
    before = predict(pruner.model, found, pruner.processor, accelerator=pruner.accelerator)
    size = saved_bytes(pruner)
    pruner.quantize()
    evaluation = pruner.evaluate(images, against=before)
    return {"model": folder.name, **evaluation.to_dict(), "size_bytes": saved_bytes(pruner), "float_size_bytes": size}


def keep_all(pruner: BlockPruner) -> None:
    """Turn a dense model's Linears into layers that keep all blocks."""
    targets = find_targets(pruner.model, BlockPruneConfig(block_shape=BLOCK_SHAPE))
    masks = {n: torch.ones(grid_shape(shape_of(m), BLOCK_SHAPE), dtype=torch.bool) for n, m in targets.items()}
    sparsify(pruner.model, masks, BLOCK_SHAPE)


def saved_bytes(pruner: BlockPruner) -> int:
    with tempfile.TemporaryDirectory() as folder:
        pruner.model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


if __name__ == "__main__":
    main()
