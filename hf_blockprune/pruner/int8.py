"""A pruned checkpoint with its weights in int8, as a folder of its own."""

from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.folder import check_output, staged_directory
from ..data.model_input import picture_size
from ..display.stages import planned, stage
from ..errors import CheckpointError
from ..hub.blockprune_config import INT8
from ..hub.blockprune_skeleton import channels_of
from ..model.loading import load_model
from ..model.outputs import answers
from ..types import JsonDict
from .pruner import BlockPruner

IMAGES = 2  # made-up ones, of the comparison


def export_int8(source: str | Path, output: str | Path, *, overwrite: bool = False) -> JsonDict:
    """Write a pruned checkpoint with the weights of its block-sparse layers in int8, and check that it loads.

    Args:
        source: a block-sparse checkpoint: a folder, or a name on the Hub.
        output: a folder; appears whole, once it was checked.
        overwrite: replace an older checkpoint.

    Returns:
        JSON-ready `output`, `format`, `size_bytes` of all its files and `max_difference`, the largest of the answers to
        made-up images, over their largest magnitude: what rounding changes.

    Raises:
        ModelError: there is no pruned model.
        BlockSparseFormatError: a weight is not finite.
        CheckpointError: the output exists, cannot be written, or does not answer as the rounded model does.
    """
    check_output(output, overwrite=overwrite)
    with planned(("loading", "exporting", "checking")):
        with stage("loading", aside=True):
            pruner = BlockPruner.from_pretrained(source)
        model = pruner.model.eval()
        size = picture_size(model, pruner.processor)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(IMAGES, channels_of(model.config, model), *size, generator=generator).to(model.dtype)
        before = _answers(pruner, pixels)
        pruner.quantize()
        rounded = _answers(pruner, pixels)
        with staged_directory(Path(output).expanduser(), overwrite=overwrite) as folder:
            with stage("exporting", aside=True):
                pruner.save_into(folder, Path(output).expanduser().resolve().name)
            with stage("checking"):
                loaded = BlockPruner(load_model(str(folder), {})[0].eval(), pruner.processor)
                # Of one kernel the sums are the same; only what comes after them may be rounded in another order.
                if not torch.allclose(
                    _answers(loaded, pixels), rounded, rtol=1e-3, atol=1e-3 * float(rounded.abs().max())
                ):
                    raise CheckpointError(f"{output}: loaded again it answers otherwise, so it was not kept")
            written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    difference = float((rounded - before).abs().max() / before.abs().max().clamp(min=1e-30))
    return {"output": str(output), "format": INT8, "size_bytes": written, "max_difference": difference}


def _answers(pruner: BlockPruner, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return answers(pruner.model, pixels).float()
