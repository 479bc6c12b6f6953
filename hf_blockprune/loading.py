"""Loading an image classifier and its processor, with errors that say what to do."""

from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForImageClassification

# Not from `transformers` itself: up to 5.17 that refuses it where torchvision is missing, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .errors import BlockPruneError, BlockSparseFormatError, CheckpointError, ModelError

# Those options of transformers' `from_pretrained` that say where files come from.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


def load_classifier(name: str, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """(model, image processor) from a Hub name or a folder.

    Args:
        name: Hub name or folder.
        kwargs: for transformers' `from_pretrained`.

    Raises:
        ModelError: nothing is there, it is no image classifier, or it lacks trained weights.
        CheckpointError: the files are damaged.
        BlockSparseFormatError: a block-sparse checkpoint's config and tensors disagree.
    """
    # Where nothing is said, transformers asks on the terminal whether a folder's code may run, and waits.
    kwargs = {"trust_remote_code": False, **kwargs}
    try:
        model, info = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True, **kwargs)
        hub_kwargs = {key: value for key, value in kwargs.items() if key in HUB_OPTIONS}
        processor = AutoImageProcessor.from_pretrained(
            name, trust_remote_code=kwargs["trust_remote_code"], **hub_kwargs
        )
    except (BlockPruneError, BlockSparseFormatError):
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"{name}: its safetensors file is damaged ({error}); copy or download it again"
        ) from error
    except OSError as error:
        raise ModelError(f"{name}: no such model or folder, or a file is missing ({_first_line(error)})") from error
    except Exception as error:  # what a stranger's config makes transformers raise has no common class
        raise ModelError(f"{name}: cannot be loaded as an image classifier ({_first_line(error)})") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(f"{name}: has no trained weights for {missing}; fine-tune it as a classifier first")
    return model, processor


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
