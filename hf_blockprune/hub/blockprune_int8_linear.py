"""`Int8BlockSparseLinear`: a block-sparse layer whose weight takes a byte for each kept entry."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .blockprune_int8 import dequantize_weight, int8_backend_of, int8_linears, quantize_weight
from .blockprune_layout import BlockSparseFormatError, PackedWeight
from .blockprune_linear import BlockSparseLinear
from .blockprune_reference import Int8Arguments


def _copy_rest(layer: BlockSparseLinear, made: BlockSparseLinear, packed: PackedWeight) -> None:
    """Give one layer copies of what another has beside its weight."""
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().to(made.dtype, copy=True), layer.bias.requires_grad)
    made.crow_indices, made.col_indices = packed.crow_indices.clone(), packed.col_indices.clone()
    made.dense_shape, made.activation, made.tokens = layer.dense_shape, layer.activation, layer.tokens
    made.train(layer.training)


class Int8BlockSparseLinear(BlockSparseLinear):
    """y = x (weight * weight_scale)^T + b with the kept blocks in int8; for inference alone.

    Inputs and outputs have the model's dtype. Each token of an input is rounded to int8 as well, by its own largest
    value, when it comes.

    Args:
        in_features, out_features, block_shape, nnz_blocks, bias, device: as of `BlockSparseLinear`.
        dtype: of the bias.

    Attributes:
        weight_scale: float32 [out_features], whatever dtype the model is moved to.

    Example:
        >>> dense = nn.Linear(4, 4)
        >>> sparse = BlockSparseLinear.from_dense(dense, torch.ones(2, 2, dtype=torch.bool), (2, 2))
        >>> small = Int8BlockSparseLinear.from_float(sparse)
        >>> small.weight.dtype, torch.allclose(small(torch.ones(1, 4)), dense(torch.ones(1, 4)), atol=0.02)
        (torch.int8, True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_shape: tuple[int, int],
        nnz_blocks: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, block_shape, nnz_blocks, bias=bias, device=device, dtype=dtype)
        scale = torch.ones(out_features, dtype=torch.float32, device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self._float_dtype = dtype or torch.get_default_dtype()

    def _empty_weight(
        self, nnz_blocks: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> nn.Parameter:
        weight = torch.zeros(nnz_blocks, *self.block_shape, device=device, dtype=torch.int8)
        return nn.Parameter(weight, requires_grad=False)

    @classmethod
    def from_float(cls, layer: BlockSparseLinear) -> "Int8BlockSparseLinear":
        """A layer's rounded copy; the layer is left as it is.

        Raises:
            BlockSparseFormatError: a weight is not finite.
        """
        packed = layer.packed()
        made = cls(
            layer.in_features,
            layer.out_features,
            layer.block_shape,
            layer.nnz_blocks,
            bias=layer.bias is not None,
            device="meta",
            dtype=packed.weight.dtype,
        )
        weight, scale = quantize_weight(packed, layer.out_features)
        made.weight = nn.Parameter(weight, requires_grad=False)
        made.weight_scale = nn.Parameter(scale, requires_grad=False)
        _copy_rest(layer, made, packed)
        return made

    def to_float(self, dtype: torch.dtype | None = None) -> BlockSparseLinear:
        """The layer with weights that are what this one's stand for, in a floating dtype, by default its bias's."""
        packed = self.packed_floats()
        made = BlockSparseLinear(
            self.in_features,
            self.out_features,
            self.block_shape,
            self.nnz_blocks,
            bias=self.bias is not None,
            device="meta",
        )
        made.weight = nn.Parameter(packed.weight.to(dtype or self.dtype))
        _copy_rest(self, made, packed)
        return made

    @property
    def dtype(self) -> torch.dtype:
        """That a Linear in its place would have."""
        return self._float_dtype if self.bias is None else self.bias.dtype

    def packed_floats(self) -> PackedWeight:
        """What the kept blocks stand for, in float32."""
        packed = self.packed()
        return packed._replace(weight=dequantize_weight(packed, self.weight_scale.detach()))

    def unpack_weight(self) -> None:
        """Refused: kernels for int8 read kept blocks.

        Raises:
            BlockSparseFormatError: always.
        """
        raise BlockSparseFormatError("unpack_weight: a layer in int8 has kept blocks alone; dequantize() the model")

    def choose_storage(self) -> None:
        """Kept blocks are the one form of a weight in int8."""

    def cut(self, rows: Tensor | None = None, cols: Tensor | None = None) -> BlockSparseLinear:
        """Refused.

        Raises:
            BlockSparseFormatError: always.
        """
        raise BlockSparseFormatError("cut: a layer in int8 keeps its size; cut it before it is quantized")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8BlockSparseLinear":
        """Another dtype of the model is one of inputs, outputs and bias; half of a scale would be another number."""
        scale = self.weight_scale.data
        super()._apply(fn, recurse)
        moved = self.weight_scale.data
        if moved.dtype != scale.dtype:
            self.weight_scale.data = torch.empty_like(scale, device="meta") if moved.is_meta else scale.to(moved.device)
        probe = fn(torch.empty(0, dtype=self._float_dtype, device=scale.device))
        self._float_dtype = probe.dtype
        return self

    def product(self, x: Tensor, activation: str) -> Tensor:
        """The outputs of x [..., in_features] with an activation of the caller's choice."""
        return int8_linears(x, (self.arguments(activation),))[0]

    @staticmethod
    def products(x: Tensor, arguments: list[Int8Arguments]) -> list[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The outputs of several layers of this class that read the same x (see `int8_linears`)."""
        return int8_linears(x, arguments)

    def arguments(self, activation: str | None = None) -> Int8Arguments:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What the op takes beside x, by default with the layer's own activation."""
        own, buffers = self._parameters, self._buffers
        weight, scale = own.get("weight"), own.get("weight_scale")
        crow_indices, col_indices = buffers.get("crow_indices"), buffers.get("col_indices")
        return Int8Arguments(
            self.weight if weight is None else weight,
            self.crow_indices if crow_indices is None else crow_indices,
            self.col_indices if col_indices is None else col_indices,
            own.get("bias"),
            self.out_features,
            self.activation if activation is None else activation,
            None,
            self.weight_scale if scale is None else scale,
        )

    def backend_for(self, x: Tensor) -> str:
        """Name of what multiplies with an input."""
        return int8_backend_of(x.device.type)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8"
