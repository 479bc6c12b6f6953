"""The block-sparse product with weights in int8: y = act(x W^T + b) + residual, W = weight * weight_scale.

Weights are rounded once, to 255 steps for each output; x at each call, to 255 steps for each token, without
calibration. Both are symmetric about zero. What the whole numbers' products sum up to is exact in int32, so that every
backend has the same sums, and outputs differ by what float32 rounds after them.
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .blockprune_direct import is_transformed, needs_no_dispatcher
from .blockprune_layout import BackendError, BlockSparseFormatError, PackedWeight, block_rows_of, check_packed, unpack
from .blockprune_reference import ACTIVATIONS, Int8Arguments

LARGEST = 127  # of a rounded number, either way
NOTHING = 1e-30  # a token whose values are all smaller counts as zeros
MAX_IN_FEATURES = 1 << 17  # more could sum up to what int32 cannot hold
FOR_FLOATS = {"dense": "reference"}  # what a name of `blockprune_backends` stands for
EXACT_FEATURES = 1024  # whose products sum up in float32 without rounding
# `Int8Arguments` behind x.
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor crow_indices, Tensor col_indices, Tensor? bias, SymInt out_features, "
    "str activation, Tensor? residual, Tensor weight_scale) -> Tensor"
)
NO_GRADIENTS = (
    "layers in int8 have no gradients; train the model that quantize() was given, or call model.dequantize(), and "
    "quantize what comes of it"
)


def quantize_weight(packed: PackedWeight, out_features: int) -> tuple[Tensor, Tensor]:
    """Round kept blocks to int8, each output to steps of its own.

    Args:
        packed: of a floating dtype.
        out_features: of the matrix.

    Returns:
        (int8 [nnz_blocks, rows, cols], float32 [out_features] that it is to be multiplied with).

    Raises:
        BlockSparseFormatError: a weight is not finite, or not to be had in float32.

    Example:
        >>> packed = PackedWeight(torch.tensor([[[1.0, -0.5]]]), torch.tensor([0, 1]), torch.tensor([0]))
        >>> quantize_weight(packed, 1)[0]
        tensor([[[127, -64]]], dtype=torch.int8)
    """
    blocks = packed.weight.detach().float()
    if not blocks.isfinite().all():
        raise BlockSparseFormatError("weight: has values that are not finite, which int8 cannot stand for")
    rows = blocks.shape[1]
    block_rows = len(packed.crow_indices) - 1
    places = block_rows_of(packed.crow_indices, len(blocks))
    spread = places[:, None].expand(-1, rows)
    largest = blocks.new_zeros(block_rows, rows).scatter_reduce_(0, spread, blocks.abs().amax(2), "amax")
    scale = (largest / LARGEST).clamp_(min=NOTHING)  # of outputs without weights too, so that none divides by zero
    rounded = (blocks / scale[places, :, None]).round_().clamp_(-LARGEST, LARGEST)
    return rounded.to(torch.int8), scale.reshape(-1)[:out_features].contiguous()


def dequantize_weight(packed: PackedWeight, weight_scale: Tensor) -> Tensor:
    """What kept blocks in int8 stand for, float32 [nnz_blocks, rows, cols]."""
    rows = packed.weight.shape[1]
    missing = (len(packed.crow_indices) - 1) * rows - len(weight_scale)
    scale = F.pad(weight_scale, (0, missing)).view(-1, rows)
    return packed.weight.float() * scale[block_rows_of(packed.crow_indices, len(packed.weight)), :, None]


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each token to steps of its own.

    Args:
        x: [tokens, in_features], of a floating dtype.

    Returns:
        (int8 [tokens, in_features], float32 [tokens] that it is to be multiplied with: NaN for one that is not finite).
    """
    x = x.float()
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    finite = largest.isfinite()
    counts = finite & (largest >= NOTHING)
    steps = torch.full_like(
        largest, LARGEST
    )  # torch multiplies with the reciprocal of a plain number, which is another
    inverse = torch.where(counts, steps / largest, 0.0)
    scale = torch.where(counts, largest / steps, torch.where(finite, 0.0, float("nan")))
    rounded = (x * inverse[:, None]).nan_to_num_(0.0).round_()
    return rounded.to(torch.int8), scale


def whole_sums(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of whole numbers, exact: int32 [tokens, out_features].

    Args:
        x: int8 [tokens, in_features].
        weight: int8 [out_features, in_features].
    """
    sums = x.new_zeros(len(x), len(weight), dtype=torch.int32)
    for start in range(0, x.shape[1], EXACT_FEATURES):
        part = slice(start, start + EXACT_FEATURES)
        sums += (x[:, part].float() @ weight[:, part].float().t()).to(torch.int32)
    return sums


def reference_int8(x: Tensor, layer: Int8Arguments) -> Tensor:
    """The product out of torch's operators: what every kernel must equal.

    Shapes: x [tokens, in_features] -> [tokens, out_features].
    """
    packed, shape = PackedWeight(*layer[:3]), (layer.out_features, x.shape[1])
    check_packed("block_sparse_linear_int8", packed, *shape)
    numbers, scale = quantize_tokens(x)
    y = whole_sums(numbers, unpack(packed, *shape)).float() * scale[:, None] * layer.weight_scale
    y = y if layer.bias is None else y + layer.bias.float()
    y = ACTIVATIONS[layer.activation](y).to(x.dtype)
    return y if layer.residual is None else y + layer.residual


class Int8Backend(Protocol):
    """Outputs of layers of one block shape that read the same x [..., in_features].

    None for tensors that it does not take, which go to the next one.
    """

    def __call__(self, x: Tensor, layers: Sequence[Int8Arguments]) -> list[Tensor] | None: ...


def _by_reference(x: Tensor, layers: Sequence[Int8Arguments]) -> list[Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    outputs = []
    for layer in layers:
        if layer.residual is not None:
            layer = layer._replace(residual=layer.residual.reshape(-1, layer.out_features))
        outputs.append(reference_int8(flat, layer).view(*x.shape[:-1], layer.out_features))
    return outputs


# By name; one for all copies of this file in a process, as with `blockprune_backends`.
_BACKENDS: dict[str, Int8Backend] = vars(torch.ops.blockprune).setdefault("int8_backends", {"reference": _by_reference})


def register_int8_backend(name: str, backend: Int8Backend) -> None:
    """Add a backend. Later registrations are preferred."""
    _BACKENDS[name] = backend


def available_int8_backends() -> list[str]:
    """Names of the registered backends, most preferred first."""
    return list(reversed(_BACKENDS))


def int8_backend_of(device_type: str) -> str:
    """Name of the backend that runs layers in int8 on a kind of device."""
    x = torch.empty(0, 1, device=device_type)
    layer = Int8Arguments(
        torch.empty(0, 1, 1, dtype=torch.int8, device=device_type),
        torch.zeros(2, dtype=torch.int32, device=device_type),
        torch.empty(0, dtype=torch.int32, device=device_type),
        None,
        1,
        "none",
        None,
        torch.ones(1, device=device_type),
    )
    return next(name for name in available_int8_backends() if _BACKENDS[name](x, [layer]) is not None)


def _compute(x: Tensor, layers: Sequence[Int8Arguments]) -> list[Tensor]:
    for layer in layers:
        _check(x, layer)
    wanted = os.environ.get("BLOCKPRUNE_BACKEND") or "auto"
    names = available_int8_backends() if wanted == "auto" else [FOR_FLOATS.get(wanted, wanted)]
    for name in names:
        if name in _BACKENDS and (outputs := _BACKENDS[name](x, layers)) is not None:
            return outputs
    raise BackendError(
        f"BLOCKPRUNE_BACKEND: {wanted!r} cannot run int8 layers with {x.dtype} inputs on {x.device}; choose one of "
        f"{available_int8_backends()} or 'auto'"
    )


def _check(x: Tensor, layer: Int8Arguments) -> None:
    """Refuse tensors that are no layer in int8, before anything reads them.

    Raises:
        BlockSparseFormatError: naming the one that is wrong.
        ValueError: the residual has another shape or dtype than the output, or the activation is unknown.
    """
    n = layer.out_features
    _check_devices(x, layer)
    if layer.weight.dtype != torch.int8 or not x.is_floating_point():
        raise BlockSparseFormatError(f"weight: expected int8 with floating inputs, got {layer.weight.dtype}, {x.dtype}")
    if layer.weight_scale.dtype != torch.float32 or layer.weight_scale.shape != (n,):
        found = f"{layer.weight_scale.dtype} {list(layer.weight_scale.shape)}"
        raise BlockSparseFormatError(f"weight_scale: expected float32 [{n}], got {found}")
    if x.shape[-1] > MAX_IN_FEATURES:
        raise BlockSparseFormatError(f"in_features: int8 takes up to {MAX_IN_FEATURES:,}, got {x.shape[-1]:,}")
    if layer.bias is not None and layer.bias.shape != (n,):
        raise ValueError(f"bias: expected [{n}], got {list(layer.bias.shape)}")
    if layer.residual is not None and (layer.residual.shape, layer.residual.dtype) != ((*x.shape[:-1], n), x.dtype):
        raise ValueError(
            f"residual: expected {x.dtype} {[*x.shape[:-1], n]}, got {layer.residual.dtype} "
            f"{list(layer.residual.shape)}"
        )
    if layer.activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {layer.activation!r}; choose one of {list(ACTIVATIONS)}")


def _check_devices(x: Tensor, layer: Int8Arguments) -> None:
    """Refuse tensors on another device than x, as an address there means something else here."""
    for name, tensor in zip(layer._fields, layer, strict=True):
        if isinstance(tensor, Tensor) and tensor.device != x.device:
            raise ValueError(f"{name}: expected on {x.device}, as the input is, got {tensor.device}; move or load it")


def int8_linears(x: Tensor, layers: Sequence[Int8Arguments]) -> list[Tensor]:
    """Several layers in int8 that read the same x.

    Args:
        x: [..., in_features], of a floating dtype.
        layers: of one block shape.

    Returns:
        The output of each, [..., out_features], dtype of x.

    Raises:
        BlockSparseFormatError: tensors are no layer in int8.
        BackendError: `BLOCKPRUNE_BACKEND` names what cannot run them, or torch.func transforms the call.
        ValueError: a bias or residual does not fit, or an activation is unknown.
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        layers = [
            layer._replace(residual=None if layer.residual is None else layer.residual.to(dtype)) for layer in layers
        ]
    if is_transformed():
        raise BackendError(f"torch.func: {NO_GRADIENTS}")
    if needs_no_dispatcher(x, layers):
        return _compute(x, layers)
    return [torch.ops.blockprune.block_sparse_linear_int8(x, *layer) for layer in layers]


class _Context(Protocol):
    """What torch hands from an op's forward pass to its backward pass."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def _linear_int8(x: Tensor, *arguments: Any) -> Tensor:
    return _compute(x, [Int8Arguments(*arguments)])[0]


def _shape_int8(x: Tensor, *arguments: Any) -> Tensor:
    layer = Int8Arguments(*arguments)
    _check_devices(x, layer)
    return x.new_empty(*x.shape[:-1], layer.out_features)


def _no_gradients(grad: Tensor, x: Tensor) -> Tensor:
    """An op, so that compilers may trace it, and inference without `no_grad` goes on."""
    raise BackendError(NO_GRADIENTS)


def _keep_input(ctx: _Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward_int8(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return torch.ops.blockprune.no_int8_gradients(grad, x), *[None] * len(Int8Arguments._fields)


def _define_op() -> None:
    """Define the ops. Called once in a process, whichever copy of this file comes first."""
    op = torch.library.custom_op("blockprune::block_sparse_linear_int8", _linear_int8, mutates_args=(), schema=SCHEMA)
    op.register_fake(_shape_int8)
    op.register_autograd(_backward_int8, setup_context=_keep_input)
    backward = torch.library.custom_op("blockprune::no_int8_gradients", _no_gradients, mutates_args=())
    backward.register_fake(lambda grad, x: torch.empty_like(x))


if not hasattr(torch.ops.blockprune, "block_sparse_linear_int8"):
    _define_op()
