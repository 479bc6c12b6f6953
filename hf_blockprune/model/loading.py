"""Loading a classifier or an encoder of images, and its processor, with errors that say what to do."""

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, cast

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel

# Not from `transformers` itself: up to 5.17 that refuses it where torchvision is missing, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_IMAGE_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from ..errors import BlockPruneError, BlockSparseFormatError, CheckpointError, ModelError, first_line
from ..types import ImageProcessor, JsonDict

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.models.auto.auto_factory import _BaseAutoModelClass


# Those options of transformers' `from_pretrained` that say where files come from.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
VISION_SUFFIXES = ("VisionModelWithProjection", "VisionModel")
PIXELS = "pixel_values"
ModelClass: TypeAlias = type[PreTrainedModel] | type["_BaseAutoModelClass"]
"""A model class of transformers, or one that chooses by the config."""


def load_model(
    name: str, kwargs: JsonDict, model_class: ModelClass | None = None
) -> tuple[PreTrainedModel, ImageProcessor]:
    """(model, image processor) from a Hub name or a folder.

    Args:
        name: Hub name or folder.
        kwargs: for transformers' `from_pretrained`.
        model_class: a model class of transformers; by default what `model_class_of` finds.

    Raises:
        ModelError: nothing is there, it neither classifies nor encodes images, or it lacks trained weights.
        CheckpointError: the files are damaged.
        BlockSparseFormatError: a block-sparse checkpoint's config and tensors disagree.
    """
    # Where nothing is said, transformers asks on the terminal whether a folder's code may run, and waits.
    kwargs = {"trust_remote_code": False, **kwargs}
    hub_kwargs = {key: value for key, value in kwargs.items() if key in HUB_OPTIONS}
    with _explained(name):
        if model_class is None:
            config = kwargs.get("config") or load_config(name, kwargs)
            model_class = model_class_of(config, trust_remote_code=bool(kwargs["trust_remote_code"]))
        model, missing = _load(model_class, name, kwargs)
        trust = kwargs["trust_remote_code"]
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=trust, **hub_kwargs)
    if missing:
        advice = "name the class that it was saved from (model_class=)"
        if hasattr(model, "classifier"):
            advice = "fine-tune it first, or name its class (model_class=) where it is an encoder or has another head"
        raise ModelError(
            f"{name}: has no trained weights for {', '.join(missing[:3])} of {type(model).__name__}; {advice}"
        )
    return model, processor


def load_config(name: str, kwargs: JsonDict) -> "PreTrainedConfig":
    """A model's config alone, which says cheaply whether there is such a model.

    Raises:
        ModelError: nothing is there, or it is no model's.
    """
    options = {key: value for key, value in kwargs.items() if key in (*HUB_OPTIONS, "subfolder")}
    with _explained(name):
        return AutoConfig.from_pretrained(name, trust_remote_code=kwargs.get("trust_remote_code", False), **options)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What loading a model may raise, as errors that say what to do."""
    try:
        yield
    except (BlockPruneError, BlockSparseFormatError):
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"{name}: its safetensors file is damaged ({error}); copy or download it again"
        ) from error
    except OSError as error:
        raise ModelError(f"{name}: no such model or folder, or a file is missing ({first_line(error)})") from error
    except Exception as error:  # what a stranger's config makes transformers raise has no common class
        raise ModelError(f"{name}: cannot be loaded as an image classifier or encoder ({first_line(error)})") from error


def _load(model_class: ModelClass, name: str, kwargs: JsonDict) -> tuple[PreTrainedModel, list[str]]:
    """(model, names of parameters without weights); a pooler that was never trained is left out."""
    model, missing = _loaded(model_class, name, kwargs)
    if missing and all("pooler." in key for key in missing) and _may_go_without_pooler(type(model)):
        return _loaded(type(model), name, {**kwargs, "add_pooling_layer": False})
    return model, missing


def _loaded(model_class: ModelClass, name: str, kwargs: JsonDict) -> tuple[PreTrainedModel, list[str]]:
    loaded = model_class.from_pretrained(name, output_loading_info=True, **kwargs)
    model, info = cast("tuple[PreTrainedModel, dict[str, list[str]]]", loaded)
    return model, sorted(info["missing_keys"])


def model_class_of(config: "PreTrainedConfig", *, trust_remote_code: bool = False) -> ModelClass:
    """The class to load a checkpoint with, by its config: of an encoder that it was saved from, else an Auto class.

    Args:
        config: the checkpoint's.
        trust_remote_code: whether code beside it counts.

    Raises:
        ModelError: the checkpoint is of a model that takes more than images.
    """
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
            others = getattr(config, "auto_map", None) or {}
            if trust_remote_code and "AutoModel" in others and AutoModelForImageClassification.__name__ not in others:
                return AutoModel
        elif _is_base(name) and found.main_input_name == PIXELS:
            return found
        elif _is_base(name) and (vision := _vision_class(name)) is not None:
            raise ModelError(
                f"{name}: takes more than images; pass model_class=transformers.{vision} to prune its vision part"
            )
    return AutoModelForImageClassification


def build(model_class: ModelClass, config: "PreTrainedConfig", names: Collection[str]) -> PreTrainedModel:
    """A dense model with new weights.

    Args:
        model_class: what `model_class_of` found.
        config: its config.
        names: of the tensors in its files; a pooler that has none is left out.
    """
    if not issubclass(model_class, PreTrainedModel):  # an Auto class
        return model_class.from_config(config)
    without_pooler = not any("pooler." in name for name in names) and _may_go_without_pooler(model_class)
    return model_class._from_config(config, **({"add_pooling_layer": False} if without_pooler else {}))


def _may_go_without_pooler(model_class: type) -> bool:
    return "add_pooling_layer" in inspect.signature(model_class.__init__).parameters


def _is_base(name: str) -> bool:
    """Whether a class of transformers gives features, not the answers of a head."""
    if name.endswith(VISION_SUFFIXES):
        return True
    tables = (
        MODEL_MAPPING_NAMES,
        MODEL_FOR_IMAGE_MAPPING_NAMES,
        MODEL_FOR_BACKBONE_MAPPING_NAMES,
    )
    values: list[object] = [value for table in tables for value in table.values()]
    return any(name == value or name in value for value in values if isinstance(value, (str, tuple, list)) and value)


def _vision_class(name: str) -> str | None:
    """The class of the vision part of a model of images and texts, such as CLIPModel."""
    names = [name.removesuffix("Model") + suffix for suffix in VISION_SUFFIXES]
    return next((vision for vision in names if hasattr(transformers, vision)), None)
