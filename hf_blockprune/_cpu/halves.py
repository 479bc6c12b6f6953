"""Halves of a layer with the compiled kernels: one call for norm, products, attention and residual."""

import ctypes
import struct

import torch
from torch import Tensor, nn

from ..hub.blockprune_quick_halves import HalfArguments, use_half_runner
from ..hub.blockprune_reference import Int8Arguments, LayerArguments
from .backend import ACTIVATION_CODES, DTYPES
from .library import INT8, CpuLibrary, find_library

HALF = "3q5q3qd4qdq"  # half.h's Half
OUTPUT_SCALE = -2  # place of a field of kernels.h's Layer
_PLAIN = (Tensor, nn.Parameter)


class CpuHalves:
    """Computes halves of layers, see `hub.blockprune_quick_halves.HalfRunner`.

    Args:
        library: the kernels.
    """

    def __init__(self, library: CpuLibrary) -> None:
        self.library = library

    def __call__(self, x: Tensor, half: HalfArguments) -> tuple[Tensor, Tensor | None] | None:
        """See the class.

        Raises:
            MemoryError: no room for working copies and for what passes between the steps.
        """
        dtype, (images, tokens, width) = x.dtype, x.shape
        code, heads = DTYPES.get(dtype), half.heads
        if code is None or not x.is_cpu or not width:
            return None
        x = x if x.is_contiguous() else x.contiguous()
        weight, bias, epsilon = half.norm
        vectors = [weight, bias] if half.output_scale is None else [weight, bias, half.output_scale]
        if not all(_is_row(vector, dtype, width) for vector in vectors):
            return None
        *first, second = half.layers
        hidden = first[0].out_features
        found = [_fields(layer, dtype, width, hidden) for layer in first] + [_fields(second, dtype, hidden, width)]
        fields = [each for each in found if each is not None]
        if len(fields) < len(found) or (
            heads is not None and (len(first) != 3 or heads.heads * heads.head_size != hidden)
        ):
            return None
        if (
            len({layer.weight.dtype for layer in half.layers}) > 1
            or len({layer.weight.shape[2] for layer in first}) > 1
        ):
            return None
        added = None if heads is None or heads.bias is None else heads.bias.contiguous()
        if added is not None and added.shape != (images, tokens):
            return None
        if half.output_scale is not None:
            fields[-1][OUTPUT_SCALE] = half.output_scale.data_ptr()
        numbers = [number for each in fields for number in each]
        layers = (ctypes.c_int64 * len(numbers))(*numbers)
        y, read = x if half.in_place else torch.empty_like(x), torch.empty_like(x) if half.reads else None
        packed = struct.pack(
            HALF,
            x.data_ptr(),
            y.data_ptr(),
            0 if read is None else read.data_ptr(),
            images,
            tokens,
            width,
            code,
            INT8 if isinstance(second, Int8Arguments) else code,
            weight.data_ptr(),
            bias.data_ptr(),
            width,
            epsilon,
            ctypes.addressof(layers),
            len(fields),
            0 if heads is None else heads.heads,
            0 if heads is None else heads.head_size,
            0.0 if heads is None else heads.scale,
            0 if added is None else added.data_ptr(),
        )
        # Bad indices are refused by the layers themselves, which say what is wrong.
        return (y, read) if self.library.half(packed, torch.get_num_threads()) else None


def _is_row(tensor: Tensor, dtype: torch.dtype, size: int) -> bool:
    """Whether a tensor is one that a kernel can read as so many numbers."""
    return (
        type(tensor) in _PLAIN
        and tensor.dtype is dtype
        and tensor.numel() == size
        and tensor.is_contiguous()
        and tensor.is_cpu
    )


def _fields(
    layer: LayerArguments | Int8Arguments, dtype: torch.dtype, in_features: int, out_features: int
) -> list[int] | None:
    """kernels.h's Layer, without what it writes to; None for one that the kernels do not take as it is."""
    weight, crow, col, bias, outputs, activation, residual = layer[:7]
    scale = layer.weight_scale if isinstance(layer, Int8Arguments) else None
    if weight.dim() != 3 or outputs != out_features or residual is not None or activation not in ACTIVATION_CODES:
        return None
    nnz, rows, cols = weight.shape
    if not (
        type(weight) in _PLAIN
        and weight.dtype is (dtype if scale is None else torch.int8)
        and crow.dtype is col.dtype is torch.int32
        and 0 < rows <= max(outputs, 1)
        and 0 < cols <= in_features
        and crow.numel() == -(-outputs // rows) + 1
        and col.numel() == nnz
        and weight.is_contiguous()
        and crow.is_contiguous()
        and col.is_contiguous()
        and weight.is_cpu
        and crow.is_cpu
        and col.is_cpu
        and (bias is None or _is_row(bias, dtype, outputs))
        and (scale is None or _is_row(scale, torch.float32, outputs))
    ):
        return None
    return [
        weight.data_ptr(),
        crow.data_ptr(),
        col.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0,
        0,
        outputs,
        nnz,
        rows,
        cols,
        ACTIVATION_CODES[activation],
        0 if scale is None else scale.data_ptr(),
        0,
        0,
    ]


def register() -> None:
    """Let halves of layers on CPUs be computed by the compiled kernels, where they are."""
    library, _ = find_library()
    if library is not None:
        use_half_runner("cpu", CpuHalves(library))
