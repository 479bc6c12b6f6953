"""How the parts of a vision transformer feed each other, one feature to one feature."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

# Names within a layer, in transformers 5 as it is now and as it began.
_PARTS = {
    "query": ("attention.q_proj", "attention.attention.query"),
    "key": ("attention.k_proj", "attention.attention.key"),
    "value": ("attention.v_proj", "attention.attention.value"),
    "out": ("attention.o_proj", "attention.output.dense"),
    "fc1": ("mlp.fc1", "intermediate.dense"),
    "fc2": ("mlp.fc2", "output.dense"),
}

# Parameters outside the layers that the stream's features index, with the axis.
_STREAM_AXES = {
    "*embeddings.*_token": 2,
    "*embeddings.position_embeddings": 2,
    "*patch_embeddings.projection.weight": 0,
    "*patch_embeddings.projection.bias": 0,
    "*pooler.dense.weight": 1,
    "*classifier.weight": 1,
}
# Parameters that they do not index.
_OTHER = ("*pooler.dense.bias", "*classifier.bias")


@dataclass(frozen=True)
class TransformerLayer:
    """Module names of the Linears of one ViT layer; outputs of `query`, `key` and `value` fall into `heads` heads."""

    query: str
    key: str
    value: str
    out: str
    fc1: str
    fc2: str
    heads: int

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Linears whose losses depend on each other."""
        return ((self.query, self.key), (self.value, self.out), (self.fc1, self.fc2))


def find_transformer_layers(model: Any, targets: dict[str, nn.Linear]) -> list[TransformerLayer]:
    """The layers of ViT's form whose Linears are all targets; empty for models of another form.

    In these, output u of fc1 is input u of fc2 after an activation that works on each value alone, output d of value is
    input d of out (attention mixes tokens, not features), and output d of query meets output d of key alone.
    """
    heads = getattr(model.config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return []
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    layers = []
    for list_name, modules in lists:
        for index in range(len(modules)):
            prefix = f"{list_name}.{index}."
            names = {
                part: next((prefix + name for name in choices if prefix + name in targets), None)
                for part, choices in _PARTS.items()
            }
            if all(names.values()) and _fits(names, targets, heads):
                layers.append(TransformerLayer(heads=heads, **names))  # type: ignore[arg-type]
    return layers


def _fits(names: dict[str, Any], targets: dict[str, nn.Linear], heads: int) -> bool:
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
        axes: which axis of a parameter they index, by the parameter's name.
        readers: Linears of the layers that have them as inputs.
        writers: Linears of the layers that have them as outputs.
    """

    axes: dict[str, int]
    readers: tuple[str, ...]
    writers: tuple[str, ...]


def find_residual_stream(model: nn.Module) -> ResidualStream | None:
    """Where the residual stream's features are met; None unless every parameter of the model is of a known kind."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = find_transformer_layers(model, linears)
    if not layers:
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
        if name in apart or any(fnmatchcase(name, pattern) for pattern in _OTHER):
            continue
        matches = (axis for pattern, axis in _STREAM_AXES.items() if fnmatchcase(name, pattern))
        axis = axes.get(name, next(matches, None))
        if axis is None or axis >= parameter.dim() or parameter.shape[axis] != width:
            return None
        found[name] = axis
    return ResidualStream(found, readers, writers)
