"""The op's `cpu` backend: what the kernels need to know of a layer, prepared once, and the call.

The kernels read `weight` where it is, provided that blocks have a multiple of 16 rows and lie feature-major in memory
(`hub.blockprune_linear.feature_major`), as `BlockSparseLinear` keeps them. Others are copied once into that form.
"""

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hub.blockprune_backends import Backend, LayerArguments, checked_bias, register_backend
from ..hub.blockprune_layout import PackedWeight, check_packed, feature_major, is_feature_major, unpack
from ..hub.blockprune_prepared import PreparedCache
from .library import CpuLibrary, find_library

logger = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATION_CODES = {"none": 0, "gelu": 1, "gelu_tanh": 2}
STRIP = 16  # rows that every instruction set can take at once


@dataclass(frozen=True)
class Pattern:
    """Checked indices of a weight as the kernels want them.

    Attributes:
        crow_indices, col_indices: int32 copies.
        block_shape: (rows, cols), rows a multiple of 16.
        strip_order: int32, every strip once, the longest first, so that threads end together.
        work: multiplications for each token, padding included.
    """

    crow_indices: Tensor
    col_indices: Tensor
    block_shape: tuple[int, int]
    strip_order: Tensor
    work: int


class CpuBackend:
    """Block-sparse products with one build of the kernels.

    Args:
        library: the kernels.
    """

    def __init__(self, library: CpuLibrary) -> None:
        self.library = library
        self._patterns: PreparedCache[Pattern] = PreparedCache()
        self._regrouped: PreparedCache[tuple[Tensor, Pattern]] = PreparedCache()
        self._copies: PreparedCache[Tensor] = PreparedCache()

    def supports(self, x: Tensor, layer: LayerArguments) -> bool:
        """Whether the kernels know this device and dtype."""
        weight = layer.weight
        return x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in DTYPES

    def pays(self, x: Tensor, layer: LayerArguments) -> bool:
        """Whether the kernels are expected to beat torch's dense product (see `BREAK_EVEN`)."""
        work, in_features = layer.weight.numel(), x.shape[-1]
        if layer.weight.shape[1] % STRIP:
            work = self.prepare(in_features, layer)[1].work
        return work <= BREAK_EVEN[x.dtype] * in_features * layer.out_features

    def keeps_copy(self, layer: LayerArguments) -> bool:
        """Whether the kernels cannot read the weight where it is."""
        return layer.weight.shape[1] % STRIP != 0 or not is_feature_major(layer.weight)

    def prepare(self, in_features: int, layer: LayerArguments) -> tuple[Tensor, Pattern]:
        """(the kept blocks feature-major, their pattern), from the caches where nothing changed.

        Raises:
            BlockSparseFormatError: indices that would lead outside the matrix; no kernel sees them.
        """
        packed, out_features = PackedWeight(*layer[:3]), layer.out_features
        weight = packed.weight
        key = (in_features, out_features, weight.shape)
        if weight.shape[1] % STRIP:
            key = (*key, weight.stride(), weight.dtype)
            return self._regrouped.get(packed, key, lambda: self._regroup(in_features, packed, out_features))
        pattern = self._patterns.get(packed[1:], key, lambda: self._pattern(in_features, packed, out_features))
        if not is_feature_major(weight):
            stored = weight
            weight = self._copies.get((stored,), (stored.shape, stored.dtype), lambda: feature_major(stored))
        return weight, pattern

    def forward(self, x: Tensor, layer: LayerArguments) -> Tensor:
        """See `hub.blockprune_backends.Backend`."""
        out = self.forward_all(x, [layer])[0]
        return out if layer.residual is None else out.add_(layer.residual)

    def forward_all(self, x: Tensor, layers: list[LayerArguments]) -> list[Tensor]:
        """Several layers with the same block shape that read the same x [tokens, in_features]."""
        tokens, in_features = x.shape
        x = x if x.stride(1) == 1 else x.contiguous()
        outputs, fields, kept_alive = [], [], []
        for layer in layers:
            blocks, pattern = self.prepare(in_features, layer)
            bias = checked_bias(layer, x.dtype)
            y = x.new_empty(tokens, layer.out_features)
            fields += [
                blocks.data_ptr(),
                pattern.crow_indices.data_ptr(),
                pattern.col_indices.data_ptr(),
                pattern.strip_order.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                y.data_ptr(),
                layer.out_features,
                layer.out_features,
                *pattern.block_shape,
                ACTIVATION_CODES[layer.activation],
            ]
            outputs.append(y)
            kept_alive.append((blocks, pattern, bias))
        self.library.linear(
            x.data_ptr(), x.stride(0), tokens, in_features, DTYPES[x.dtype], fields, torch.get_num_threads()
        )
        return outputs

    def _pattern(self, in_features: int, packed: PackedWeight, out_features: int) -> Pattern:
        check_packed("block_sparse_linear", packed, out_features, in_features)
        weight, crow_indices, col_indices = packed
        rows, cols = weight.shape[1:]
        strips_in_a_row = rows // self.library.strip_rows(rows)
        length = crow_indices.diff().repeat_interleave(strips_in_a_row)
        order = length.argsort(descending=True, stable=True).to(torch.int32)
        # Copies: what was checked is what kernels read, and a cache of the originals would keep them alive.
        return Pattern(crow_indices.clone(), col_indices.clone(), (rows, cols), order, weight.numel())

    def _regroup(self, in_features: int, packed: PackedWeight, out_features: int) -> tuple[Tensor, Pattern]:
        """The matrix in blocks of 16x1: each strip of 16 outputs keeps the inputs that any of its rows keeps."""
        check_packed("block_sparse_linear", packed, out_features, in_features)
        packed = packed._replace(weight=packed.weight.detach())
        dense = unpack(packed, out_features, in_features)
        kept = packed._replace(weight=torch.ones_like(packed.weight, dtype=torch.bool))
        padding = (0, 0, 0, -out_features % STRIP)
        strips = F.pad(dense, padding).view(-1, STRIP, in_features).transpose(1, 2)
        mask = F.pad(unpack(kept, out_features, in_features), padding).view(-1, STRIP, in_features).any(1)
        crow = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        col = mask.nonzero()[:, 1].to(torch.int32)
        blocks = strips[mask].unsqueeze(-1)
        return blocks, self._pattern(in_features, PackedWeight(blocks, crow, col), out_features)


def _has(feature: str) -> bool:
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()


def _bfloat16_break_even() -> float:
    """The kernels compute in single precision; torch has instructions for bfloat16 where the processor has some."""
    if _has("amx_tile"):
        return 0.1  # not measured: a guess on the safe side, from the rates that processors with AMX state
    return 0.4 if _has("avx512_bf16") else FLOAT32_BREAK_EVEN


# Share of multiplications left at which torch's dense product is as fast, from benchmarks/kernels.py.
FLOAT32_BREAK_EVEN = 0.95
BREAK_EVEN = {torch.float32: FLOAT32_BREAK_EVEN, torch.bfloat16: _bfloat16_break_even()}


def register() -> str:
    """Make the compiled kernels the op's preferred backend on CPUs; what runs there, in words."""
    library, description = find_library()
    if library is not None:
        backend = CpuBackend(library)
        functions = backend.forward, backend.supports, backend.pays, backend.keeps_copy, backend.forward_all
        register_backend("cpu", Backend(*functions))
    logger.info(f"block-sparse layers on the CPU: {description}")
    return description
