"""A model in the runtimes that users might pick, in float32, bfloat16 and int8: dense in others, dense and pruned here.

    python benchmarks/runtimes.py --arch deit-base deit-small deit-tiny --batch 1 8

Random weights, blocks at random places. Runtimes take turns, and models within a runtime: threads of one that wait for
work would disturb another's. OpenVINO and NNCF, which rounds for it, run where they are installed
(`pip install '.[benchmark]'`); int8 in torch and onnxruntime is their own dynamic rounding.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.end_to_end import ARCHS, TOKENS, random_pair
from benchmarks.merged import merge
from benchmarks.timing import device_file, store
from hf_blockprune.cli.options import parse_block_shape
from hf_blockprune.export.forms import to_onnx
from hf_blockprune.hub.blockprune_rounding import quantize
from hf_blockprune.measure.stopwatch import by_turns
from hf_blockprune.runs.environment import environment

VISITS = 4  # of each runtime
PAUSE = 0.2  # seconds, in which a runtime's threads go to sleep
SPARSITIES = (0.0, 0.5, 0.7)
MERGED = 0.65  # share of the FLOPs that merging alone leaves, in the one model in which tokens merge
IMAGES = 8  # random ones, for NNCF's statistics
Runs = dict[str, Callable[[], Any]]


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=["deit-base"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--block-shape", default="32x32")
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long each runtime takes to time")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output; writes no file")
    options = parser.parse_args()
    logging.set_verbosity_error()
    shape, rows = parse_block_shape(options.block_shape), []
    for arch in options.arch:
        models = our_models(arch, shape)
        for batch in options.batch:
            case = {"arch": arch, "op": "runtimes", "batch": batch, "m": TOKENS * batch, "block_shape": list(shape)}
            times = measure(models, torch.randn(batch, 3, 224, 224), options.seconds)
            rows.append({**case, "threads": torch.get_num_threads(), "ms": times})
            if not options.json:
                store(device_file("cpu"), "runtimes", rows[-1:])
                print(line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps({"environment": environment(), "rows": rows}))


def our_models(arch: str, shape: tuple[int, int]) -> dict[str, PreTrainedModel]:
    """The dense model and ours, by name; those that begin with `ours` are of this package."""
    models: dict[str, PreTrainedModel] = {}
    for sparsity in SPARSITIES:
        dense, sparse = random_pair(arch, shape, sparsity)
        models["torch float32"] = dense
        name = f"{sparsity:.0%} removed"
        models[f"ours float32, {name}"] = sparse
        models[f"ours bfloat16, {name}"] = copy.deepcopy(sparse).bfloat16()
        models[f"ours int8, {name}"] = quantize(copy.deepcopy(sparse))
    merged = merge(quantize(copy.deepcopy(models["ours float32, 50% removed"])), models["torch float32"], MERGED)
    models["ours int8, 50% removed, tokens merge"] = merged
    models["torch bfloat16"] = copy.deepcopy(models["torch float32"]).bfloat16()
    linears = {torch.nn.Linear}
    models["torch int8"] = torch.ao.quantization.quantize_dynamic(models["torch float32"], linears, dtype=torch.qint8)
    return models


@torch.no_grad()
def measure(models: dict[str, PreTrainedModel], pixels: torch.Tensor, seconds: float) -> dict[str, list[float]]:
    """[lower quartile, median, upper quartile] in milliseconds by name."""
    runs: dict[str, Runs] = {"torch": {}}
    for name, model in models.items():
        x = pixels.to(next(model.parameters()).dtype)
        runs["torch"][name] = lambda model=model, x=x: model(pixel_values=x)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "dense.onnx")
        to_onnx(models["torch float32"], pixels.clone(), file)
        runs["onnxruntime"] = onnxruntime_runs(file, pixels)
        runs["openvino"] = openvino_runs(file, pixels)
    times: dict[str, list[float]] = {}
    for _ in range(VISITS):
        for contestants in filter(None, runs.values()):
            time.sleep(PAUSE)
            for name, values in by_turns(contestants, seconds=seconds / VISITS, rounds=2).items():
                times.setdefault(name, []).extend(values)
    return {name: [round(q, 3) for q in statistics.quantiles(values, n=4)] for name, values in times.items()}


def onnxruntime_runs(file: Path, pixels: torch.Tensor) -> Runs:
    """The dense model as it is, and with its matrices rounded by onnxruntime."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    small = file.with_name("rounded.onnx")
    quantize_dynamic(file, small, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    runs: Runs = {}
    for name, path in (("float32", file), ("int8", small)):
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = {session.get_inputs()[0].name: pixels.numpy()}
        runs[f"onnxruntime {name}"] = lambda session=session, inputs=inputs: session.run(None, inputs)
    return runs


def openvino_runs(file: Path, pixels: torch.Tensor) -> Runs:
    """The dense model in each precision, int8 by NNCF; nothing where they are not installed."""
    try:
        import nncf  # pyright: ignore[reportMissingImports]
        import openvino  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    core, array = openvino.Core(), pixels.numpy()
    model = core.read_model(file)
    images = nncf.Dataset([torch.randn_like(pixels).numpy() for _ in range(IMAGES)])
    rounded = nncf.quantize(model, images, model_type=nncf.ModelType.TRANSFORMER, subset_size=IMAGES)
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    runs: Runs = {}
    for name, network, precision in (("float32", model, "f32"), ("bfloat16", model, "bf16"), ("int8", rounded, "f32")):
        compiled = core.compile_model(network, "CPU", {**hints, "INFERENCE_PRECISION_HINT": precision})
        runs[f"openvino {name}"] = lambda compiled=compiled: compiled(array)
    return runs


def line(row: dict[str, Any]) -> str:
    others = ", ".join(f"{name} {median:.1f}" for name, (_, median, _) in row["ms"].items())
    return f"{row['arch']} batch {row['batch']}, ms: {others}"


if __name__ == "__main__":
    main()
