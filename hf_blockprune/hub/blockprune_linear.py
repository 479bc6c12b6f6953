"""`BlockSparseLinear`: a drop-in for `torch.nn.Linear` that keeps a pattern of blocks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blockprune_backends import LayerArguments, choose_backend
from .blockprune_direct import is_transformed
from .blockprune_layout import (
    BlockSparseFormatError,
    PackedWeight,
    block_mask,
    check_indices,
    check_packed,
    expand_mask,
    grid_shape,
    pack,
    unpack,
)
from .blockprune_ops import block_sparse_linear, block_sparse_linears, try_quickly
from .blockprune_reference import ACTIVATIONS
from .blockprune_shared import SharedInput
from .blockprune_storage import KeptBlocksLearn, is_best_packed, kept_blocks, unpack_in_pieces


def _check_loaded(module: nn.Module, _incompatible_keys: object) -> None:
    assert isinstance(module, BlockSparseLinear)
    module.check()


def _spread(values: Tensor, axis: int, size: int, places: Tensor | None) -> Tensor:
    """A copy with so many entries along an axis, zeros but at these places; by default the first ones."""
    shape = [*values.shape]
    shape[axis] = size
    places = torch.arange(values.shape[axis]) if places is None else places
    return values.new_zeros(shape).index_copy_(axis, places.to(values.device), values)


class BlockSparseLinear(nn.Module):
    """y = x W^T + b with a block-sparse W; trainable, its pattern fixed.

    `weight` holds either the kept blocks [nnz_blocks, rows, cols], for block-sparse kernels (packed), or the whole
    matrix [out_features, in_features] with zeros elsewhere, for torch's own product (unpacked). A new layer is packed;
    one of a loaded model is what its calls are expected to be faster with (`blockprune_storage`). Both load the same
    states, train the same blocks and are saved the same.

    Args:
        in_features: K.
        out_features: N.
        block_shape: (rows, cols) of a block, in (out_features, in_features) order.
        nnz_blocks: number of kept blocks.
        bias: whether b exists.

    Attributes:
        dense_shape: (out_features, in_features) of the dense Linear that this was cut from, None for one not cut.
        activation: what is applied to the outputs, a name that the op knows; "none" at first.
        shared_input: the layers that read the same tensor as this one and are computed with it, None for one by itself.
        tokens: of the smallest input that is expected; None where nothing is, and the weight stays packed or not.

    The pattern starts out invalid; fill the module with `from_dense`, or with `load_state_dict`, which checks what it
    loads and raises `BlockSparseFormatError` where the indices break the format's rules.

    Example:
        >>> dense = nn.Linear(4, 4)
        >>> sparse = BlockSparseLinear.from_dense(dense, torch.tensor([[True, False], [True, True]]), (2, 2))
        >>> sparse(torch.ones(1, 4)).shape, sparse.density
        (torch.Size([1, 4]), 0.75)
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
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dense_shape: tuple[int, int] | None = None
        self.activation = "none"
        self.shared_input: SharedInput | None = None
        self.tokens: int | None = None
        self.block_shape = (int(block_shape[0]), int(block_shape[1]))
        self.grid_shape = grid_shape(out_features, in_features, self.block_shape)
        if not 0 <= nnz_blocks <= self.grid_shape[0] * self.grid_shape[1]:
            raise BlockSparseFormatError(f"nnz_blocks: {nnz_blocks} is not between 0 and the {self.grid_shape} grid")
        self.weight = self._empty_weight(nnz_blocks, device, dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        crow = torch.zeros(self.grid_shape[0] + 1, dtype=torch.int32, device=device)
        self.register_buffer("crow_indices", crow)
        self.register_buffer("col_indices", torch.zeros(nnz_blocks, dtype=torch.int32, device=device))
        self.register_load_state_dict_post_hook(_check_loaded)
        self.crow_indices: Tensor
        self.col_indices: Tensor

    def _empty_weight(
        self, nnz_blocks: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> nn.Parameter:
        return nn.Parameter(torch.zeros(nnz_blocks, *self.block_shape, device=device, dtype=dtype))

    @classmethod
    def from_dense(cls, linear: nn.Linear, mask: Tensor, block_shape: tuple[int, int]) -> "BlockSparseLinear":
        """Pack a Linear's kept blocks; mask is bool [block_rows, block_cols]. The Linear is left as it is."""
        packed = pack(linear.weight.detach(), mask, block_shape)
        module = cls(
            linear.in_features,
            linear.out_features,
            block_shape,
            len(packed.weight),
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        module.weight.data = packed.weight
        if linear.bias is not None and module.bias is not None:
            module.bias.data = linear.bias.detach().clone()
        module.crow_indices, module.col_indices = packed.crow_indices, packed.col_indices
        module.train(linear.training)
        return module

    @property
    def dtype(self) -> torch.dtype:
        """That a Linear in its place would have."""
        return self.weight.dtype

    @property
    def nnz_blocks(self) -> int:
        """Number of kept blocks."""
        return len(self.col_indices)

    @property
    def density(self) -> float:
        """Kept blocks / all blocks."""
        return self.nnz_blocks / (self.grid_shape[0] * self.grid_shape[1])

    @property
    def is_whole(self) -> bool:
        """Whether every block is kept."""
        return self.nnz_blocks == self.grid_shape[0] * self.grid_shape[1]

    @property
    def is_unpacked(self) -> bool:
        """Whether `weight` is the whole matrix."""
        return self._held_weight().dim() == 2

    def mask(self) -> Tensor:
        """Bool [block_rows, block_cols], True where a block is kept."""
        return block_mask(PackedWeight(self.weight, self.crow_indices, self.col_indices), self.grid_shape[1])

    def entry_mask(self) -> Tensor:
        """Bool [out_features, in_features], True inside of kept blocks."""
        return expand_mask(self.mask(), (self.out_features, self.in_features), self.block_shape)

    def packed(self) -> PackedWeight:
        """The kept blocks as they are now, and where they lie.

        Raises:
            BlockSparseFormatError: the whole matrix has other values than zero where there is no block.
        """
        weight = self.packed_like(self.weight.detach()) if self.is_unpacked else self.weight.detach()
        return PackedWeight(weight, self.crow_indices, self.col_indices)

    def packed_floats(self) -> PackedWeight:
        """`packed`, in numbers that can be computed with, whatever they are stored as."""
        return self.packed()

    def packed_like(self, matrix: Tensor) -> Tensor:
        """The blocks [nnz_blocks, rows, cols] of another matrix [out_features, in_features] with this one's pattern.

        Raises:
            BlockSparseFormatError: as for `packed`.
        """
        return kept_blocks(matrix, self.mask().to(matrix.device), self.block_shape)

    def pack_weight(self) -> None:
        """Hold the kept blocks alone, in the same `Parameter`, and its gradient with it.

        Raises:
            BlockSparseFormatError: as for `packed`.
        """
        if self.is_unpacked:
            packed = self.packed().weight
            self._hold(packed, lambda grad: pack(grad, self.mask(), self.block_shape).weight)

    def unpack_weight(self) -> None:
        """Hold the whole matrix, in the same `Parameter`, and its gradient with it."""
        if not self.is_unpacked:
            self.check()
            self._hold(self._whole(self.weight.detach()), self._whole)

    def _whole(self, blocks: Tensor) -> Tensor:
        packed = PackedWeight(blocks, self.crow_indices, self.col_indices)
        return unpack_in_pieces(packed, self.out_features, self.in_features)

    def _hold(self, weight: Tensor, other_form: Callable[[Tensor], Tensor]) -> None:
        parameter = self.weight
        gradient, parameter.grad = parameter.grad, None
        parameter.data = weight
        parameter.grad = None if gradient is None else other_form(gradient)

    def choose_storage(self) -> None:
        """Pack the weight or unpack it, whichever is expected to be faster with `tokens`; see `is_best_packed`."""
        weight = self._parameters.get("weight")  # None where torch's parametrizations or pruning hold it
        if self.tokens is None or weight is None or weight.is_meta or type(weight.data) is not Tensor:
            return
        layer = LayerArguments(*self.packed(), None, self.out_features)
        if is_best_packed(layer, self.in_features, self.tokens):
            self.pack_weight()
        else:
            self.unpack_weight()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BlockSparseLinear":
        """What `to`, `cuda`, `half` and their like go through: elsewhere the other storage may be the better one."""
        before = self.weight.device, self.weight.dtype
        super()._apply(fn, recurse)
        if before[0].type != "meta" and before != (self.weight.device, self.weight.dtype):
            self.choose_storage()
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if "saves_packed" in vars(self):  # see `blockprune_saving`
            destination[f"{prefix}weight"] = self.packed().weight

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """Takes either form; `state_dict` is a copy that torch made for this."""
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and (weight.dtype == torch.int8) != (self.weight.dtype == torch.int8):
            raise BlockSparseFormatError(
                f"{prefix}weight: {weight.dtype} does not go into a layer in {self.weight.dtype}; quantize() the model "
                "first for one in int8, dequantize() it for one that is not"
            )
        if isinstance(weight, Tensor) and weight.dim() != self.weight.dim():
            crow = state_dict.get(f"{prefix}crow_indices", self.crow_indices)
            col = state_dict.get(f"{prefix}col_indices", self.col_indices)
            state_dict[f"{prefix}weight"] = self._other_form(f"{prefix}weight", PackedWeight(weight, crow, col))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _other_form(self, name: str, found: PackedWeight) -> Tensor:
        """A stored weight in the form that this layer has, where it is one of the right size."""
        size = self.out_features, self.in_features
        if found.weight.dim() == 3:
            check_packed(name, found, *size)
            return unpack(found, *size)
        if found.weight.shape != size:
            return found.weight  # torch says what is wrong with it
        check_indices(name, *found[1:], self.grid_shape[1])
        return kept_blocks(found.weight, block_mask(found, self.grid_shape[1]), self.block_shape)

    def to_dense(
        self, shape: tuple[int, int] | None = None, *, rows: Tensor | None = None, cols: Tensor | None = None
    ) -> nn.Linear:
        """A Linear with the same output but for the activation: zeros where blocks were removed.

        Args:
            shape: (out_features, in_features) to fill up to with zeros.
            rows: int64 [out_features], which output of the Linear each of the layer's is; by default the first ones.
            cols: int64 [in_features], the same of inputs.
        """
        out_features, in_features = shape or (self.out_features, self.in_features)
        dense = nn.Linear(in_features, out_features, bias=self.bias is not None, device="meta")
        weight = unpack(self.packed_floats(), self.out_features, self.in_features)
        dense.weight = nn.Parameter(_spread(_spread(weight, 0, out_features, rows), 1, in_features, cols))
        if self.bias is not None:
            dense.bias = nn.Parameter(_spread(self.bias.detach(), 0, out_features, rows))
        return dense.train(self.training)

    def cut(self, rows: Tensor | None = None, cols: Tensor | None = None) -> "BlockSparseLinear":
        """The layer without some block rows, and so fewer outputs, and without some block columns, and so fewer inputs.

        Args:
            rows: bool [block_rows], True for those that stay; all by default.
            cols: bool [block_cols], likewise.

        Raises:
            BlockSparseFormatError: a row or column that goes holds kept blocks.

        Example:
            >>> layer = BlockSparseLinear.from_dense(nn.Linear(4, 6), torch.eye(3, 2, dtype=torch.bool), (2, 2))
            >>> layer.cut(rows=torch.tensor([True, True, False]))(torch.ones(4)).shape
            torch.Size([4])
        """
        mask = self.mask()
        rows = mask.new_ones(mask.shape[0]) if rows is None else rows
        cols = mask.new_ones(mask.shape[1]) if cols is None else cols
        if mask[~rows].any() or mask[:, ~cols].any():
            raise BlockSparseFormatError("cut: a block row or column that goes holds kept blocks")
        outputs = rows.repeat_interleave(self.block_shape[0])[: self.out_features]
        inputs = cols.repeat_interleave(self.block_shape[1])[: self.in_features]
        dense = self.to_dense()
        dense.weight = nn.Parameter(dense.weight.detach()[outputs][:, inputs])
        if dense.bias is not None:
            dense.bias = nn.Parameter(dense.bias.detach()[outputs])
        dense.out_features, dense.in_features = dense.weight.shape
        small = type(self).from_dense(dense, mask[rows][:, cols], self.block_shape)
        small.dense_shape = self.dense_shape or (self.out_features, self.in_features)
        small.activation, small.tokens = self.activation, self.tokens
        small.choose_storage()
        return small

    def check(self, name: str = "BlockSparseLinear") -> None:
        """Raise `BlockSparseFormatError` where the indices break the format's rules. Meta tensors are passed over."""
        if not self.crow_indices.is_meta and not self.col_indices.is_meta:
            check_indices(name, self.crow_indices, self.col_indices, self.grid_shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs with {self.in_features} features, got {tuple(x.shape)}")
        weight = self._held_weight()
        if weight.dim() == 2:
            y = F.linear(x, self._used(weight), self.bias)
            return y if self.activation == "none" else ACTIVATIONS[self.activation](y)
        shared = None if self.shared_input is None else self.shared_input.output(self, x)
        return self.product(x, self.activation) if shared is None else shared

    def _held_weight(self) -> Tensor:
        """`weight`, past `__getattr__`, which takes longer; parametrizations and torch's pruning put it elsewhere."""
        weight = self._parameters.get("weight")
        return self.weight if weight is None else weight

    def product(self, x: Tensor, activation: str) -> Tensor:
        """The outputs of x [..., in_features] with an activation of the caller's choice."""
        if self.is_unpacked:
            return ACTIVATIONS[activation](F.linear(x, self._used(self.weight), self.bias))
        if not torch.compiler.is_compiling():
            outputs = try_quickly(x, (self.arguments(activation),))
            if outputs is not None:
                return outputs[0]
        return block_sparse_linear(
            x,
            self.weight,
            self.crow_indices,
            self.col_indices,
            self.bias,
            out_features=self.out_features,
            activation=activation,
        )

    @staticmethod
    def products(x: Tensor, arguments: list[LayerArguments]) -> list[Tensor]:
        """The outputs of several layers of this class that read the same x (see `block_sparse_linears`)."""
        return block_sparse_linears(x, arguments)

    def _used(self, weight: Tensor) -> Tensor:
        """A whole matrix as products take it: nothing may change where there is no block."""
        if self.is_whole:
            return weight
        if is_transformed() or (torch.compiler.is_compiling() and torch.is_grad_enabled() and weight.requires_grad):
            return weight * self.entry_mask()
        if torch.is_grad_enabled() and weight.requires_grad:
            used = KeptBlocksLearn.apply(weight, self.mask(), self.block_shape)
            assert isinstance(used, Tensor)
            return used
        return weight

    def arguments(self, activation: str | None = None) -> LayerArguments:
        """What the op takes beside x, by default with the layer's own activation; for packed weights."""
        own, buffers = self._parameters, self._buffers
        weight, bias = own.get("weight"), own.get("bias")
        crow_indices, col_indices = buffers.get("crow_indices"), buffers.get("col_indices")
        return LayerArguments(
            self.weight if weight is None else weight,
            self.crow_indices if crow_indices is None else crow_indices,
            self.col_indices if col_indices is None else col_indices,
            self.bias if bias is None else bias,
            self.out_features,
            self.activation if activation is None else activation,
        )

    def backend_for(self, x: Tensor) -> str:
        """Name of what multiplies with an input, "unpacked" where that is torch's product with the whole matrix."""
        return "unpacked" if self.is_unpacked else choose_backend(x, self.arguments())

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        activation += ", unpacked" if self.is_unpacked else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_shape={self.block_shape}, density={self.density:.3f}{activation}"
        )
