"""From names in files to names of modules and back.

Module names change between versions of transformers, names in files do not; transformers' own table of renamings leads
from one to the other. Its converters, which merge layers into one tensor of the file or split one into layers, know
nothing of blocks: block-sparse layers are stored one by one, as the model has them.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import PreTrainedModel

from .blockprune_headers import TENSOR_NAMES
from .blockprune_layout import BlockSparseFormatError

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightTransform

T = TypeVar("T")


def find_linears(model: PreTrainedModel, stored_names: Iterable[str]) -> dict[str, str]:
    """Module names, by stored name, of the Linears that transformers loads each `stored_name.weight` into.

    Raises:
        BlockSparseFormatError: the model has no such Linear, has several for it, or two names lead to one.
    """
    weights = {f"{name}.weight": True for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    rename = _renamer(model, weights)
    found: dict[str, str] = {}
    taken: set[str] = set()
    for stored_name in stored_names:
        key, converter = rename(f"{stored_name}.weight")
        if key not in weights:
            raise BlockSparseFormatError(
                f"{stored_name}: listed in quantization_config.layers, but {type(model).__name__} has no such Linear"
            )
        if converter is not None:
            raise BlockSparseFormatError(
                f"{stored_name}: one layer in the file, but several in {type(model).__name__} of this version of "
                "transformers; load it with the version that it was saved with, and dequantize() it there"
            )
        if key in taken:
            raise BlockSparseFormatError(f"{stored_name}: a second entry in quantization_config.layers for {key}")
        taken.add(key)
        found[stored_name] = key.removesuffix(".weight")
    return found


def by_module(model: PreTrainedModel, stored: dict[str, T], extra: Iterable[str] = ()) -> dict[str, T]:
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


def stored_layer_names(model: PreTrainedModel, names: Collection[str]) -> dict[str, str]:
    """The names under which transformers saves block-sparse layers, by module name (the inverse of `find_linears`)."""
    weights = {f"{name}.weight": torch.empty(0) for name in names}
    owner = {id(weight): key.removesuffix(".weight") for key, weight in weights.items()}
    with unconverted(model, names):
        stored = revert_weight_conversion(model, weights)
    return {owner[id(weight)]: key.removesuffix(".weight") for key, weight in stored.items()}


def unstorable(
    model: PreTrainedModel, names: Collection[str], tensors: tuple[str, ...] = (*TENSOR_NAMES, "bias")
) -> list[str]:
    """Those layers, by module name, of which tensors would not be found again under the layer's stored name."""
    stored = stored_layer_names(model, names)
    rename = _renamer(model, {f"{name}.{tensor}": True for name in names for tensor in tensors})
    return [
        name
        for name in names
        if name not in stored
        or any(rename(f"{stored[name]}.{tensor}") != (f"{name}.{tensor}", None) for tensor in tensors)
    ]


@contextmanager
def unconverted(model: PreTrainedModel, layers: Collection[str]) -> Iterator[None]:
    """While it lasts, transformers saves these layers, and those it would merge with them, as the model has them."""
    transforms = _saving_transforms(model)
    keys = _merged_with(model, transforms, layers)
    before = vars(model).get("_weight_conversions")
    vars(model)["_weight_conversions"] = [
        _PartialConverter.of(transform, keys) if isinstance(transform, WeightConverter) else transform
        for transform in transforms
    ]
    try:
        yield
    finally:
        del model._weight_conversions
        if before is not None:
            model._weight_conversions = before


class _PartialConverter(WeightConverter):
    """A converter that passes over some of a model's tensors when it is reversed for saving."""

    passed_over: frozenset[str] = frozenset()

    @classmethod
    def of(cls, converter: WeightConverter, keys: frozenset[str]) -> "_PartialConverter":
        sources, targets = converter._original_source_patterns, converter._original_target_patterns
        partial = cls(list(sources), list(targets), operations=converter.operations)
        partial.scope_prefix, partial.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        partial.passed_over = keys
        return partial

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return (source_key, None) if source_key in self.passed_over else super().rename_source_key(source_key)

    def reverse_transform(self) -> "_PartialConverter":
        backwards = super().reverse_transform()
        assert isinstance(backwards, _PartialConverter)  # transformers makes it of the converter's own class
        backwards.passed_over = self.passed_over
        return backwards


def _saving_transforms(model: PreTrainedModel) -> "list[WeightTransform]":
    """What `revert_weight_conversion` reverts: what a model was loaded with, or what one like it would be."""
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is not None:
        return transforms
    # Whether a prefix was there is known of a model that was loaded alone.
    return [t for t in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(t, PrefixChange)]


def _merged_with(
    model: PreTrainedModel, transforms: "list[WeightTransform]", layers: Collection[str]
) -> frozenset[str]:
    """Names of the tensors that converters would merge with one of these layers' when saving, theirs among them."""
    backwards = [t.reverse_transform() for t in transforms[::-1] if isinstance(t, WeightConverter)]
    merged: defaultdict[str, set[str]] = defaultdict(set)
    for key in {*model.state_dict(), *(f"{name}.weight" for name in layers)} if backwards else ():
        # Declared for converters alone, which these are, but for what reversing them is declared to give.
        target, pattern = rename_source_key(key, [], backwards)  # pyright: ignore[reportArgumentType]
        if pattern is not None:
            merged[target].add(key)
    inside = set(layers)
    return frozenset(
        key for keys in merged.values() if any(k.rpartition(".")[0] in inside for k in keys) for key in keys
    )


def _renamer(model: PreTrainedModel, names: dict[str, bool]) -> Callable[[str], tuple[str, str | None]]:
    """Stored key -> (the model's key, the pattern of a converter that makes it from several)."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    return lambda key: rename_source_key(key, renamings, converters, model.base_model_prefix, names)
