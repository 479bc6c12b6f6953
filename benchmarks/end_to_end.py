"""Whole models, dense and pruned, by turns: eager, compiled, and the dense one in other runtimes.

    python benchmarks/end_to_end.py --arch deit-base --device cpu --batch 1 8
    python benchmarks/end_to_end.py --model PRUNED --batch 1 8      # a pruned checkpoint instead of random weights
    python benchmarks/end_to_end.py --arch deit-tiny --quick --json

Random models keep blocks at random places. onnxruntime and OpenVINO run the dense model where they are installed
(`pip install '.[benchmark]'`), in float32; torch's own BSR runs the pruned one.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from benchmarks.kernels import torch_bsr
from benchmarks.timing import device_file, random_mask, store
from hf_blockprune import BlockPruneConfig, sparsify
from hf_blockprune.cli.options import parse_block_shape
from hf_blockprune.export.forms import to_onnx
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from hf_blockprune.measure.stopwatch import by_turns, median, ratio
from hf_blockprune.model.targets import find_targets
from hf_blockprune.runs.environment import environment
from hf_blockprune.score.blocks import grid_shape

ARCHS = {"deit-tiny": (192, 3), "deit-small": (384, 6), "deit-base": (768, 12)}
TOKENS = 197


def main() -> None:
    """Measure every case."""
    options = parse_options()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    for name, dense, sparse, details in models(options):
        for batch in options.batch:
            row = {"arch": name, "op": "model", "batch": batch, "m": TOKENS * batch, "k": None, "n": None, **details}
            rows.append({**row, **measure(dense, sparse, batch, options)})
            if not options.json:
                print(line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps({"environment": environment(), "rows": rows}))
    elif not options.quick:
        store(device_file(options.device), "end_to_end", rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=["deit-base"])
    parser.add_argument("--model", type=Path, help="a pruned checkpoint to measure, instead of --arch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--block-shape", default="32x32")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.7], help="blocks removed from each Linear")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long each row takes to time")
    parser.add_argument("--quick", action="store_true", help="eager alone, a few seconds a row; writes no file")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output; writes no file")
    return parser.parse_args()


def models(options: argparse.Namespace):
    """(name, dense model, pruned model, what to say of it)."""
    dtype = getattr(torch, options.dtype)
    if options.model is not None:
        sparse = AutoModelForImageClassification.from_pretrained(options.model, dtype=dtype)
        shape = next(block_sparse_layers(sparse))[1].block_shape
        config = sparse.config.__class__.from_pretrained(options.model)
        del config.quantization_config
        dense = AutoModelForImageClassification.from_config(config).to(dtype)
        weights = sum(
            m.dense_shape[0] * m.dense_shape[1] if m.dense_shape else m.in_features * m.out_features
            for _, m in block_sparse_layers(sparse)
        )
        kept = sum(m.packed().weight.numel() for _, m in block_sparse_layers(sparse))
        details = {"block_shape": list(shape), "sparsity": round(1 - kept / weights, 3), "dtype": options.dtype}
        yield options.model.name, dense.eval(), sparse.eval(), details
        return
    shape = parse_block_shape(options.block_shape)
    for arch, sparsity in product(options.arch, options.sparsity):
        dense, sparse = random_pair(arch, shape, sparsity)
        details = {"block_shape": list(shape), "sparsity": sparsity, "dtype": options.dtype}
        yield arch, dense.to(dtype), sparse.to(dtype), details


def random_pair(
    arch: str, shape: tuple[int, int], sparsity: float, **changes: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A dense and a pruned model with random weights; blocks are removed at random places.

    Args:
        arch: one of `ARCHS`.
        shape: of blocks.
        sparsity: blocks removed from each Linear.
        changes: of the model's config.
    """
    width, heads = ARCHS[arch]
    torch.manual_seed(0)
    settings = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width, **changes}
    config = ViTConfig(**settings, id2label={i: str(i) for i in range(1000)})
    dense, sparse = (ViTForImageClassification(config).eval() for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: random_mask(grid_shape((linear.out_features, linear.in_features), shape), sparsity, generator)
        for name, linear in find_targets(sparse, BlockPruneConfig(block_shape=shape)).items()
    }
    return dense, sparsify(sparse, masks, shape)


@torch.no_grad()  # not inference_mode, in which torch's BSR layers fail
def measure(dense: nn.Module, sparse: nn.Module, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    pixels = torch.randn(batch, 3, 224, 224, device=options.device).to(next(dense.parameters()).dtype)
    dense, sparse = dense.to(options.device), sparse.to(options.device)
    contestants: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense(pixel_values=pixels),
        "sparse": lambda: sparse(pixel_values=pixels),
    }
    if not options.quick:
        torch._dynamo.reset()
        compiled, sparse_compiled = torch.compile(dense), torch.compile(sparse)
        contestants["dense_compiled"] = lambda: compiled(pixel_values=pixels)
        contestants["sparse_compiled"] = lambda: sparse_compiled(pixel_values=pixels)
    times = by_turns(contestants, seconds=3.0 if options.quick else options.seconds, device=options.device)
    faster, spread = ratio(times, "dense", "sparse")
    result: dict[str, Any] = {"ratio_to_dense": faster, "ratio_spread": spread}
    if "dense_compiled" in times:
        result["ratio_to_compiled"], result["ratio_to_compiled_spread"] = ratio(
            times, "dense_compiled", "sparse_compiled"
        )
    if not options.quick and options.device == "cpu" and options.dtype == "float32":
        # In rounds of their own: their threads would disturb the others'.
        times |= by_turns({**other_runtimes(dense, pixels), **with_bsr(sparse, pixels)}, seconds=options.seconds / 2)
    return {**result, **{f"{name}_ms": median(values) for name, values in times.items()}}


def other_runtimes(dense: nn.Module, pixels: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The dense model in what a user might run it with instead; those that are installed."""
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
        import openvino  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "dense.onnx")
        to_onnx(dense, pixels.clone(), path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        # In float32 too: by itself OpenVINO takes bfloat16 where the processor has it.
        network = openvino.compile_model(str(path), "CPU", {**hints, "INFERENCE_PRECISION_HINT": "f32"})
    inputs = {session.get_inputs()[0].name: pixels.numpy()}
    array = pixels.numpy()
    return {"onnxruntime": lambda: session.run(None, inputs), "openvino": lambda: network(array)}


def with_bsr(sparse: nn.Module, pixels: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The pruned model with torch's own block-sparse products, for blocks that these can take on a CPU."""
    layers = list(block_sparse_layers(sparse))
    if any(layer.block_shape[0] != layer.block_shape[1] for _, layer in layers):
        return {}
    model = copy.deepcopy(sparse)
    for name, layer in layers:
        linear = layer.to_dense()
        linear.weight = nn.Parameter(torch_bsr(layer), requires_grad=False)
        model.set_submodule(name, linear)
    return {"torch_bsr": lambda: model(pixel_values=pixels)}


def line(row: dict[str, Any]) -> str:
    low, high = row["ratio_spread"]
    compiled = f", compiled {row['ratio_to_compiled']:.2f}" if "ratio_to_compiled" in row else ""
    others = ", ".join(f"{key.removesuffix('_ms')} {row[key]:.1f} ms" for key in row if key.endswith("_ms"))
    return (
        f"{row['arch']} batch {row['batch']} {row['dtype']}, {'x'.join(map(str, row['block_shape']))}, "
        f"{row['sparsity']:.0%} removed: {row['ratio_to_dense']:.2f} ({low:.2f} to {high:.2f}){compiled}; {others}"
    )


if __name__ == "__main__":
    main()
