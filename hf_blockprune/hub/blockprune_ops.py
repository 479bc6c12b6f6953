"""The block-sparse linear op: y = act(x W^T + b), with W stored as kept blocks only.

`torch.ops.blockprune.block_sparse_linear` is opaque to the compiler and so works under `torch.compile(fullgraph=True)`
and `torch.export`. Which backend runs is decided at each call; every backend must equal `reference`, which is plain
PyTorch and the op's specification. Where no kernel can run, or none would pay, `dense` multiplies with the unpacked
matrix, so a pruned model is nowhere slower than a dense one.
"""

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blockprune_layout import PackedWeight, check_indices, unpack
from .blockprune_prepared import PreparedCache

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, int, str], Tensor]


class LayerArguments(NamedTuple):
    """The op's arguments but for x."""

    weight: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None
    out_features: int
    activation: str


class Backend(NamedTuple):
    """One way to run the op.

    Attributes:
        forward: (x [tokens, in_features], weight, crow_indices, col_indices, bias, out_features, activation) ->
            [tokens, out_features].
        supports: (x, weight) -> whether it can run a call.
        pays: (in_features, weight, crow_indices, col_indices, out_features) -> whether it is expected to be faster
            than `dense`; asked for "auto" alone.
        keeps_copy: weight -> whether it works with a copy of the weight from an earlier call.
        forward_all: (x [tokens, in_features], layers that read it, of one block shape) -> their outputs; None where
            one call for several layers is no faster than several.
    """

    forward: Forward
    supports: Callable[[Tensor, Tensor], bool]
    pays: Callable[[int, Tensor, Tensor, Tensor, int], bool]
    keeps_copy: Callable[[Tensor], bool]
    forward_all: Callable[[Tensor, list[LayerArguments]], list[Tensor]] | None


# One registry for all copies of this file in a process, as there is one op: a checkpoint's own copy may define the op
# before the installed package adds its kernels.
_BACKENDS: dict[str, Backend] = vars(torch.ops.blockprune).setdefault("backend_registry", {})


def register_backend(
    name: str,
    forward: Forward,
    supports: Callable[[Tensor, Tensor], bool],
    pays: Callable[[int, Tensor, Tensor, Tensor, int], bool] = lambda *_: True,
    keeps_copy: Callable[[Tensor], bool] = lambda _: False,
    forward_all: Callable[[Tensor, list[LayerArguments]], list[Tensor]] | None = None,
) -> None:
    """Add a backend (see `Backend`). Later registrations are preferred."""
    _BACKENDS[name] = Backend(forward, supports, pays, keeps_copy, forward_all)


def available_backends() -> list[str]:
    """Names of the registered backends, most preferred first."""
    return list(reversed(_BACKENDS))


def choose_backend(
    x: Tensor,
    weight: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    out_features: int,
    backend: str = "auto",
) -> str:
    """Name of the backend that runs a call; `BLOCKPRUNE_BACKEND` overrides "auto".

    "auto-live" passes over backends that would keep a copy of the weight: it is for training, where weights change all
    the time, and not always so that torch records it.

    Raises:
        ValueError: the backend is unknown, or cannot run these tensors.
    """
    if backend in ("auto", "auto-live"):
        backend = os.environ.get("BLOCKPRUNE_BACKEND", backend)
    if backend in ("auto", "auto-live"):
        for name in available_backends():
            candidate = _BACKENDS[name]
            if (
                candidate.supports(x, weight)
                and not (backend == "auto-live" and candidate.keeps_copy(weight))
                and candidate.pays(x.shape[-1], weight, crow_indices, col_indices, out_features)
            ):
                return name
        backend = "reference"
    if backend not in _BACKENDS:
        raise ValueError(f"unknown block-sparse backend {backend!r}; choose one of {available_backends()} or 'auto'")
    if not _BACKENDS[backend].supports(x, weight):
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


_DENSE_WEIGHTS: PreparedCache[Tensor] = PreparedCache()


def dense_forward(
    x: Tensor,
    weight: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    """torch's own Linear with the unpacked matrix, which is kept in memory beside the packed one."""
    packed, in_features = PackedWeight(weight, crow_indices, col_indices), x.shape[-1]

    def make() -> Tensor:
        check_indices("weight", crow_indices, col_indices, -(-in_features // weight.shape[2]))
        return unpack(packed, out_features, in_features)

    key = (out_features, in_features, weight.shape, weight.stride(), weight.dtype)
    dense = _DENSE_WEIGHTS.get(packed, key, make)
    return ACTIVATIONS[activation](F.linear(x, dense, bias))


def _same_dtype(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype


register_backend("reference", reference_forward, _same_dtype)
register_backend("dense", dense_forward, _same_dtype, keeps_copy=lambda _: True)


def run_all(x: Tensor, layers: list[LayerArguments]) -> list[Tensor]:
    """Outputs of layers of one block shape that read the same x [tokens, in_features]; in one call where that pays."""
    names = [choose_backend(x, *layer[:3], layer.out_features) for layer in layers]
    together = _BACKENDS[names[0]].forward_all
    if together is not None and len(set(names)) == 1:
        return together(x, layers)
    return [_BACKENDS[name].forward(x, *layer) for name, layer in zip(names, layers, strict=True)]


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
        name = choose_backend(x, weight, crow_indices, col_indices, out_features, backend)
        flat = x.reshape(-1, x.shape[-1])
        out = _BACKENDS[name].forward(flat, weight, crow_indices, col_indices, bias, out_features, activation)
        return out.view(*x.shape[:-1], out_features)

    @forward.register_fake
    def _(x, weight, crow_indices, col_indices, bias, out_features, activation, backend):
        return x.new_empty(*x.shape[:-1], out_features)

    @torch.library.custom_op("blockprune::block_sparse_linears", mutates_args=())
    def forward_all(
        x: Tensor,
        weights: Sequence[Tensor],
        crow_indices: Sequence[Tensor],
        col_indices: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        out_features: Sequence[int],
        activations: str,
    ) -> list[Tensor]:
        arguments = zip(weights, crow_indices, col_indices, biases, out_features, activations.split(), strict=True)
        outputs = run_all(x.reshape(-1, x.shape[-1]), [LayerArguments(*each) for each in arguments])
        return [out.view(*x.shape[:-1], out.shape[-1]) for out in outputs]

    @forward_all.register_fake
    def _(x, weights, crow_indices, col_indices, biases, out_features, activations):
        return [x.new_empty(*x.shape[:-1], n) for n in out_features]

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
    if backend == "auto" and weight.requires_grad and torch.is_grad_enabled():
        backend = "auto-live"
    return torch.ops.blockprune.block_sparse_linear(
        x, weight, crow_indices, col_indices, bias, out_features, activation, backend
    )


def block_sparse_linears(x: Tensor, layers: list[LayerArguments]) -> list[Tensor]:
    """Several layers of one block shape that read the same x, without gradients (see `block_sparse_linear`).

    Args:
        x: [..., in_features].
        layers: what differs between them.

    Returns:
        The output of each, [..., out_features].
    """
    weights, crow_indices, col_indices, biases, out_features, activations = zip(*layers, strict=True)
    return torch.ops.blockprune.block_sparse_linears(
        x, weights, crow_indices, col_indices, biases, out_features, " ".join(activations)
    )
