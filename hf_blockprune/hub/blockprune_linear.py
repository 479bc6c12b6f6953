"""`BlockSparseLinear`: a drop-in for `torch.nn.Linear` that stores and multiplies kept blocks only."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_hooks

from .blockprune_backends import LayerArguments
from .blockprune_direct import is_transformed
from .blockprune_layout import (
    BlockSparseFormatError,
    PackedWeight,
    block_mask,
    check_indices,
    grid_shape,
    pack,
    unpack,
)
from .blockprune_ops import block_sparse_linear, block_sparse_linears, try_quickly


class _Waiting(NamedTuple):
    """An output that its layer has not asked for, and what it was computed from beside the input."""

    y: Tensor
    layer: LayerArguments
    weight_version: int
    bias_version: int

    def is_that_of(self, layer: LayerArguments) -> bool:
        """Whether neither tensor was replaced or changed in place."""
        then = self.layer
        return (
            layer.weight is then.weight
            and layer.bias is then.bias
            and _version(layer.weight) == self.weight_version
            and _version(layer.bias) == self.bias_version
        )


class SharedInput:
    """Layers that read the same tensor: whichever is called first computes all of them, the others take their outputs.

    Only in eager inference: a compiled graph keeps nothing from call to call, and training needs each layer's gradient.

    Args:
        layers: block-sparse layers of one block shape and as many inputs.
    """

    def __init__(self, layers: "list[BlockSparseLinear]") -> None:
        self._layers = list(layers)
        self._last: tuple[Tensor, int, dict[int, _Waiting]] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Copies and files hold the layers, not what was computed."""
        return {"_layers": self._layers, "_last": None}

    def output(self, layer: "BlockSparseLinear", x: Tensor) -> Tensor | None:
        """The output of one of the layers; None where each layer is to compute its own."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_meta or is_transformed():
            return None
        if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            return None
        last = self._last
        # Each output is given once, and only for the very tensors that it was computed from.
        if last is not None and last[0] is x and last[1] == _version(x):
            waiting = last[2].pop(id(layer), None)
            if not last[2]:
                self._last = None
            if waiting is not None and waiting.is_that_of(layer.arguments()):
                return waiting.y
        return self._compute(layer, x)

    def _compute(self, layer: "BlockSparseLinear", x: Tensor) -> Tensor | None:
        """The output of one layer; those of the others wait."""
        layers, arguments, is_one = self._layers, [], False
        for other in layers:
            each = other.arguments()
            # Hooks may change a weight or an input. Offloaded weights are there only while their own layer runs.
            if is_watched(other) or (not (each.weight.is_cpu and x.is_cpu) and each.weight.device != x.device):
                return None
            arguments.append(each)
            is_one = is_one or other is layer
        if not is_one:  # `DataParallel` calls replicas of the layers
            return None
        waiting = {}
        for other, each, y in zip(layers, arguments, block_sparse_linears(x, arguments), strict=True):
            waiting[id(other)] = _Waiting(y, each, _version(each.weight), _version(each.bias))
        y = waiting.pop(id(layer)).y
        self._last = (x, _version(x), waiting)
        return y


def _version(tensor: Tensor | None) -> int:
    """Grows with each change in place; tensors from inference mode have none."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def is_watched(module: nn.Module) -> bool:
    """Whether anyone gets or changes what goes in or out of a module: by a hook, or with a `forward` of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        # Of all modules; torch 2.6 has no function that says so.
        or torch_hooks._global_forward_hooks
        or torch_hooks._global_forward_pre_hooks
        or torch_hooks._global_backward_hooks
        or torch_hooks._global_backward_pre_hooks
    )


def _check_loaded(module: nn.Module, _incompatible_keys: object) -> None:
    assert isinstance(module, BlockSparseLinear)
    module.check()


class BlockSparseLinear(nn.Module):
    """y = x W^T + b with a block-sparse W; trainable, its pattern fixed.

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
        self.block_shape = (int(block_shape[0]), int(block_shape[1]))
        self.grid_shape = grid_shape(out_features, in_features, self.block_shape)
        if not 0 <= nnz_blocks <= self.grid_shape[0] * self.grid_shape[1]:
            raise BlockSparseFormatError(f"nnz_blocks: {nnz_blocks} is not between 0 and the {self.grid_shape} grid")
        self.weight = nn.Parameter(torch.zeros(nnz_blocks, *self.block_shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        crow = torch.zeros(self.grid_shape[0] + 1, dtype=torch.int32, device=device)
        self.register_buffer("crow_indices", crow)
        self.register_buffer("col_indices", torch.zeros(nnz_blocks, dtype=torch.int32, device=device))
        self.register_load_state_dict_post_hook(_check_loaded)
        self.crow_indices: Tensor
        self.col_indices: Tensor

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
    def nnz_blocks(self) -> int:
        """Number of kept blocks."""
        return len(self.weight)

    @property
    def density(self) -> float:
        """Kept blocks / all blocks."""
        return self.nnz_blocks / (self.grid_shape[0] * self.grid_shape[1])

    def _packed(self) -> PackedWeight:
        return PackedWeight(self.weight.detach(), self.crow_indices, self.col_indices)

    def mask(self) -> Tensor:
        """Bool [block_rows, block_cols], True where a block is kept."""
        return block_mask(self._packed(), self.grid_shape[1])

    def to_dense(self, shape: tuple[int, int] | None = None) -> nn.Linear:
        """A Linear with the same output but for the activation: zeros where blocks were removed.

        Args:
            shape: (out_features, in_features) to fill up to with zeros, at the end of each.
        """
        out_features, in_features = shape or (self.out_features, self.in_features)
        more = out_features - self.out_features
        dense = nn.Linear(in_features, out_features, bias=self.bias is not None, device="meta")
        weight = unpack(self._packed(), self.out_features, self.in_features)
        dense.weight = nn.Parameter(F.pad(weight, (0, in_features - self.in_features, 0, more)))
        if self.bias is not None:
            dense.bias = nn.Parameter(F.pad(self.bias.detach(), (0, more)))
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
        small.activation = self.activation
        return small

    def check(self, name: str = "BlockSparseLinear") -> None:
        """Raise `BlockSparseFormatError` where the indices break the format's rules. Meta tensors are passed over."""
        if not self.crow_indices.is_meta and not self.col_indices.is_meta:
            check_indices(name, self.crow_indices, self.col_indices, self.grid_shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs with {self.in_features} features, got {tuple(x.shape)}")
        shared = None if self.shared_input is None else self.shared_input.output(self, x)
        return self.product(x, self.activation) if shared is None else shared

    def product(self, x: Tensor, activation: str) -> Tensor:
        """The outputs of x [..., in_features] with an activation of the caller's choice."""
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

    def arguments(self, activation: str | None = None) -> LayerArguments:
        """What the op takes beside x, by default with the layer's own activation."""
        # Past `__getattr__`, which takes longer; but parametrizations and torch's own pruning put tensors elsewhere.
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

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_shape={self.block_shape}, density={self.density:.3f}{activation}"
        )
