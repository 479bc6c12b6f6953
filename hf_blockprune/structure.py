"""Which Linears of a transformer layer feed each other: outputs of one are, one by one, what the other reads."""

from dataclasses import dataclass
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
