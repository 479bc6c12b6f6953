"""Smaller dense models: MLPs with fewer hidden units, heads with narrower queries and keys, under a FLOPs budget."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_blockprune.cost.flops import ModelFlops
from hf_blockprune.model.layers import linear_in
from hf_blockprune.model.structure import TransformerLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NarrowAttention(nn.Module):
    """Attention whose queries and keys may be narrower than its values, which transformers' own may not.

    Args:
        query, key, value, out: its Linears.
        heads: their number.
        scaling: what logits are multiplied by; that of the dense model, whatever the width is now.
    """

    def __init__(
        self, query: nn.Linear, key: nn.Linear, value: nn.Linear, out: nn.Linear, *, heads: int, scaling: float
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = query, key, value, out
        self.num_attention_heads, self.scaling = heads, scaling
        self.head_dim = query.out_features // heads

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> tuple[Tensor, None]:
        """[images, tokens, width] to the same shape; attention's weights, which nobody asks for here, are None."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (
            part(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for part in parts
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=self.scaling)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), None


def narrow_attention(
    model: "PreTrainedModel", layer: TransformerLayer, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> None:
    """Put other queries and keys into a layer, in place.

    Args:
        model: the model.
        layer: names of its Linears.
        query: weight [heads x d, width] and bias [heads x d].
        key: the same.

    Raises:
        SystemExit: the attention is not one module with its four Linears, as in ViTs of today's transformers.
    """
    owner = layer.query.rpartition(".")[0]
    names = (layer.query, layer.key, layer.value, layer.out)
    if any(name.rpartition(".")[0] != owner for name in names):
        raise SystemExit(f"{type(model).__name__}: its attention is not one module with four Linears")
    made = NarrowAttention(
        linear(*query),
        linear(*key),
        *(linear_in(model, name) for name in (layer.value, layer.out)),
        heads=layer.heads,
        scaling=model.get_submodule(owner).scaling,  # type: ignore[arg-type]
    )
    model.set_submodule(owner, made)


def cut_units(model: "PreTrainedModel", layer: TransformerLayer, kept: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Leave some hidden units of a layer, in place.

    Args:
        model: the model.
        layer: names of its Linears.
        kept: positions of the units that stay.
        weight: of fc2, [width, kept].
        bias: of fc2, [width].
    """
    fc1 = linear_in(model, layer.fc1)
    model.set_submodule(layer.fc1, linear(fc1.weight[kept], bias_of(fc1)[kept]))
    model.set_submodule(layer.fc2, linear(weight, bias))


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A Linear in single precision with these values."""
    made = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made.eval()


def bias_of(module: nn.Linear) -> Tensor:
    """Its bias, zeros where it has none."""
    return module.weight.new_zeros(module.out_features) if module.bias is None else module.bias


def unit_flops(flops: ModelFlops, model: nn.Module, layer: TransformerLayer) -> float:
    """What one hidden unit of a layer costs an image: a row of fc1 and a column of fc2."""
    fc1, fc2 = linear_in(model, layer.fc1), linear_in(model, layer.fc2)
    return 2 * (flops.linear_tokens[layer.fc1] * fc1.in_features + flops.linear_tokens[layer.fc2] * fc2.out_features)


def units_within(budget: float, flops: ModelFlops, model: nn.Module, layers: list[TransformerLayer]) -> int:
    """How many hidden units of all layers may stay.

    Args:
        budget: FLOPs of an image through the whole model.
        flops: of the model as it is.
        model: with all its hidden units; a unit must cost the same in each layer.
        layers: its layers.

    Raises:
        ValueError: not even one a layer.
        SystemExit: a unit costs more in some layers than in others.
    """
    costs = {unit_flops(flops, model, layer) for layer in layers}
    if len(costs) > 1:
        raise SystemExit("hidden units cost more in some layers than in others; a global ranking would not be fair")
    units = sum(linear_in(model, layer.fc2).in_features for layer in layers)
    allowed = units - max(0.0, flops.total - budget) / costs.pop()
    if allowed < len(layers):
        raise ValueError(f"no hidden units are left under {budget:.3g} FLOPs")
    return int(allowed)
