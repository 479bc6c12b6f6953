"""What sets families of vision transformers apart: which features of one part are those of another.

A model of a family that is not listed here can be pruned all the same, but nothing in it changes places: an order of
features that one architecture does not mind may be wrong for another, such as one with rotary position embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Names of a layer's Linears within it, in transformers 5 as it is now and as it began.
PARTS: dict[str, tuple[str, ...]] = {
    "query": ("attention.q_proj", "attention.attention.query", "attention.self.query"),
    "key": ("attention.k_proj", "attention.attention.key", "attention.self.key"),
    "value": ("attention.v_proj", "attention.attention.value", "attention.self.value"),
    "out": ("attention.o_proj", "attention.output.dense"),
    "fc1": ("mlp.fc1", "intermediate.dense"),
    "fc2": ("mlp.fc2", "output.dense"),
}

# Parameters outside the layers that the residual stream's features index, with the axis.
STREAM_AXES: dict[str, int] = {
    "*embeddings.*_token": -1,
    "*embeddings.*_tokens": -1,
    "*embeddings.position_embeddings": -1,
    "*patch_embeddings.projection.weight": 0,
    "*patch_embeddings.projection.bias": 0,
    "*pooler.dense.weight": 1,
    "*classifier.weight": 1,
}
# Parameters that they do not index.
OTHERS = ("*pooler.dense.bias", "*classifier.bias")


@dataclass(frozen=True)
class Family:
    """How models of one family differ from a plain ViT.

    Attributes:
        parts: names of a layer's Linears within it, by part; see `TransformerLayer`.
        scales: names within a layer of parameters [out_features] that a part's outputs are multiplied by, by part.
        heads_stay: whether heads have parameters of their own elsewhere, such as position biases.
        stream_axes: patterns of names of parameters outside the layers' Linears and norms that the residual stream's
            features index, with the axis; an axis of several times the stream's width indexes it as often.
        others: patterns of names of parameters that they do not index.
        one_stream: whether one residual stream runs through all layers; without, it keeps its order.
    """

    parts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: PARTS)
    scales: Mapping[str, str] = field(default_factory=dict)
    heads_stay: bool = False
    stream_axes: Mapping[str, int] = field(default_factory=lambda: STREAM_AXES)
    others: tuple[str, ...] = OTHERS
    one_stream: bool = True


VIT = Family()
BEIT = Family(
    scales={"out": "lambda_1", "fc2": "lambda_2"},
    heads_stay=True,
    stream_axes={**STREAM_AXES, "*.lambda_1": 0, "*.lambda_2": 0},
    others=(*OTHERS, "*.relative_position_bias_table"),
)
DINOV2 = Family(
    scales={"out": "layer_scale1.lambda1", "fc2": "layer_scale2.lambda1"},
    stream_axes={**STREAM_AXES, "*.layer_scale?.lambda1": 0},
)
# Of CLIP and SigLIP the vision towers.
CLIP = Family(
    parts={
        **{part: (f"self_attn.{name}_proj",) for part, name in (("query", "q"), ("key", "k"), ("value", "v"))},
        "out": ("self_attn.out_proj",),
        "fc1": ("mlp.fc1",),
        "fc2": ("mlp.fc2",),
    },
    stream_axes={
        **STREAM_AXES,
        "*embeddings.class_embedding": 0,
        "*embeddings.patch_embedding.weight": 0,
        "*embeddings.patch_embedding.bias": 0,
        "*embeddings.position_embedding.weight": 1,
    },
)
# Its pooling head reads the stream through one matrix of query, key and value; what comes out has features of its own.
SIGLIP = replace(
    CLIP,
    stream_axes={**CLIP.stream_axes, "*head.probe": -1, "*head.attention.in_proj_weight": 1},
    others=(
        *OTHERS,
        "*head.attention.in_proj_bias",
        "*head.attention.out_proj.*",
        "*head.layernorm.*",
        "*head.mlp.*",
    ),
)
SWIN = Family(heads_stay=True, one_stream=False)

_FAMILIES: dict[str, Family] = {
    "vit": VIT,
    "deit": VIT,
    "vit_msn": VIT,
    "beit": BEIT,
    "data2vec-vision": BEIT,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2,
    "swin": SWIN,
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
}


def register_family(model_type: str, family: Family) -> None:
    """Teach the pruner a family of models, under its config's `model_type`; replaces what was known of it."""
    _FAMILIES[model_type] = family


def family_of(model: "PreTrainedModel") -> Family | None:
    """The family of a transformers model, None for one that is not known."""
    return _FAMILIES.get(getattr(model.config, "model_type", ""))
