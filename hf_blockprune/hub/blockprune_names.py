"""From names in files to names of modules and back.

Module names change between versions of transformers, names in files do not; transformers' own table of renamings leads
from one to the other.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion

from .blockprune_layout import BlockSparseFormatError

T = TypeVar("T")


def find_linears(model: Any, stored_names: Iterable[str]) -> dict[str, str]:
    """Module names, by stored name, of the Linears that transformers loads each `stored_name.weight` into.

    Raises:
        BlockSparseFormatError: the model has no such Linear, or two names lead to one.
    """
    weights = {f"{name}.weight": True for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    rename = _renamer(model, weights)
    found: dict[str, str] = {}
    taken: set[str] = set()
    for stored_name in stored_names:
        key, _ = rename(f"{stored_name}.weight")
        if key not in weights:
            raise BlockSparseFormatError(
                f"{stored_name}: listed in quantization_config.layers, but {type(model).__name__} has no such Linear"
            )
        if key in taken:
            raise BlockSparseFormatError(f"{stored_name}: a second entry in quantization_config.layers for {key}")
        taken.add(key)
        found[stored_name] = key.removesuffix(".weight")
    return found


def by_module(model: Any, stored: dict[str, T], extra: Iterable[str] = ()) -> dict[str, T]:
    """What is stored, under the names of the model's tensors that it is loaded into; anything else is left out.

    Args:
        model: a transformers model.
        stored: any values by stored name.
        extra: names of tensors that the model does not have yet.

    Raises:
        BlockSparseFormatError: two stored tensors lead to one, so that which is loaded would be left to chance.
    """
    names = dict.fromkeys([*model.state_dict(), *extra], True)
    if len(stored) > 1000 + 10 * len(names):
        raise BlockSparseFormatError(f"the files hold {len(stored):,} tensors for a model of {len(names):,}")
    rename = _renamer(model, names)
    found: dict[str, T] = {}
    origin: dict[str, str] = {}
    for stored_name, value in stored.items():
        key, converter = rename(stored_name)
        if key not in names or converter is not None:
            continue
        if key in origin:
            raise BlockSparseFormatError(f"{stored_name} and {origin[key]} are both stored for {key}; one must go")
        found[key], origin[key] = value, stored_name
    return found


def stored_layer_name(model: Any, runtime_name: str) -> str:
    """The name under which transformers saves a module's weight (the inverse of `find_linears`)."""
    state = revert_weight_conversion(model, {f"{runtime_name}.weight": torch.empty(0)})
    return next(iter(state)).removesuffix(".weight")


def _renamer(model: Any, names: dict[str, Any]) -> Callable[[str], tuple[str, str | None]]:
    """Stored key -> (the model's key, the pattern of a converter that makes it from several)."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    return lambda key: rename_source_key(key, renamings, converters, model.base_model_prefix, names)
