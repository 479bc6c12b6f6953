"""The block-sparse product in plain PyTorch, forward and backward: what every kernel must equal."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blockprune_layout import PackedWeight, block_rows_of, grid_shape, unpack

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class LayerArguments(NamedTuple):
    """The op's arguments but for x (see `blockprune_ops.block_sparse_linear`); residual is [tokens, out_features]."""

    weight: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None
    out_features: int
    activation: str = "none"
    residual: Tensor | None = None


class Int8Arguments(NamedTuple):
    """Those of a layer in int8 (see `blockprune_int8`): the first seven are `LayerArguments`', weight in int8.

    Attributes:
        weight_scale: float32 [out_features], what a step of each output's weights is worth.
    """

    weight: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None
    out_features: int
    activation: str
    residual: Tensor | None
    weight_scale: Tensor


def _block_columns(x: Tensor, cols: int) -> Tensor:
    """x [tokens, in_features] as [block columns, cols * tokens], feature-major, zeros filling up the last column."""
    tokens, features = x.shape
    block_cols = -(-features // cols)
    return F.pad(x.t(), (0, 0, 0, block_cols * cols - features)).reshape(block_cols, cols * tokens)


def reference_forward(x: Tensor, layer: LayerArguments) -> Tensor:
    """One matrix product for each block row, over the gathered input features that the row keeps.

    x is turned feature-major once, so that gathering a block column copies one contiguous stretch and the product
    of a block row with all tokens is a single GEMM. Shapes: x [tokens, in_features] -> [tokens, out_features].
    """
    weight, crow_indices, col_indices, bias, out_features, activation, residual = layer
    rows, cols = weight.shape[1:]
    tokens = x.shape[0]
    columns = _block_columns(x, cols)
    out = x.new_empty(tokens, out_features)
    starts = crow_indices.tolist()
    for row, (start, end) in enumerate(pairwise(starts)):
        out_row = out[:, row * rows : (row + 1) * rows]
        height = out_row.shape[1]  # the last block row may be cut off
        gathered = columns.index_select(0, col_indices[start:end]).view((end - start) * cols, tokens)
        blocks = weight[start:end, :height].transpose(1, 2).reshape(-1, height)
        if bias is None:
            torch.mm(gathered.t(), blocks, out=out_row)
        else:
            torch.addmm(bias[row * rows : row * rows + height], gathered.t(), blocks, out=out_row)
    out = ACTIVATIONS[activation](out)
    return out if residual is None else out + residual


def reference_backward(
    grad: Tensor, x: Tensor, weight: Tensor, crow_indices: Tensor, col_indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the kept blocks, given `grad` [tokens, out_features] of the product without activation."""
    rows, cols = weight.shape[1:]
    tokens = x.shape[0]
    columns = _block_columns(x, cols)
    grad_columns = torch.zeros_like(columns)
    grad_weight = torch.zeros_like(weight)
    starts = crow_indices.tolist()
    for row, (start, end) in enumerate(pairwise(starts)):
        grad_row = grad[:, row * rows : (row + 1) * rows]
        height = grad_row.shape[1]
        chosen = col_indices[start:end]
        gathered = columns.index_select(0, chosen).view((end - start) * cols, tokens)
        blocks = weight[start:end, :height].transpose(1, 2).reshape(-1, height)
        grad_columns.index_add_(0, chosen, (blocks @ grad_row.t()).view(end - start, cols * tokens))
        grad_weight[start:end, :height] = (gathered @ grad_row).view(-1, cols, height).transpose(1, 2)
    grad_x = grad_columns.view(len(columns) * cols, tokens)[: x.shape[1]].t().contiguous()
    return grad_x, grad_weight


def dense_backward(
    grad: Tensor, x: Tensor, weight: Tensor, crow_indices: Tensor, col_indices: Tensor
) -> tuple[Tensor, Tensor]:
    """The same gradients by products with the unpacked matrix, without a word to the host: quicker on GPUs."""
    rows, cols = weight.shape[1:]
    shape = grad.shape[1], x.shape[1]
    grad_x = grad @ unpack(PackedWeight(weight, crow_indices, col_indices), *shape)
    grid = grid_shape(*shape, (rows, cols))
    full = F.pad(grad.t() @ x, (0, grid[1] * cols - shape[1], 0, grid[0] * rows - shape[0]))
    blocks = full.view(grid[0], rows, grid[1], cols)
    grad_weight = torch.empty_like(weight)
    grad_weight.copy_(blocks[block_rows_of(crow_indices, len(weight)), :, col_indices.long()])
    return grad_x, grad_weight


def composed_forward(x: Tensor, layer: LayerArguments) -> Tensor:
    """The same outputs out of torch's own operators, which torch.func's transforms and forward-mode gradients know.

    Shapes: x [..., in_features] -> [..., out_features].
    """
    weight, crow_indices, col_indices, bias, out_features, activation, residual = layer
    rows, cols = weight.shape[1:]
    grid = grid_shape(out_features, x.shape[-1], (rows, cols))
    places = block_rows_of(crow_indices, len(weight)).long() * grid[1] + col_indices.long()
    blocks = weight.new_zeros(grid[0] * grid[1], rows, cols).index_add(0, places, weight)
    dense = blocks.view(*grid, rows, cols).transpose(1, 2).reshape(grid[0] * rows, grid[1] * cols)
    out = ACTIVATIONS[activation](F.linear(x, dense[:out_features, : x.shape[-1]], bias))
    return out if residual is None else out + residual
