"""How the parts of a vision transformer feed each other, one feature to one feature."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from .families import Family, family_of
from .layers import layer_lists

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TransformerLayer:
    """Module names of the Linears of one ViT layer; outputs of `query`, `key` and `value` fall into `heads` heads.

    Attributes:
        heads_stay: whether heads may not change places with each other.
    """

    query: str
    key: str
    value: str
    out: str
    fc1: str
    fc2: str
    heads: int
    heads_stay: bool = False

    def names(self) -> tuple[str, ...]:
        """All its Linears."""
        return (self.query, self.key, self.value, self.out, self.fc1, self.fc2)

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Linears whose losses depend on each other."""
        return ((self.query, self.key), (self.value, self.out), (self.fc1, self.fc2))


def find_transformer_layers(model: "PreTrainedModel", targets: dict[str, nn.Linear]) -> list[TransformerLayer]:
    """The layers of ViT's form whose Linears are all targets; empty for models of a family that is not known.

    In these, output u of fc1 is input u of fc2 after an activation that works on each value alone, output d of value is
    input d of out (attention mixes tokens, not features), and output d of query meets output d of key alone.
    """
    family = family_of(model)
    if family is None:
        return []
    layers = []
    for prefix in layer_names(model):
        names = {part: name for part, name in part_names(prefix, family, targets).items() if name is not None}
        heads = _heads(model, names["query"]) if len(names) == len(family.parts) else None
        if heads and _fits(names, targets, heads):
            layers.append(TransformerLayer(heads=heads, heads_stay=family.heads_stay, **names))
    return layers


def layer_names(model: nn.Module) -> list[str]:
    """Names of the modules in lists of layers."""
    return [f"{name}.{child}" for name, layers in layer_lists(model) for child, _ in layers.named_children()]


def part_names(prefix: str, family: Family, linears: dict[str, nn.Linear]) -> dict[str, str | None]:
    """Name of each part's Linear in a layer, None where it is missing."""
    return {
        part: next((f"{prefix}.{name}" for name in choices if f"{prefix}.{name}" in linears), None)
        for part, choices in family.parts.items()
    }


def _heads(model: "PreTrainedModel", query: str) -> int | None:
    """Number of an attention's heads: its own, for models in which it differs, or the config's."""
    attention = model.get_submodule(query.rpartition(".")[0])
    config = getattr(model.config, "vision_config", model.config)
    found = (getattr(attention, name, None) for name in ("num_attention_heads", "num_heads"))
    heads = next((h for h in found if isinstance(h, int)), getattr(config, "num_attention_heads", None))
    return heads if isinstance(heads, int) else None


def _fits(names: dict[str, str], targets: dict[str, nn.Linear], heads: int) -> bool:
    linear = {part: targets[name] for part, name in names.items()}
    width = linear["query"].out_features
    return (
        width % heads == 0
        and width == linear["key"].out_features == linear["value"].out_features == linear["out"].in_features
        and linear["fc1"].out_features == linear["fc2"].in_features
    )


@dataclass(frozen=True)
class ResidualStream:
    """The features that all layers read, and add to.

    Attributes:
        width: number of features.
        axes: which axis of a parameter they index, by the parameter's name; it may be several times as long.
        readers: Linears of the layers that have them as inputs.
        writers: Linears of the layers that have them as outputs.
    """

    width: int
    axes: dict[str, int]
    readers: tuple[str, ...]
    writers: tuple[str, ...]


def find_residual_stream(model: "PreTrainedModel") -> ResidualStream | None:
    """Where the residual stream's features are met; None unless every parameter of the model is of a known kind."""
    family = family_of(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = find_transformer_layers(model, linears)
    if family is None or not family.one_stream or not layers:
        return None
    readers = tuple(name for layer in layers for name in (layer.query, layer.key, layer.value, layer.fc1))
    writers = tuple(name for layer in layers for name in (layer.out, layer.fc2))
    axes = {f"{name}.weight": 1 for name in readers}
    axes |= {f"{name}.{parameter}": 0 for name in writers for parameter in ("weight", "bias")}
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    axes |= {f"{name}.{parameter}": 0 for name in norms for parameter in ("weight", "bias")}
    apart = {f"{name}.bias" for name in readers}
    found = {}
    width = linears[layers[0].query].in_features
    for name, parameter in model.named_parameters():
        if name in apart or any(fnmatchcase(name, pattern) for pattern in family.others):
            continue
        matches = (axis for pattern, axis in family.stream_axes.items() if fnmatchcase(name, pattern))
        axis = axes.get(name, next(matches, None))
        if axis is None or not -parameter.dim() <= axis < parameter.dim() or parameter.shape[axis] % width:
            return None
        found[name] = axis % parameter.dim()
    return ResidualStream(width, found, readers, writers)
