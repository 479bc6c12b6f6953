"""The op's `cpu` backend: what is handed to the compiled kernels, and when they are expected to pay.

The kernels read weights and indices where they are, at each call, and check indices before they follow them. Nothing is
kept from one call to the next.
"""

import functools
import logging
import platform
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..hub.blockprune_backends import Backend, LayerArguments, checked_bias, register_backend, use_unpacker
from ..hub.blockprune_layout import MAX_OVERHANGING_BLOCK, BlockSparseFormatError, PackedWeight, check_packed
from ..hub.blockprune_reference import ACTIVATIONS, Int8Arguments
from .library import CpuLibrary, find_library

logger = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATION_CODES = {"none": 0, "gelu": 1, "gelu_tanh": 2}
STRIP, WIDE_STRIP = 16, 32  # outputs of which every instruction set computes a multiple at once


class CpuBackend:
    """Block-sparse products with one build of the kernels.

    Args:
        library: the kernels.
    """

    def __init__(self, library: CpuLibrary) -> None:
        self.library = library
        self._pairs = _multiplies_pairs(library)

    def supports(self, x: Tensor, layer: LayerArguments) -> bool:
        """Whether the kernels know this device and dtype."""
        weight = layer.weight
        return x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in DTYPES

    def pays(self, x: Tensor, layer: LayerArguments) -> bool:
        """Whether the kernels are expected to beat torch's dense product (see `BREAK_EVEN`)."""
        _, rows, cols = layer.weight.shape
        in_features, outputs = x.shape[-1], layer.out_features
        limit = self._break_even(x.dtype, cols) * in_features * outputs
        if rows % STRIP:
            # Counting takes as long as a small product: not where a layer with all its blocks would do.
            most = -(-outputs // STRIP) * STRIP * -(-in_features // cols) * cols
            pays = most <= limit or self.work(in_features, layer) <= limit
        else:
            pays = layer.weight.numel() <= limit
        # Blocks that overhang a matrix are more than it has, which kernels may multiply with in less time all the same.
        return pays or self.beats_dense(layer, in_features, x.numel() // max(1, in_features))

    def beats_dense(self, layer: LayerArguments, in_features: int, tokens: int) -> bool:
        """See `hub.blockprune_backends.Backend`: a call counts as much as the multiplications of its time."""
        _, rows, cols = layer.weight.shape
        strips = rows % STRIP == 0
        cost = multiplication_cost(self.library.isa, strips)
        if (break_even := self._break_even(layer.weight.dtype, cols)) < FLOAT32_BREAK_EVEN:
            pairs = PAIRS_WIDE if rows % WIDE_STRIP == 0 else PAIRS_NARROW
            cost = pairs if self._pairs and cols % 2 == 0 else max(cost, BFLOAT16_MARGIN / break_even)
        if cost > WHOLE_COST and layer.weight.numel() >= in_features * layer.out_features:
            return False
        reading = READ_STRIPS if strips else READ_BLOCKS
        ours = CALL * torch.get_num_threads() + self.work(in_features, layer) * (tokens * cost + reading)
        return ours <= in_features * layer.out_features * (tokens + READ_MATRIX)

    def _break_even(self, dtype: torch.dtype, cols: int) -> float:
        """`BREAK_EVEN` for blocks of so many columns: an odd number makes no pairs."""
        return ODD_BREAK_EVEN if self._pairs and dtype is torch.bfloat16 and cols % 2 else BREAK_EVEN[dtype]

    def work(self, in_features: int, layer: LayerArguments) -> int:
        """Multiplications for each token, padding included.

        Outputs are computed 16 or 32 at once; those of several block rows multiply with what any of the rows keeps.
        """
        if layer.weight.shape[1] % STRIP == 0:
            return layer.weight.numel()
        packed = readable(layer, in_features)
        work = self.library.work(in_features, layer_fields(packed, layer, None, None, ACTIVATION_CODES["none"]))
        return work if work >= 0 else refuse([packed], [layer], in_features)

    def forward(self, x: Tensor, layer: LayerArguments) -> Tensor:
        """See `hub.blockprune_backends.Backend`."""
        out = self.forward_all(x, [layer])[0]
        return out if layer.residual is None else out.add_(layer.residual)

    def forward_all(self, x: Tensor, layers: list[LayerArguments]) -> list[Tensor]:
        """Several layers with the same block width that read the same x [tokens, in_features]."""
        tokens, in_features = x.shape
        x = x if x.stride(1) == 1 else x.contiguous()
        packed = [readable(layer, in_features) for layer in layers]
        biases = [checked_bias(layer, x.dtype) for layer in layers]
        outputs = [x.new_empty((tokens, layer.out_features)) for layer in layers]
        fields: list[int] = []
        for own, layer, bias, y in zip(packed, layers, biases, outputs, strict=True):
            fields += layer_fields(own, layer, bias, y, self._code(layer))
        if not self.library.linear(
            x.data_ptr(), x.stride(0), tokens, in_features, DTYPES[x.dtype], fields, torch.get_num_threads()
        ):
            refuse(packed, layers, in_features)
        return self._activated(outputs, layers)

    def quick(self, x: Tensor, layers: Sequence[LayerArguments]) -> list[Tensor] | None:
        """See `hub.blockprune_backends.Backend`: the product of a small layer takes no longer than a few lines here."""
        dtype, shape = x.dtype, x.shape
        code, in_features = DTYPES.get(dtype), shape[-1]
        if code is None or not x.is_contiguous():
            return None
        leading, limit = shape[:-1], self._break_even(dtype, layers[0].weight.shape[2]) * in_features
        outputs, fields = [], []
        for layer in layers:
            weight, crow, col, bias, out_features, activation, residual = layer
            nnz, rows, cols = weight.shape
            if not (
                residual is None
                and activation in ACTIVATION_CODES
                and weight.dtype is dtype
                and crow.dtype is col.dtype is torch.int32
                and 0 < rows <= out_features
                and 0 < cols <= in_features
                and crow.numel() == -(-out_features // rows) + 1
                and col.numel() == nnz
                and weight.is_contiguous()
                and crow.is_contiguous()
                and col.is_contiguous()
                and (bias is None or (bias.dtype is dtype and bias.numel() == out_features and bias.is_contiguous()))
                and ((rows % STRIP == 0 and nnz * rows * cols <= limit * out_features) or self.pays(x, layer))
            ):
                return None
            y = x.new_empty((*leading, out_features))
            outputs.append(y)
            fields += (
                weight.data_ptr(),
                crow.data_ptr(),
                col.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                y.data_ptr(),
                out_features,
                out_features,
                nnz,
                rows,
                cols,
                self._code(layer),
                0,
                0,
                0,
            )
        address, tokens, threads = x.data_ptr(), x.numel() // in_features, torch.get_num_threads()
        done = self.library.linear(address, in_features, tokens, in_features, code, fields, threads)
        return self._activated(outputs, layers) if done else None

    def _leaves_activation(self, layer: LayerArguments) -> bool:
        """Whether torch's GELU of the outputs takes less time than the kernels', which compute in float32."""
        return self._pairs and layer.weight.dtype is torch.bfloat16

    def _code(self, layer: LayerArguments) -> int:
        return ACTIVATION_CODES["none" if self._leaves_activation(layer) else layer.activation]

    def _activated(self, outputs: list[Tensor], layers: Sequence[LayerArguments]) -> list[Tensor]:
        """What the kernels left to do."""
        if not self._leaves_activation(layers[0]):
            return outputs
        return [ACTIVATIONS[layer.activation](y) for y, layer in zip(outputs, layers, strict=True)]

    def unpack(self, in_features: int, layer: LayerArguments) -> Tensor:
        """The layer's dense matrix [out_features, in_features]; see `hub.blockprune_backends.use_unpacker`."""
        packed = readable(layer, in_features)
        dense = packed.weight.new_empty(layer.out_features, in_features)
        fields = layer_fields(packed, layer, None, dense, ACTIVATION_CODES["none"])
        if not self.library.unpack(in_features, dense.element_size(), fields, torch.get_num_threads()):
            refuse([packed], [layer], in_features)
        return dense


def readable(layer: LayerArguments | Int8Arguments, in_features: int) -> PackedWeight:
    """A layer's tensors, of sizes that fit each other and without gaps.

    Raises:
        BlockSparseFormatError: they do not fit.
    """
    weight, crow_indices, col_indices = packed = layer[:3]
    nnz, rows, cols = weight.shape
    if not (
        1 <= rows <= max(layer.out_features, MAX_OVERHANGING_BLOCK)
        and 1 <= cols <= max(in_features, MAX_OVERHANGING_BLOCK)
        and crow_indices.dtype == col_indices.dtype == torch.int32
        and crow_indices.shape == (-(-layer.out_features // rows) + 1,)
        and col_indices.shape == (nnz,)
    ):
        check_packed("block_sparse_linear", PackedWeight(*packed), layer.out_features, in_features)
    return PackedWeight(*[tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in packed])


def refuse(
    packed: list[PackedWeight], layers: Sequence[LayerArguments] | Sequence[Int8Arguments], in_features: int
) -> NoReturn:
    """Say what the kernels found wrong with one of the layers' indices."""
    for each, layer in zip(packed, layers, strict=True):
        check_packed("block_sparse_linear", each, layer.out_features, in_features)
    raise BlockSparseFormatError("block_sparse_linear: indices changed while they were read; write them between calls")


def layer_fields(
    packed: PackedWeight,
    layer: LayerArguments | Int8Arguments,
    bias: Tensor | None,
    y: Tensor | None,
    activation: int,
    weight_scale: Tensor | None = None,
) -> list[int]:
    """kernels.h's Layer."""
    return [
        packed.weight.data_ptr(),
        packed.crow_indices.data_ptr(),
        packed.col_indices.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if y is None else y.data_ptr(),
        layer.out_features,
        layer.out_features,
        *packed.weight.shape,
        activation,
        0 if weight_scale is None else weight_scale.data_ptr(),
        0,
        0,
    ]


def _has(feature: str) -> bool:
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()


def _bfloat16_break_even() -> float:
    """Torch has instructions for bfloat16 where the processor has some; kernels without them compute in float32."""
    if _has("amx_tile"):
        return 0.1  # not measured: a guess on the safe side, from the rates that processors with AMX state
    if not _has("avx512_bf16"):
        return FLOAT32_BREAK_EVEN
    library, _ = find_library()
    return 0.7 if library is not None and _multiplies_pairs(library) else ODD_BREAK_EVEN


def _multiplies_pairs(library: CpuLibrary) -> bool:
    """Whether the kernels have the instructions for bfloat16 that torch has."""
    return library.isa == "avx512bf16" and not _has("amx_tile")


# Share of multiplications left at which torch's dense product with an unpacked matrix is as fast, from
# benchmarks/kernels.py.
FLOAT32_BREAK_EVEN, ODD_BREAK_EVEN = 1.0, 0.4
BREAK_EVEN = {torch.float32: FLOAT32_BREAK_EVEN, torch.bfloat16: _bfloat16_break_even()}


# What `beats_dense` weighs, in multiplications of torch's product on one thread: fitted to times of single layers on an
# AMD EPYC with AVX-512 and with AVX2 kernels. benchmarks/small_models.py shows what comes of it.
HALF_WIDTH_FAMILIES = ("25",)  # AMD's Zen 4 computes half of AVX-512's width at a time
WHOLE_COST = 0.6  # at most, where nothing is left out: above it the kernels gain too little, or lose with small layers
CALL = 280_000  # what calling the kernels takes longer than calling torch: 6 us
BFLOAT16_MARGIN = 1.4  # the layers of a DeiT-Ti break even with that much fewer blocks than those of a DeiT-B
# Of bfloat16 in pairs, on an AMD EPYC with AVX512-BF16: blocks of a multiple of 32 rows, others.
PAIRS_WIDE, PAIRS_NARROW = 1.2, 1.7
READ_MATRIX, READ_STRIPS, READ_BLOCKS = 4.4, 7, 11  # for each weight, whatever the tokens


@functools.cache
def multiplication_cost(isa: str, strips: bool) -> float:
    """How long the kernels take for a multiplication, torch taking 1, with tokens enough.

    Args:
        isa: of the kernels.
        strips: whether each strip of outputs lies in one row of blocks.
    """
    if isa == "baseline":
        return 1.5  # measured on x86 alone
    if isa.startswith("avx512") and not _torch_has_avx512():
        if _cpuinfo("cpu family") in HALF_WIDTH_FAMILIES:
            return 0.7 if strips else 0.75
        return 0.5 if strips else 0.55
    return 1.1 if strips else 1.2


def _torch_has_avx512() -> bool:
    """Whether torch's float32 products may use AVX-512: oneMKL's do not on processors of other makers than its own."""
    if not torch.backends.mkl.is_available():
        return True
    return "AuthenticAMD" not in (_cpuinfo("vendor_id") or platform.processor())


@functools.cache
def _cpuinfo(key: str) -> str | None:
    """What Linux says of the first processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return None


def register() -> str:
    """Make the compiled kernels the op's preferred backend on CPUs; what runs there, in words."""
    library, description = find_library()
    if library is not None:
        backend = CpuBackend(library)
        register_backend(
            "cpu",
            Backend(
                backend.forward,
                backend.supports,
                backend.pays,
                backend.forward_all,
                backend.quick,
                backend.beats_dense,
            ),
        )
        use_unpacker("cpu", backend.unpack)
    logger.info(f"block-sparse layers on the CPU: {description}")
    return description
