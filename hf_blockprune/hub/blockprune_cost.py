"""What a linear layer or a whole vision transformer costs on a device: FLOPs, bytes, latency and energy.

Everything follows from shapes, kept blocks and a device profile (`blockprune_profiles`); there is no table to look
anything up in, and torch is not needed. A profile says how a device multiplies with dense and with block-sparse
weights. A layer costs the cheaper of both, as the runtime falls back to a dense product, and one that keeps everything
costs what a dense one does.

Energy constants: Jouppi et al., "Ten Lessons From Three Generations Shaped Google's TPUv4i", ISCA 2021, table 2 (7 nm):
fp16 multiply with fp32 add 0.72 pJ; HBM2 access 250 to 450 pJ for 64 bits, of which the middle is taken.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

PJ_PER_MAC = 0.72
PJ_PER_BYTE_DRAM = 350.0 / 8
PJ_TO_MJ = 1e-9
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
INDEX_BYTES = 4


def linear_flops(tokens: float, weights: float) -> float:
    """FLOPs of multiplying `tokens` rows by `weights` matrix entries (a multiply and an add each)."""
    return 2.0 * tokens * weights


def weights_energy_mj(tokens: float, weights: float, element_bytes: int = 2) -> float:
    """Energy in millijoules of one forward pass through `weights` kept entries: their MACs, and one fetch of each."""
    return (tokens * weights * PJ_PER_MAC + weights * element_bytes * PJ_PER_BYTE_DRAM) * PJ_TO_MJ


class Cost(NamedTuple):
    """Of one forward pass; costs of parts add up.

    Attributes:
        flops: a multiply and an add count as two.
        size_bytes: that pass through the device's main memory, each number once.
        latency_ms: time.
        energy_mj: energy, idling in that time included.
    """

    flops: float = 0.0
    size_bytes: float = 0.0
    latency_ms: float = 0.0
    energy_mj: float = 0.0

    def plus(self, other: "Cost") -> "Cost":
        """Both, one after the other."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: int) -> "Cost":
        """So many of it."""
        return Cost(*(count * value for value in self))


class Linear(NamedTuple):
    """A linear layer's work.

    Attributes:
        tokens: M, of all images of a batch.
        out_features, in_features: N and K.
        dtype: "float32", "bfloat16", "float16" or "int8".
        mask: bool [block_rows, block_cols], None for a dense layer.
        block_shape: (outputs, inputs) of a block.
    """

    tokens: int
    out_features: int
    in_features: int
    dtype: str = "float32"
    mask: np.ndarray | None = None
    block_shape: tuple[int, int] = (1, 1)

    @property
    def is_dense(self) -> bool:
        """Whether every block is kept."""
        return self.mask is None or bool(self.mask.all())

    @property
    def row_inputs(self) -> np.ndarray:
        """Kept inputs of each block row, those past the last input not counted."""
        if self.mask is None:
            return np.full(1, self.in_features)
        widths = np.full(self.mask.shape[1], self.block_shape[1])
        widths[-1] = self.in_features - self.block_shape[1] * (self.mask.shape[1] - 1)
        return self.mask @ widths

    @property
    def row_outputs(self) -> np.ndarray:
        """Outputs of each block row."""
        if self.mask is None:
            return np.full(1, self.out_features)
        heights = np.full(self.mask.shape[0], self.block_shape[0])
        heights[-1] = self.out_features - self.block_shape[0] * (self.mask.shape[0] - 1)
        return heights

    @property
    def weights(self) -> int:
        """Kept entries."""
        return int(self.row_inputs @ self.row_outputs)

    @property
    def weight_bytes(self) -> float:
        """Of what is stored: kept entries, and an index for each block of a sparse layer."""
        indices = 0 if self.is_dense or self.mask is None else INDEX_BYTES * (int(self.mask.sum()) + len(self.mask) + 1)
        return self.weights * ELEMENT_BYTES[self.dtype] + indices

    @property
    def size_bytes(self) -> float:
        """Inputs, weights and outputs, each once."""
        return self.tokens * (self.in_features + self.out_features) * ELEMENT_BYTES[self.dtype] + self.weight_bytes

    @property
    def flops(self) -> float:
        """Of the kept entries."""
        return linear_flops(self.tokens, self.weights)


class Profile(Protocol):
    """What every device's profile can tell."""

    kind: ClassVar[str]  # one of `blockprune_profiles.KINDS`

    @property
    def name(self) -> str:
        """In reports."""
        ...

    def dense(self, work: Linear) -> Cost:
        """A dense product; the mask is left out of account."""
        ...

    def sparse(self, work: Linear) -> Cost:
        """A product with kept blocks alone."""
        ...

    def batched(self, work: Linear, times: int) -> Cost:
        """So many dense products of one size, each with operands of its own."""
        ...

    def elementwise(self, size_bytes: float) -> Cost:
        """An operation that reads and writes so many bytes and multiplies nothing to speak of."""
        ...


def layer_cost(profile: Profile, work: Linear) -> Cost:
    """The cheaper of a dense and a block-sparse product by latency; a dense layer's for a layer that keeps all.

    Example:
        >>> from hf_blockprune.hub.blockprune_profiles import CpuProfile
        >>> profile = CpuProfile("mine", cores=2, ghz=3.0, flops_per_cycle=32)
        >>> mask = np.eye(24, dtype=bool)
        >>> dense, sparse = Linear(197, 768, 768), Linear(197, 768, 768, mask=mask, block_shape=(32, 32))
        >>> layer_cost(profile, sparse).latency_ms < layer_cost(profile, dense).latency_ms
        True
    """
    dense = profile.dense(work._replace(mask=None))
    if work.is_dense:
        return dense
    return min(dense, profile.sparse(work), key=lambda cost: cost.latency_ms)


@dataclass(frozen=True)
class VisionTransformer:
    """A whole model's shape, for what is not a prunable Linear.

    Attributes:
        image_tokens: patches, without class tokens.
        patch_inputs: numbers of a patch.
        tokens: of an image in the layers.
        width, heads, layers, classes: of the model.
        attentions: (heads, features of each) by layer, where they are not all `heads` that share `width`.
        passing: tokens in the attention and in the MLP of each layer, where they are not all `tokens`.
    """

    image_tokens: int
    patch_inputs: int
    tokens: int
    width: int
    heads: int
    layers: int
    classes: int
    attentions: tuple[tuple[int, int], ...] | None = None
    passing: tuple[tuple[int, int], ...] | None = None

    @property
    def layer_counts(self) -> dict[tuple[tuple[int, int], tuple[int, int]], int]:
        """How many layers have so many (heads, features of each), (tokens in the attention, tokens in the MLP)."""
        heads = self.attentions or ((self.heads, self.width // self.heads),) * self.layers
        return dict(Counter(zip(heads, self.passing or ((self.tokens, self.tokens),) * self.layers, strict=True)))


def model_cost(
    profile: Profile, model: VisionTransformer, linears: Iterable[Linear], *, batch: int = 1, dtype: str = "float32"
) -> Cost:
    """A forward pass of a batch.

    Args:
        profile: device.
        model: its shape.
        linears: the Linears of all layers, with the tokens of one image.
        batch: images.
        dtype: of everything.
    """
    total = other_cost(profile, model, batch=batch, dtype=dtype)
    for work in linears:
        total = total.plus(layer_cost(profile, work._replace(tokens=batch * work.tokens, dtype=dtype)))
    return total


def other_cost(profile: Profile, model: VisionTransformer, *, batch: int = 1, dtype: str = "float32") -> Cost:
    """What is no Linear of a layer: patch embedding, attention products, norms, softmax, residuals, head."""
    total = profile.dense(Linear(batch * model.image_tokens, model.width, model.patch_inputs, dtype))
    total = total.plus(profile.dense(Linear(batch, model.classes, model.width, dtype)))
    for ((heads, head_size), (before, after)), layers in model.layer_counts.items():
        parts = list(_attention_parts(profile, before, heads, head_size, batch, dtype))
        for tokens in (before, after):
            states = ELEMENT_BYTES[dtype] * batch * tokens * model.width
            parts += [profile.elementwise(states * 2), profile.elementwise(states * 3)]  # a norm, and what is added
        if after < before:
            parts += _merging_parts(profile, before, after, model.width, batch, dtype)
        for part in parts:
            total = total.plus(part.times(layers))
    return total


def _merging_parts(profile: Profile, before: int, after: int, width: int, batch: int, dtype: str) -> list[Cost]:
    """What it takes to find alike tokens and to merge them: every second one is compared with the others."""
    compared = profile.batched(Linear(before // 2, before - before // 2, width, dtype), batch)
    read_and_written = (2 * before + after) * width + before**2 // 4
    return [compared, profile.elementwise(ELEMENT_BYTES[dtype] * batch * read_and_written)]


def attention_cost(
    profile: Profile, tokens: int, heads: int, head_size: int, *, batch: int = 1, dtype: str = "float32"
) -> Cost:
    """What one layer's attention computes between its Linears: queries with keys, softmax, probabilities with values.

    Args:
        profile: device.
        tokens: of an image.
        heads, head_size: of the attention, and features of each head.
        batch: images.
        dtype: of everything.
    """
    total = Cost()
    for part in _attention_parts(profile, tokens, heads, head_size, batch, dtype):
        total = total.plus(part)
    return total


def _attention_parts(
    profile: Profile, tokens: int, heads: int, head_size: int, batch: int, dtype: str
) -> tuple[Cost, Cost, Cost]:
    scores = profile.batched(Linear(tokens, tokens, head_size, dtype), batch * heads)
    values = profile.batched(Linear(tokens, head_size, tokens, dtype), batch * heads)
    softmax = profile.elementwise(2 * ELEMENT_BYTES[dtype] * batch * heads * tokens**2)
    return scores, values, softmax
