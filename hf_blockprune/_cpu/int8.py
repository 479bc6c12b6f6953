"""The compiled kernels' products with weights in int8."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..hub.blockprune_int8 import register_int8_backend
from ..hub.blockprune_reference import Int8Arguments
from .backend import ACTIVATION_CODES, DTYPES, layer_fields, readable, refuse
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
        if code is None or not x.is_cpu or not in_features:
            return None
        x = x if x.is_contiguous() else x.contiguous()
        packed = [readable(layer, in_features) for layer in layers]
        # Kept until they were read.
        scales = [layer.weight_scale.contiguous() for layer in layers]
        biases = [None if layer.bias is None else layer.bias.to(x.dtype).contiguous() for layer in layers]
        outputs = [x.new_empty((*x.shape[:-1], layer.out_features)) for layer in layers]
        fields: list[int] = []
        for own, layer, bias, y, scale in zip(packed, layers, biases, outputs, scales, strict=True):
            fields += layer_fields(own, layer, bias, y, ACTIVATION_CODES[layer.activation], scale)
        tokens, threads = x.numel() // in_features, torch.get_num_threads()
        if not self.library.linear(x.data_ptr(), in_features, tokens, in_features, code, fields, threads, weights=INT8):
            refuse(packed, layers, in_features)
        for y, layer in zip(outputs, layers, strict=True):
            if layer.residual is not None:
                y += layer.residual
        return outputs


def register() -> None:
    """Let layers in int8 on CPUs be computed by the compiled kernels, where they are."""
    library, _ = find_library()
    if library is not None:
        register_int8_backend("cpu", CpuInt8(library))
