"""Biases that refitting gave to Linears for which an architecture has none unless its config says so."""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..model.loading import build, model_class_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.configuration_utils import PreTrainedConfig


def admit_biases(model: "PreTrainedModel") -> None:
    """Let the config of a dense model ask for every bias that the model has, where the architecture can have them.

    A setting such as `qkv_bias` or `key_bias` holds for several Linears; those that have no bias get one of zeros.
    """
    for holder, setting in list(_settings(model.config)):
        if not (lacking := biases_without_place(model)):
            return
        changed = copy.deepcopy(model.config)
        setattr(getattr(changed, holder) if holder else changed, setting, True)
        if not lacking <= _without(model, changed):
            setattr(getattr(model.config, holder) if holder else model.config, setting, True)
    places = _places(model, model.config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is None and name in places:
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))


def biases_without_place(model: "PreTrainedModel") -> set[str]:
    """Linears of a dense model with a bias that the architecture, as its config describes it, has not."""
    return _without(model, model.config)


def _without(model: "PreTrainedModel", config: "PreTrainedConfig") -> set[str]:
    return {name for name, m in model.named_modules() if _has_bias(m)} - _places(model, config)


def _places(model: "PreTrainedModel", config: "PreTrainedConfig") -> set[str]:
    """Linears that have a bias in a new model of a config."""
    with torch.device("meta"):
        made = build(model_class_of(config), config, model.state_dict())
    return {name for name, module in made.named_modules() if _has_bias(module)}


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.bias is not None


def _settings(config: "PreTrainedConfig") -> Iterator[tuple[str, str]]:
    """(name of the config within the config, or nothing; name) of the settings that give no bias."""
    for holder in ("", "vision_config"):
        part = getattr(config, holder, None) if holder else config
        values = {} if part is None else vars(part)
        yield from ((holder, name) for name, value in values.items() if name.endswith("bias") and value is False)
