"""What transformers' models write and build where layers of them are block-sparse.

`save_pretrained` offers a quantizer neither the folder nor the arguments, and none at all for a model of which only a
part is block-sparse. So `install` extends three methods of `PreTrainedModel`; models without block-sparse layers, and
configs that name none, are handed on as they came. It adds one, `hardware_cost`, for all models.
"""

import copy
import functools
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto

from .blockprune_config import INT8, QUANT_METHOD, BlockPruneQuantizationConfig, JsonDict, StoredHeads, describes
from .blockprune_heads import CutHeads, cut_heads
from .blockprune_layers import block_sparse_layers, is_int8, is_pruned, packed_states
from .blockprune_layout import BlockSparseFormatError
from .blockprune_linear import BlockSparseLinear
from .blockprune_model_cost import hardware_cost
from .blockprune_names import stored_layer_names, unconverted
from .blockprune_tokens import schedule_of

CODE_MODULE = "modeling_blockprune"  # the file that `auto_map` names
CLASS_PREFIX = "BlockPrune"  # of its classes' names
# Stands in config.json where transformers looks for the name of the weights' file, and is what it says where neither
# this code nor the package reads the config before: as a file's name it is refused before any file is looked for.
GUARD_BEGINS = "none that transformers can read alone"  # in every version
WEIGHTS_GUARD = (
    f"{GUARD_BEGINS}, as this model is block-sparse: `pip install hf_blockprune` and `import hf_blockprune` before "
    "loading it, or pass trust_remote_code=True to an Auto class"
)


def install() -> None:
    """Extend `PreTrainedModel`, once in a process: by the package or the copy of this file beside a checkpoint."""
    cls: Any = PreTrainedModel
    if not hasattr(cls, "hardware_cost"):  # asked apart: older copies of this file extended all but that
        cls.hardware_cost = hardware_cost
    if getattr(cls.save_pretrained, "method", None) == QUANT_METHOD:
        return
    cls.save_pretrained = _saving(cls.save_pretrained)
    cls.save_pretrained.method = QUANT_METHOD
    cls._from_config = classmethod(_building(cls._from_config.__func__))
    cls.__init__ = _refusing(cls.__init__)


def stored_config(model: PreTrainedModel, *, original_names: bool = True) -> BlockPruneQuantizationConfig:
    """The config that describes a model's block-sparse layers as they will be stored.

    Args:
        model: a transformers model.
        original_names: whether names in the files are those of the original checkpoints, or the model's own.

    Raises:
        BlockSparseFormatError: the layers differ in block shape, some of them are in int8, or an attention was cut of
            which a layer is dense, which cannot be stored.
    """
    modules = dict(block_sparse_layers(model))
    names = stored_layer_names(model, modules) if original_names else {name: name for name in modules}
    layers = {names[name]: module for name, module in modules.items()}
    shapes = {module.block_shape for module in layers.values()}
    if len(shapes) != 1:
        raise BlockSparseFormatError(
            f"block_shape: the format stores one for all layers, the model has {sorted(shapes)}"
        )
    rounded = {is_int8(module) for module in layers.values()}
    if len(rounded) != 1:
        raise BlockSparseFormatError("dtype: the format stores all layers in int8 or none, the model has some of both")
    schedule = schedule_of(model)
    return BlockPruneQuantizationConfig(
        block_shape=shapes.pop(),
        layers={name: module.nnz_blocks for name, module in layers.items()},
        cut={n: [m.out_features, m.in_features] for n, m in layers.items() if m.dense_shape is not None} or None,
        heads=[_stored_heads(cut, names) for cut in cut_heads(model)] or None,
        tokens=None if schedule is None else {"leave": list(schedule.leave), "patches": schedule.patches},
        dtype=INT8 if rounded.pop() else None,
    ).with_biases(name for name, module in layers.items() if module.bias is not None)


def _stored_heads(cut: CutHeads, names: dict[str, str]) -> StoredHeads:
    """What is stored of a cut attention.

    Args:
        cut: it.
        names: stored names of the block-sparse layers, by module name.

    Raises:
        BlockSparseFormatError: one of its layers is none.
    """
    for name in cut.names():
        if name not in names:
            raise BlockSparseFormatError(f"{name}: is of an attention that was cut, so it must be block-sparse too")
    query, key, value, out = (names[name] for name in cut.names())
    return {"query": query, "key": key, "value": value, "out": out, "heads": cut.heads, "head_size": cut.head_size}


def native_class(model: nn.Module) -> type:
    """A model's class, or for one of those that come with a checkpoint the class of transformers that it stands for."""
    cls = type(model)
    ours = cls.__module__.rpartition(".")[2] == CODE_MODULE
    return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.")) if ours else cls


def forget(config: PreTrainedConfig) -> list[tuple[dict[str, object], str, object]]:
    """Take out of a config, and of those in it, what says that layers are block-sparse, in place.

    Returns:
        (a config's attributes, name, value) of each that was taken.
    """
    taken = []
    for part in list(_parts(config)):
        attributes = vars(part)
        if describes(part):
            taken.append((attributes, "quantization_config", attributes.pop("quantization_config")))
        if str(attributes.get("transformers_weights")).startswith(GUARD_BEGINS):
            taken.append((attributes, "transformers_weights", attributes.pop("transformers_weights")))
        auto_map = attributes.get("auto_map")
        if isinstance(auto_map, dict) and any(map(_is_ours, auto_map.values())):
            taken.append((attributes, "auto_map", attributes.pop("auto_map")))
            if others := {name: value for name, value in auto_map.items() if not _is_ours(value)}:
                attributes["auto_map"] = others
    return taken


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config, and all configs in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _is_ours(reference: object) -> bool:
    """Whether an entry of `auto_map`, "module.Class" or "repository--module.Class", names a class of this code."""
    return isinstance(reference, str) and reference.rpartition("--")[2].startswith(f"{CODE_MODULE}.")


def _saving(original: Callable[..., None]) -> Callable[..., None]:
    parameters = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(
        self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: object, **kwargs: object
    ) -> None:
        # Beside adapters no config is written, and no weights of the model's own.
        if getattr(self, "_hf_peft_config_loaded", False):
            return original(self, save_directory, *args, **kwargs)
        if layers := dict(block_sparse_layers(self)):
            call = parameters.bind(self, save_directory, *args, **kwargs)
            if (state := call.arguments.get("state_dict")) is not None:
                call.arguments["state_dict"] = _packed_state(layers, state)
            original_names = bool(kwargs.get("save_original_format", True))
            with _described(self, original_names=original_names), packed_states(self):
                return original(*call.args, **call.kwargs)
        with _undescribed(self.config):
            return original(self, save_directory, *args, **kwargs)

    return save_pretrained


def _packed_state(layers: dict[str, BlockSparseLinear], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of a model as it is stored."""
    packed = {**state}
    for name, layer in layers.items():
        if (weight := state.get(f"{name}.weight")) is not None and weight.dim() == 2:
            packed[f"{name}.weight"] = layer.packed_like(weight)
    return packed


def _building(original: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    @functools.wraps(original)
    def _from_config(cls: type[PreTrainedModel], config: object, **kwargs: object) -> PreTrainedModel:
        """A dense model: new weights have no blocks, and its config must not say so."""
        if isinstance(config, PreTrainedConfig) and any(map(describes, _parts(config))):
            config = copy.deepcopy(config)
            forget(config)
        return original(cls, config, **kwargs)

    return _from_config


def _refusing(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: PreTrainedModel, config: object, *args: object, **kwargs: object) -> None:
        if isinstance(config, PreTrainedConfig) and describes(config):
            raise BlockSparseFormatError(
                f"{type(self).__name__}(config): the config is a block-sparse model's, which from_pretrained() loads; "
                "AutoModel...from_config(config) builds a dense one with new weights"
            )
        original(self, config, *args, **kwargs)

    return __init__


@contextmanager
def _undescribed(config: PreTrainedConfig) -> Iterator[None]:
    """While it lasts, a config says nothing of block-sparse layers."""
    taken = forget(config)
    try:
        yield
    finally:
        for attributes, name, value in taken:
            attributes[name] = value


@contextmanager
def _described(model: PreTrainedModel, *, original_names: bool) -> Iterator[None]:
    """While it lasts, a model's config describes its block-sparse layers as they are, and saving completes the folder.

    The quantizer stands aside meanwhile: with one, transformers saves other tensors than those passed as `state_dict`.

    Raises:
        BlockSparseFormatError: the layers differ in block shape, or other layers are quantized.
    """
    config, attributes = model.config, vars(model.config)
    quantizer = vars(model).get("hf_quantizer")
    method = QUANT_METHOD if quantizer is None else quantizer.quantization_config.quant_method
    if method != QUANT_METHOD:
        raise BlockSparseFormatError(
            f"{type(model).__name__}: has block-sparse layers and others that {getattr(method, 'value', method)} "
            "quantized; a checkpoint stores the one or the other, so dequantize() it or its part, or save them apart"
        )
    described = stored_config(model)
    stored = described if original_names else stored_config(model, original_names=False)
    vars(model).pop("hf_quantizer", None)
    try:
        with _undescribed(config), unconverted(model, dict(block_sparse_layers(model))):
            attributes["quantization_config"] = stored
            attributes["save_pretrained"] = functools.partial(_save_config, model)
            try:
                yield
            finally:
                attributes.pop("save_pretrained", None)
                attributes.pop("quantization_config", None)
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
            quantizer.quantization_config = config.quantization_config = described


def _save_config(
    model: PreTrainedModel, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: object
) -> None:
    """Stands where the config's own `save_pretrained` stood, which transformers calls before it writes the weights."""
    del vars(model.config)["save_pretrained"]
    model.config.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
    _complete(Path(save_directory), model)


def _complete(folder: Path, model: PreTrainedModel) -> None:
    """Put the code beside a saved config, and in it what leads there."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if (native := native_class(model)) is not type(model):
        values["architectures"] = [native.__name__]
    _describe_parts(values, model.config, model)
    if auto_map := {**_auto_map(model), **values.get("auto_map", {})}:
        values["auto_map"] = auto_map
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if not any(map(_is_ours, auto_map.values())):
        return
    here = Path(__file__).parent
    for source in sorted([here / f"{CODE_MODULE}.py", *here.glob("blockprune_*.py")]):
        if source.parent.resolve() != folder.resolve():
            shutil.copyfile(source, folder / source.name)


def _describe_parts(values: JsonDict, config: PreTrainedConfig, model: PreTrainedModel) -> None:
    """Guard a saved config, and describe the layers in those parts of it that a part of the model is loaded by."""
    values["transformers_weights"] = WEIGHTS_GUARD
    sparse = {id(m.config) for m in model.modules() if isinstance(m, PreTrainedModel) and is_pruned(m)}
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig) and id(part) in sparse and name in values:
            values[name]["quantization_config"] = values["quantization_config"]
            _describe_parts(values[name], part, model)


def _auto_map(model: PreTrainedModel) -> dict[str, str]:
    """For each Auto class of transformers that knows a model's config, the class to load with the code beside it."""
    own = {cls.__name__ for cls in native_class(model).__mro__}
    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("Auto") and mapping is not None and type(model.config) in mapping:
            classes = mapping[type(model.config)]
            names = [cls.__name__ for cls in (classes if isinstance(classes, (list, tuple)) else [classes])]
            chosen = next((candidate for candidate in names if candidate in own), names[0])
            found[name] = f"{CODE_MODULE}.{CLASS_PREFIX}{chosen}"
    return found
