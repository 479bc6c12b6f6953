"""The dense model that a checkpoint's config describes, and what it multiplies; neither its weights nor its code."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # as in model/loading.py

from ..cost.flops import ModelFlops, count_flops, image_size
from ..errors import BlockPruneError, ModelError
from ..model.loading import build, model_class_of
from ..types import JsonDict
from .folder import PROCESSOR_FILE, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dense_architecture(folder: Path, names: Collection[str]) -> "PreTrainedModel":
    """The dense model on the meta device, from the native config alone (the folder's code is not run).

    Args:
        folder: a checkpoint.
        names: of the tensors in its files.

    Raises:
        ModelError: its config describes no classifier or encoder of images.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        with torch.device("meta"):
            return build(model_class_of(config), config, names)
    except ModelError:
        raise
    except Exception as error:  # transformers refuses a stranger's values in many ways
        raise ModelError(f"{folder}: its config.json describes no classifier or encoder of images ({error})") from error


def dense_flops(folder: Path, architecture: "PreTrainedModel") -> ModelFlops:
    """FLOPs of it, as its tokens merge, for the images that the processor beside it makes.

    Args:
        folder: a checkpoint.
        architecture: what `dense_architecture` made of it.

    Raises:
        ModelError: its config describes no classifier or encoder of images.
    """
    processing = _processing(folder)
    try:
        flops = count_flops(architecture, image_size(architecture.config, processing), merging=True)
    except BlockPruneError:
        raise
    except Exception as error:
        raise ModelError(f"{folder}: its config.json describes no classifier or encoder of images ({error})") from error
    if not flops.total > 0:
        raise ModelError(f"{folder}: its config.json describes a model that multiplies nothing")
    return flops


def _processing(folder: Path) -> JsonDict | None:
    """Settings of the image processor beside a checkpoint; what its file leaves out is as its class has it.

    It makes no picture here, and a class of the folder's own is not run: its settings count as they stand.
    """
    file = folder / PROCESSOR_FILE
    if not file.is_file():
        return None
    stored = read_json(file)
    try:
        return {**stored, **AutoImageProcessor.from_pretrained(folder, trust_remote_code=False).to_dict()}
    except Exception:  # what a stranger's settings make transformers raise has no common class
        return stored
