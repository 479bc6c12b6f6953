"""The block-sparse linear op: y = act(x W^T + b) + residual, with W stored as kept blocks only.

`torch.ops.blockprune.block_sparse_linear` is opaque to the compiler and so works under `torch.compile(fullgraph=True)`
and `torch.export`. Which backend runs is decided at each call. Calls in which torch has no part go past its dispatcher.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .blockprune_backends import LayerArguments, run, run_all, run_quickly
from .blockprune_direct import is_transformed, needs_no_dispatcher
from .blockprune_reference import ACTIVATIONS, composed_forward, dense_backward, reference_backward
from .blockprune_triton_backend import register as register_triton

# Spelled out, because torch 2.6 reads no lists or sequences out of annotations.
LINEARS_SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor[] crow_indices, Tensor[] col_indices, Tensor?[] biases, "
    "SymInt[] out_features, str activations) -> Tensor[]"
)


class _Context(Protocol):
    """What torch hands from an op's forward pass to its backward pass."""

    saved_tensors: tuple[Tensor, ...]
    out_features: int
    activation: str
    backend: str
    has_residual: bool

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def _define_op() -> None:
    """Define the op and its backward pass. Called once in a process, whichever copy of this file comes first."""
    linear = torch.library.custom_op("blockprune::block_sparse_linear", _linear, mutates_args=())
    linear.register_fake(_linear_shape)
    linears = torch.library.custom_op(
        "blockprune::block_sparse_linears", _linears, mutates_args=(), schema=LINEARS_SCHEMA
    )
    linears.register_fake(_linears_shapes)
    backward = torch.library.custom_op("blockprune::block_sparse_linear_backward", _gradients, mutates_args=())
    backward.register_fake(_gradients_shapes)
    backward.register_autograd(_gradients_backward, setup_context=_keep_inputs)
    linear.register_autograd(_linear_backward, setup_context=_keep_for_backward)


# torch reads the schemas of two of the ops out of the annotations of `_linear` and `_gradients`.
def _linear(
    x: Tensor,
    weight: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    backend: str,
    residual: Tensor | None = None,
) -> Tensor:
    layer = LayerArguments(weight, crow_indices, col_indices, bias, out_features, activation, residual)
    return _compute(x, layer, backend)


def _linear_shape(
    x: Tensor,
    weight: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    backend: str,
    residual: Tensor | None = None,
) -> Tensor:
    _check_devices(x, [weight])
    return x.new_empty(*x.shape[:-1], out_features)


def _keep_for_backward(ctx: _Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, crow_indices, col_indices, bias, out_features, activation, backend, residual = inputs
    ctx.save_for_backward(x, weight, crow_indices, col_indices, bias)
    ctx.out_features, ctx.activation, ctx.backend = out_features, activation, backend
    ctx.has_residual = residual is not None


def _linear_backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of what `_linear` takes, given `grad` [..., out_features] of what it returns."""
    x, weight, crow_indices, col_indices, bias = ctx.saved_tensors
    grad_residual = grad if ctx.has_residual else None
    if ctx.activation != "none":  # the pre-activation is cheaper to recompute than to keep
        z = torch.ops.blockprune.block_sparse_linear(
            x, weight, crow_indices, col_indices, bias, ctx.out_features, "none", ctx.backend
        )
        approximate = "tanh" if ctx.activation == "gelu_tanh" else "none"
        grad = torch.ops.aten.gelu_backward(grad, z, approximate=approximate)
    grad_x, grad_weight = torch.ops.blockprune.block_sparse_linear_backward(grad, x, weight, crow_indices, col_indices)
    grad_bias = None if bias is None else grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, grad_weight, None, None, grad_bias, None, None, None, grad_residual


def _linears(
    x: Tensor,
    weights: Sequence[Tensor],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out_features: Sequence[int],
    activations: str,
) -> list[Tensor]:
    arguments = zip(weights, crow_indices, col_indices, biases, out_features, activations.split(), strict=True)
    return _compute_all(x, [LayerArguments(*each) for each in arguments])


def _linears_shapes(
    x: Tensor,
    weights: Sequence[Tensor],
    crow_indices: Sequence[Tensor],
    col_indices: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out_features: Sequence[int],
    activations: str,
) -> list[Tensor]:
    _check_devices(x, weights)
    return [x.new_empty(*x.shape[:-1], n) for n in out_features]


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, crow_indices: Tensor, col_indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the kept blocks, given `grad` [..., out_features] of the product without activation."""
    flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    gradients = dense_backward if x.is_cuda else reference_backward
    grad_x, grad_weight = gradients(flat_grad, flat_x, weight, crow_indices, col_indices)
    return grad_x.view(x.shape), grad_weight


def _gradients_shapes(
    grad: Tensor, x: Tensor, weight: Tensor, crow_indices: Tensor, col_indices: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _keep_inputs(ctx: _Context, inputs: tuple[Tensor, ...], output: object) -> None:
    ctx.save_for_backward(*inputs)


def _gradients_backward(ctx: _Context, grad_x: Tensor | None, grad_weight: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of (g W, the kept blocks of g^T x), by the two ops themselves: so there are gradients of any order."""
    grad, x, weight, crow_indices, col_indices = ctx.saved_tensors
    pattern, n = (crow_indices, col_indices), grad.shape[-1]
    linear, backward = torch.ops.blockprune.block_sparse_linear, torch.ops.blockprune.block_sparse_linear_backward
    of_grad = of_x = of_weight = None
    if grad_x is not None:
        of_grad = linear(grad_x, weight, *pattern, None, n, "none", "auto")
        _, of_weight = backward(grad, grad_x, weight, *pattern)
    if grad_weight is not None:
        through_weight = linear(x, grad_weight, *pattern, None, n, "none", "auto")
        of_grad = through_weight if of_grad is None else of_grad + through_weight
        of_x, _ = backward(grad, x, grad_weight, *pattern)
    return of_grad, of_x, of_weight, None, None


def _compute(x: Tensor, layer: LayerArguments, backend: str) -> Tensor:
    """The op's outputs [..., out_features] of x [..., in_features]."""
    if layer.residual is not None:
        layer = layer._replace(residual=layer.residual.reshape(-1, layer.out_features))
    return run(x.reshape(-1, x.shape[-1]), layer, backend).view(*x.shape[:-1], layer.out_features)


def _compute_all(x: Tensor, layers: list[LayerArguments]) -> list[Tensor]:
    """The outputs of several layers that read x [..., in_features]."""
    outputs = run_all(x.reshape(-1, x.shape[-1]), layers)
    return [out.view(*x.shape[:-1], layer.out_features) for out, layer in zip(outputs, layers, strict=True)]


def _check_devices(x: Tensor, weights: Sequence[Tensor]) -> None:
    """Where a tensor has no data torch takes the shapes' kernel, which computes nothing: not for an input that has."""
    for weight in weights:
        if weight.device != x.device:
            raise ValueError(f"weight: expected on {x.device}, as the input is, got {weight.device}; move or load it")


# A checkpoint's own copy of this file and the installed package may both be loaded; torch refuses a second definition.
if not hasattr(torch.ops.blockprune, "block_sparse_linear"):
    _define_op()


register_triton()


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
    residual: Tensor | None = None,
) -> Tensor:
    """y = activation(x W^T + bias) + residual for a block-sparse W.

    Args:
        x: [..., in_features], any number of leading dimensions, any number of tokens (zero too).
        weight: kept blocks [nnz_blocks, rows, cols], same dtype as x (autocast casts both).
        crow_indices: int32 [block_rows + 1].
        col_indices: int32 [nnz_blocks].
        bias: [out_features] or None.
        out_features: N; the last block row may reach past it.
        activation: "none", "gelu" (exact) or "gelu_tanh".
        backend: "auto" or a name from `blockprune_backends.available_backends()`.
        residual: what is added to the output, of its shape and of x's dtype, or None.

    Returns:
        [..., out_features], dtype of x.

    Raises:
        ValueError: unknown activation or backend, a backend that cannot run these tensors, or a residual of another
            shape or dtype.

    Example:
        >>> W = torch.ones(1, 2, 2)  # the left upper block of a 4x4 matrix
        >>> crow, col = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
        >>> block_sparse_linear(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), W, crow, col, out_features=4)
        tensor([[3., 3., 0., 0.]])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {list(ACTIVATIONS)}")
    # float64 stays as it is, as torch's own autocast has it, which knows no meta device.
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
        residual = residual if residual is None else residual.to(dtype)
    if residual is not None and (residual.shape, residual.dtype) != ((*x.shape[:-1], out_features), x.dtype):
        raise ValueError(
            f"residual: expected {x.dtype} {[*x.shape[:-1], out_features]}, got {residual.dtype} {list(residual.shape)}"
        )
    layer = LayerArguments(weight, crow_indices, col_indices, bias, out_features, activation, residual)
    if is_transformed():
        return composed_forward(x, layer)
    if needs_no_dispatcher(x, (layer,)):
        return _compute(x, layer, backend)
    return torch.ops.blockprune.block_sparse_linear(
        x, weight, crow_indices, col_indices, bias, out_features, activation, backend, residual
    )


def block_sparse_linears(x: Tensor, layers: list[LayerArguments]) -> list[Tensor]:
    """Several layers of one block shape that read the same x, without gradients (see `block_sparse_linear`).

    Args:
        x: [..., in_features].
        layers: what differs between them; without residuals.

    Returns:
        The output of each, [..., out_features].
    """
    if needs_no_dispatcher(x, layers):
        outputs = run_quickly(x, layers)
        return _compute_all(x, layers) if outputs is None else outputs
    weights, crow_indices, col_indices, biases, out_features, activations, _ = zip(*layers, strict=True)
    return torch.ops.blockprune.block_sparse_linears(
        x, weights, crow_indices, col_indices, biases, out_features, " ".join(activations)
    )


def try_quickly(x: Tensor, layers: Sequence[LayerArguments]) -> list[Tensor] | None:
    """`block_sparse_linears` where that takes few steps; None where somebody watches, or kernels do not pay."""
    return run_quickly(x, layers) if needs_no_dispatcher(x, layers) else None
