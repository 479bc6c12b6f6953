"""The block-sparse linear op: y = act(x W^T + b), with W stored as kept blocks only.

`torch.ops.blockprune.block_sparse_linear` is opaque to the compiler and so works under `torch.compile(fullgraph=True)`
and `torch.export`. Which backend runs is decided at each call by device and dtype; every backend must equal
`reference`, which is plain PyTorch. Index tensors are trusted here: they are checked when a module is built or loaded.
"""

import os
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, int, str], Tensor]
_BACKENDS: dict[str, tuple[Forward, Callable[[Tensor, Tensor], bool]]] = {}


def register_backend(name: str, forward: Forward, supports: Callable[[Tensor, Tensor], bool]) -> None:
    """Add a backend. Later registrations are preferred; `supports(x, weight)` says whether it can run a call."""
    _BACKENDS[name] = (forward, supports)


def available_backends() -> list[str]:
    """Names of the registered backends, most preferred first."""
    return list(reversed(_BACKENDS))


def choose_backend(x: Tensor, weight: Tensor, backend: str = "auto") -> str:
    """Name of the backend that runs a call; `BLOCKPRUNE_BACKEND` overrides "auto".

    Raises:
        ValueError: the backend is unknown, or cannot run these tensors.
    """
    if backend == "auto":
        backend = os.environ.get("BLOCKPRUNE_BACKEND", "auto")
    if backend == "auto":
        backend = next((name for name in available_backends() if _BACKENDS[name][1](x, weight)), "reference")
    if backend not in _BACKENDS:
        raise ValueError(f"unknown block-sparse backend {backend!r}; choose one of {available_backends()} or 'auto'")
    if not _BACKENDS[backend][1](x, weight):
        raise ValueError(
            f"block-sparse backend {backend!r} cannot run {x.dtype} inputs with {weight.dtype} weights on {x.device}; "
            "convert one of them, or leave the backend at 'auto'"
        )
    return backend


def _block_columns(x: Tensor, cols: int) -> Tensor:
    """x [tokens, in_features] as [block columns, cols * tokens], feature-major, zeros filling up the last column."""
    tokens, features = x.shape
    block_cols = -(-features // cols)
    return F.pad(x.t(), (0, 0, 0, block_cols * cols - features)).reshape(block_cols, cols * tokens)


def reference_forward(
    x: Tensor,
    weight: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    """One matrix product for each block row, over the gathered input features that the row keeps.

    x is turned feature-major once, so that gathering a block column copies one contiguous stretch and the product
    of a block row with all tokens is a single GEMM. Shapes: x [tokens, in_features] -> [tokens, out_features].
    """
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
    return ACTIVATIONS[activation](out)


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


register_backend("reference", reference_forward, lambda x, weight: x.dtype == weight.dtype)


def _define_op() -> None:
    """Define the op and its backward pass. Called once in a process, whichever copy of this file comes first."""

    @torch.library.custom_op("blockprune::block_sparse_linear", mutates_args=())
    def forward(
        x: Tensor,
        weight: Tensor,
        crow_indices: Tensor,
        col_indices: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        backend: str,
    ) -> Tensor:
        run = _BACKENDS[choose_backend(x, weight, backend)][0]
        flat = x.reshape(-1, x.shape[-1])
        out = run(flat, weight, crow_indices, col_indices, bias, out_features, activation)
        return out.view(*x.shape[:-1], out_features)

    @forward.register_fake
    def _(x, weight, crow_indices, col_indices, bias, out_features, activation, backend):
        return x.new_empty(*x.shape[:-1], out_features)

    @torch.library.custom_op("blockprune::block_sparse_linear_backward", mutates_args=())
    def backward(
        grad: Tensor, x: Tensor, weight: Tensor, crow_indices: Tensor, col_indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x, grad_weight = reference_backward(flat_grad, flat_x, weight, crow_indices, col_indices)
        return grad_x.view(x.shape), grad_weight

    @backward.register_fake
    def _(grad, x, weight, crow_indices, col_indices):
        return x.new_empty(x.shape), torch.empty_like(weight)

    def setup_context(ctx, inputs, output):
        x, weight, crow_indices, col_indices, bias, out_features, activation, backend = inputs
        ctx.save_for_backward(x, weight, crow_indices, col_indices, bias)
        ctx.out_features, ctx.activation, ctx.backend = out_features, activation, backend

    def run_backward(ctx, grad):
        x, weight, crow_indices, col_indices, bias = ctx.saved_tensors
        if ctx.activation != "none":  # the pre-activation is cheaper to recompute than to keep
            z = torch.ops.blockprune.block_sparse_linear(
                x, weight, crow_indices, col_indices, bias, ctx.out_features, "none", ctx.backend
            )
            approximate = "tanh" if ctx.activation == "gelu_tanh" else "none"
            grad = torch.ops.aten.gelu_backward(grad, z, approximate=approximate)
        grad_x, grad_weight = torch.ops.blockprune.block_sparse_linear_backward(
            grad, x, weight, crow_indices, col_indices
        )
        grad_bias = None if bias is None else grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_weight, None, None, grad_bias, None, None, None

    forward.register_autograd(run_backward, setup_context=setup_context)


# A checkpoint's own copy of this file and the installed package may both be loaded; torch refuses a second definition.
if not hasattr(torch.ops.blockprune, "block_sparse_linear"):
    _define_op()


def block_sparse_linear(
    x: Tensor,
    weight: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """y = activation(x W^T + bias) for a block-sparse W.

    Args:
        x: [..., in_features], any number of leading dimensions, any number of tokens (zero too).
        weight: kept blocks [nnz_blocks, rows, cols], same dtype as x (autocast casts both).
        crow_indices: int32 [block_rows + 1].
        col_indices: int32 [nnz_blocks].
        bias: [out_features] or None.
        out_features: N; the last block row may reach past it.
        activation: "none", "gelu" (exact) or "gelu_tanh".
        backend: "auto" or a name from `available_backends()`.

    Returns:
        [..., out_features], dtype of x.

    Raises:
        ValueError: unknown activation or backend, or a backend that cannot run these tensors.

    Example:
        >>> W = torch.ones(1, 2, 2)  # the left upper block of a 4x4 matrix
        >>> crow, col = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
        >>> block_sparse_linear(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), W, crow, col, out_features=4)
        tensor([[3., 3., 0., 0.]])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {list(ACTIVATIONS)}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # as torch's own autocast has it
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    return torch.ops.blockprune.block_sparse_linear(
        x, weight, crow_indices, col_indices, bias, out_features, activation, backend
    )
