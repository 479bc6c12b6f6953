"""The compiled kernels' products with weights in int8."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..hub.blockprune_int8 import register_int8_backend
from ..hub.blockprune_layout import PackedWeight, check_packed
from ..hub.blockprune_reference import Int8Arguments
from .backend import ACTIVATION_CODES, DTYPES
from .library import INT8, CpuLibrary, find_library


class CpuInt8:
    """Block-sparse products with weights in int8.

    Args:
        library: the kernels.
    """

    def __init__(self, library: CpuLibrary) -> None:
        self.library = library

    def __call__(self, x: Tensor, layers: Sequence[Int8Arguments]) -> list[Tensor] | None:
        """See `hub.blockprune_int8.Int8Backend`."""
        code, in_features = DTYPES.get(x.dtype), x.shape[-1]
        if code is None or not x.is_cpu or in_features == 0:
            return None
        x = x if x.is_contiguous() else x.contiguous()
        outputs, fields, read = [], [], []
        for layer in layers:
            weight, crow, col, bias, out_features, activation, _, scale = layer
            nnz, rows, cols = weight.shape
            if not (
                crow.dtype is col.dtype is torch.int32
                and rows > 0
                and cols > 0
                and crow.numel() == -(-out_features // rows) + 1
                and col.numel() == nnz
            ):
                check_packed("block_sparse_linear_int8", PackedWeight(weight, crow, col), out_features, in_features)
            if bias is not None and bias.dtype is not x.dtype:
                bias = bias.to(x.dtype)
            y = x.new_empty((*x.shape[:-1], out_features))
            tensors = [
                each if each is None or each.is_contiguous() else each.contiguous()
                for each in (weight, crow, col, bias)
            ]
            read.append(tensors)
            outputs.append(y)
            fields += [0 if each is None else each.data_ptr() for each in (*tensors, y)]
            scale = scale.contiguous()
            read.append(scale)
            fields += [
                out_features,
                out_features,
                nnz,
                rows,
                cols,
                ACTIVATION_CODES[activation],
                scale.data_ptr(),
                0,
                0,
            ]
        tokens, threads = x.numel() // in_features, torch.get_num_threads()
        if not self.library.linear(x.data_ptr(), in_features, tokens, in_features, code, fields, threads, weights=INT8):
            for layer in layers:
                check_packed("block_sparse_linear_int8", PackedWeight(*layer[:3]), layer.out_features, in_features)
        for y, layer in zip(outputs, layers, strict=True):
            if layer.residual is not None:
                y += layer.residual
        return outputs


def register() -> None:
    """Let layers in int8 on CPUs be computed by the compiled kernels, where they are."""
    library, _ = find_library()
    if library is not None:
        register_int8_backend("cpu", CpuInt8(library))
