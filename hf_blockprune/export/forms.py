"""Pruned checkpoints in forms that need nothing of this package, or that other runtimes take."""

import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..checkpoint.folder import check_output, check_output_file, staged_directory
from ..data.model_input import picture_size
from ..display.stages import planned, stage
from ..errors import CheckpointError, ConfigError, ModelError
from ..files import partial_file
from ..hub.blockprune_layers import block_sparse_layers, is_int8, is_pruned
from ..hub.blockprune_quantizer import pack_weights
from ..hub.blockprune_rounding import unquantize
from ..hub.blockprune_skeleton import channels_of
from ..hub.blockprune_together import unfuse
from ..hub.blockprune_tokens import forget_schedule, schedule_of, set_schedule
from ..model.loading import load_model, model_class_of
from ..model.outputs import answers, classifies
from ..types import ImageProcessor, JsonDict
from .biases import admit_biases, biases_without_place
from .inner_width import cut_head_features, cut_units, leave_cuts_out, narrow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)
FORMATS = ("dense", "onnx", "torch-export")
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INPUT = "pixel_values"
BATCHES = (1, 3)  # of the comparison; tracing sees neither
# Largest difference of logits, over their largest magnitude.
TOLERANCE = 1e-4
ONNX_FILE_LIMIT = 2 << 30  # protobuf's


def export_checkpoint(directory: str | Path, output: str | Path, form: str, *, overwrite: bool = False) -> JsonDict:
    """Write a pruned checkpoint in another form, and check that it answers as the checkpoint does.

    Args:
        directory: a block-sparse checkpoint: a folder, or a name on the Hub.
        output: a folder for "dense", a file for the others; appears whole, once it was checked.
        form: "dense", a stock transformers folder with zeros where blocks were removed; "onnx", the dense form for
            other runtimes; "torch-export", a program of `torch.export` that keeps its block-sparse kernels, so that
            whoever loads it has this package imported. The last two take any batch size, and leave out hidden units
            that were cut; a stock folder has one width for all MLPs, that of the widest, and its tokens do not merge.
            All are float32.
        overwrite: replace what is there.

    Returns:
        JSON-ready `output`, `format`, `size_bytes`, `max_difference`, the largest of the logits (of a stock folder from
        the checkpoint without merging), `merges_tokens`, whether tokens merge in what was written, `cut_units`, hidden
        units that the checkpoint lacks, `cut_units_kept_as_zeros`, those of them that came back as zeros, and
        `cut_head_features` and `cut_head_features_kept_as_zeros`, the same of features of attentions' heads.

    Raises:
        ConfigError: no such form, or a package is missing.
        ModelError: the checkpoint cannot be loaded, holds no block-sparse layers, or cannot be exported.
        CheckpointError: the output exists, cannot be written, or does not answer as the checkpoint does.
    """
    if form not in FORMATS:
        raise ConfigError(f"form: expected one of {', '.join(FORMATS)}, got {form!r}")
    if form == "onnx":
        _need_onnx()
    (check_output if form == "dense" else check_output_file)(output, overwrite=overwrite)
    with planned(("loading", "exporting", "checking")):
        return _export(directory, output, form, overwrite)


def _export(directory: str | Path, output: str | Path, form: str, overwrite: bool) -> JsonDict:
    with stage("loading", aside=True):
        model, processor = _load(directory)
    target = Path(output).expanduser()
    size = picture_size(model, processor)
    pixels = _pixels(channels_of(model.config, model), size)
    if form != "torch-export" and any(map(is_int8, model.modules())):
        logger.warning("This form holds floating weights: those that int8 stands for, and activations are not rounded.")
        unquantize(model)
    merged = schedule_of(model) is not None
    if merged and form == "dense":
        logger.warning("A stock folder cannot merge tokens: its model does more work, and answers as one without does.")
        forget_schedule(model)
    expected = {batch: _answers(model, pixels(batch)) for batch in BATCHES}
    lost = cut_units(model), cut_head_features(model)
    (narrow if form == "dense" else leave_cuts_out)(model)
    zeros = cut_units(model), cut_head_features(model)
    write = {"dense": _write_dense, "onnx": _write_onnx, "torch-export": _write_program}[form]
    opened = staged_directory(target, overwrite=overwrite) if form == "dense" else _staged_file(target, overwrite)
    with opened as staging:
        with stage("exporting", aside=form == "dense"):  # transformers shows what it saves and loads
            run = write(model, processor, staging, pixels)
        with stage("checking", len(BATCHES), unit="batches") as bar:
            difference = max(_difference(run(pixels(batch)), expected[batch]) for batch in bar.over(BATCHES))
        if not difference <= TOLERANCE * max(float(logits.abs().max()) for logits in expected.values()):
            raise CheckpointError(
                f"{output}: its predictions differ by up to {difference:.2g} from the checkpoint's, so it was not "
                f"kept; {_advice(model, form)}"
            )
    values = {"output": str(output), "format": form, "size_bytes": _size(target), "max_difference": difference}
    values |= {"merges_tokens": merged and form != "dense"}
    values |= {"cut_units": lost[0], "cut_units_kept_as_zeros": zeros[0]}
    return {**values, "cut_head_features": lost[1], "cut_head_features_kept_as_zeros": zeros[1]}


def _load(directory: str | Path) -> "tuple[PreTrainedModel, ImageProcessor]":
    """(block-sparse model, image processor)."""
    model, processor = load_model(str(directory), {"dtype": torch.float32})
    if not is_pruned(model):
        raise ModelError(f"{directory}: holds no block-sparse layers, so there is nothing to export from it")
    return model.eval(), processor


def _advice(model: "PreTrainedModel", form: str) -> str:
    if form == "dense" and (names := sorted(biases_without_place(model))):
        return (
            f"refitting gave biases to {len(names)} Linears that have none in {type(model).__name__} (first: "
            f"{names[0]}); prune with refit=False, or export another form"
        )
    return "please report the model and the versions in use"


Run = Callable[[Tensor], Tensor]


def _write_dense(
    model: "PreTrainedModel", processor: ImageProcessor, folder: Path, pixels: Callable[[int], Tensor]
) -> Run:
    name = f"{model.config.model_type} pruned by hf_blockprune"
    model.dequantize()
    # What `from_pretrained` would take for a block-sparse checkpoint is no part of a dense one.
    for attribute in ("quantization_config", "auto_map"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    admit_biases(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    task = "image-classification" if classifies(model, processor.to_dict()) else "image-feature-extraction"
    (folder / "README.md").write_text(
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\n---\n\n"
        f"A dense copy of a {name}: removed blocks are zeros, which take as much room and time as other weights.\n",
        encoding="utf-8",
    )
    loaded = load_model(str(folder), {}, model_class_of(model.config))[0]
    return lambda x: _answers(loaded.eval(), x)


def _write_onnx(
    model: "PreTrainedModel", processor: ImageProcessor, file: Path, pixels: Callable[[int], Tensor]
) -> Run:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    schedule, names = schedule_of(model), [name for name, _ in block_sparse_layers(model)]
    model.dequantize()
    if schedule is not None:
        set_schedule(model, schedule, names)
    # Of fused attention with a mask, as BeiT's and Swin's, torch 2.13's exporter gets the memory layout wrong.
    model.set_attn_implementation("eager")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size >= ONNX_FILE_LIMIT:
        raise ModelError(f"its weights are {size:,} bytes, and one ONNX file holds less than {ONNX_FILE_LIMIT:,}")
    shapes = ({0: torch.export.Dim("batch")},)
    answer = "logits" if classifies(model, processor.to_dict()) else "embeddings"
    to_onnx(model, pixels(2), file, input_names=[INPUT], output_names=[answer], dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run([answer], {INPUT: x.numpy()})[0])


def _write_program(
    model: "PreTrainedModel", processor: ImageProcessor, file: Path, pixels: Callable[[int], Tensor]
) -> Run:
    unfuse(model)  # layers that hand each other results in Python are no part of a graph
    pack_weights(model)  # machines that the program runs on may differ from this one
    shapes = ({0: torch.export.Dim("batch")},)
    content = io.BytesIO()  # torch's own writer ends the process where the disk is full
    with _explained("torch.export"), torch.no_grad():
        program = without_traces(torch.export.export(_Answers(model), (pixels(2),), dynamic_shapes=shapes))
        program.example_inputs = None  # made-up images, larger than a small model's weights
        torch.export.save(program, content)
    file.write_bytes(content.getbuffer())
    with _explained("torch.export"), file.open("rb") as stream:
        loaded = torch.export.load(stream).module()
    return lambda x: loaded(x).detach()


def to_onnx(
    model: nn.Module,
    pixels: Tensor,
    file: Path,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: tuple[dict[int, torch.export.Dim]] | None = None,
) -> None:
    """Write an image classifier, dense, as one ONNX file that gives logits alone.

    Args:
        model: of transformers.
        pixels: an example, [images, channels, height, width].
        file: to write.
        input_names, output_names: what the file calls pixels and logits; by default what torch does.
        dynamic_shapes: of the pixels, the axes whose size may change; none by default.

    Raises:
        ModelError: torch cannot export it.
    """
    with _explained("ONNX"), redirect_stdout(io.StringIO()), torch.no_grad():
        program = torch.export.export(_Answers(model), (pixels,), dynamic_shapes=dynamic_shapes)
        torch.onnx.export(
            without_traces(program),
            (),
            str(file),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=input_names,
            output_names=output_names,
        )


def without_traces(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A program that does not say where on this machine the source of each operation lies."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else []:
            node.meta.pop("stack_trace", None)
    return program


class _Answers(nn.Module):
    """A classifier that takes and gives a plain tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return answers(self.model, pixel_values)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Failures of an exporter as errors that say what failed; its warnings speak to its own developers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # exporters raise whatever the model's code made them stumble over
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{what} cannot export this model with these versions ({reason})") from error


@contextmanager
def _staged_file(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary file that takes the place of `target` when the block ends well, and vanishes when it does not."""
    check_output_file(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial_file(target) as staging:
            yield staging
    except OSError as error:
        raise CheckpointError(f"{target}: could not be written ({error}); nothing was changed") from error


def _need_onnx() -> None:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"onnx needs {', '.join(missing)}; install them with: pip install 'hf_blockprune[onnx]'")


def _pixels(channels: int, size: tuple[int, int]) -> Callable[[int], Tensor]:
    """Made-up images of a size, the same every time."""

    def make(batch: int) -> Tensor:
        return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(batch))

    return make


def _answers(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return answers(model, pixels)


def _difference(have: Tensor, want: Tensor) -> float:
    return float((have - want).abs().max())


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size
