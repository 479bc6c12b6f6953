"""Speed at equal FLOPs of what leaves: blocks, hidden units and features of heads, or tokens, in several runtimes.

    python benchmarks/shrunk.py --arch deit-base --ratio 0.5 --batch 1 8

Random weights; equal shares in all layers: blocks at random places, or so many units and features of each head, or
patches, of which the last layer loses all that nobody reads; or nothing, which shows what this package's kernels do
alone. Each model runs in torch with this package, and as a dense ONNX file in onnxruntime and OpenVINO where they are
installed, which multiply with zeros as with other numbers. All by turns within a runtime, in float32.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import torch
from torch import nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from benchmarks.end_to_end import ARCHS, other_runtimes
from benchmarks.merged import merge
from benchmarks.timing import load, random_mask, save
from hf_blockprune import BlockPruneConfig, sparsify
from hf_blockprune.cli.options import parse_block_shape
from hf_blockprune.cost.flops import count_flops
from hf_blockprune.hub.blockprune_layers import block_sparse_layers
from hf_blockprune.measure.stopwatch import by_turns, median, ratio
from hf_blockprune.model.layers import linear_from, linear_in, shape_of
from hf_blockprune.model.shrunk import LayerShape
from hf_blockprune.model.structure import find_transformer_layers
from hf_blockprune.model.targets import find_targets
from hf_blockprune.runs.environment import environment
from hf_blockprune.score.blocks import grid_shape

UNIT_STEP = 32  # units that leave together


def main() -> None:
    """Measure every batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHS, default="deit-base")
    parser.add_argument("--ratio", type=float, default=0.5, help="FLOPs of the whole model that are kept")
    parser.add_argument("--head-size", type=int, default=40, help="features of each head of 64 that stay")
    parser.add_argument("--block-shapes", nargs="+", default=["16x16", "32x32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=40.0, help="about how long each runtime takes to time")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to add rows to")
    options = parser.parse_args()
    logging.set_verbosity_error()
    models = {"dense": dense_model(options.arch)}
    models["units and heads"] = shrunk_model(options.arch, options.ratio, options.head_size)
    models["nothing"] = whole_model(options.arch)
    models["tokens"] = merge(whole_model(options.arch), models["dense"], options.ratio)
    for shape in options.block_shapes:
        models[f"blocks {shape}"] = block_model(options.arch, parse_block_shape(shape), options.ratio)
    results = load(options.output)
    for batch in options.batch:
        row = {"arch": options.arch, "ratio": options.ratio, "head_size": options.head_size, "batch": batch}
        row["runtimes"] = measure(models, batch, options.seconds)
        row["threads"], row["environment"] = torch.get_num_threads(), environment()
        results["rows"].append(row)
        save(options.output, results)
        print(json.dumps(row["runtimes"], indent=1), flush=True)


def dense_model(arch: str) -> PreTrainedModel:
    width, heads = ARCHS[arch]
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width)
    config.id2label = {i: str(i) for i in range(1000)}
    return ViTForImageClassification(config).eval()


def whole_model(arch: str) -> PreTrainedModel:
    """With all that the dense model has, as this package runs it."""
    return block_model(arch, (16, 16), 1.0)


def block_model(arch: str, shape: tuple[int, int], share: float) -> PreTrainedModel:
    """With random blocks, as many in each Linear as leave a share of the model's FLOPs."""
    model = dense_model(arch)
    flops = count_flops(model)
    targets = find_targets(model, BlockPruneConfig(block_shape=shape))
    inside = sum(2 * flops.linear_tokens[n] * m.in_features * m.out_features for n, m in targets.items())
    removed = (1 - share) * flops.total / inside
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: random_mask(grid_shape(shape_of(linear), shape), removed, generator) for name, linear in targets.items()
    }
    return sparsify(model, masks, shape)


@torch.no_grad()
def shrunk_model(arch: str, share: float, head_size: int) -> PreTrainedModel:
    """With so many features in each head, and as many hidden units as then leave a share of the model's FLOPs."""
    model = dense_model(arch)
    flops, targets = count_flops(model), find_targets(model, BlockPruneConfig())
    layers = find_transformer_layers(model, targets)
    first, heads = layers[0], layers[0].heads
    dense_size, units = targets[first.query].out_features // heads, targets[first.fc1].out_features
    width, tokens = targets[first.query].in_features, flops.linear_tokens[first.fc1]
    gone = heads * (dense_size - head_size)
    saved = 8 * tokens * width * gone + flops.attention[first.query.rpartition(".")[0]] * gone / (heads * dense_size)
    left = ((1 - share) * flops.total / len(layers) - saved) / (4 * tokens * width)
    stay = tuple(range(units - UNIT_STEP * round(left / UNIT_STEP)))
    cut, attentions = {}, []
    for layer in layers:
        shape = LayerShape(layer, tuple(range(heads)), head_size, dense_size, stay, units)
        attentions.append(shape.cut_heads())
        for name, (outputs, inputs) in shape.kept().items():
            linear = linear_in(model, name)
            cut[name] = shape_of(linear)
            model.set_submodule(name, smaller(linear, outputs, inputs))
    grids = {name: grid_shape(shape_of(linear_in(model, name)), (16, 16)) for name in targets}
    masks = {name: torch.ones(grid, dtype=torch.bool) for name, grid in grids.items()}
    return sparsify(model, masks, (16, 16), cut, attentions)


def smaller(linear: nn.Linear, outputs: torch.Tensor | None, inputs: torch.Tensor | None) -> nn.Linear:
    rows, cols = (slice(None) if kept is None else kept for kept in (outputs, inputs))
    return linear_from(linear.weight[rows][:, cols], linear.bias[rows], linear)


@torch.no_grad()
def measure(models: dict[str, PreTrainedModel], batch: int, seconds: float) -> dict[str, Any]:
    """Medians in milliseconds, and times as fast as the dense model, by runtime and model."""
    pixels = torch.randn(batch, 3, 224, 224)
    runs: dict[str, dict[str, Callable[[], Any]]] = {"torch": {}}
    for name, model in models.items():
        runs["torch"][name] = lambda model=model: model(pixel_values=pixels)
        for runtime, run in other_runtimes(plain(model), pixels).items():
            runs.setdefault(runtime, {})[name] = run
    found = {}
    for runtime, contestants in runs.items():
        times = by_turns(contestants, seconds=seconds)
        found[runtime] = {}
        for name, values in times.items():
            row: dict[str, Any] = {"ms": median(values)}
            if name != "dense":
                row["ratio_to_dense"], row["ratio_spread"] = ratio(times, "dense", name)
            found[runtime][name] = row
    return found


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a Linear of its own size in place of each block-sparse layer, for other runtimes."""
    made = copy.deepcopy(model)
    for name, layer in list(block_sparse_layers(made)):
        made.set_submodule(name, layer.to_dense())
    return made


if __name__ == "__main__":
    main()
