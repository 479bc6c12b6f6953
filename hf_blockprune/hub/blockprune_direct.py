"""When a call needs nothing of torch's dispatcher, which takes longer than the product of a small layer.

The op in torch.library is there for gradients, compilers, exporters, tensors without data and whoever records calls. A
call that none of them looks at computes the same outputs from the same tensors without it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blockprune_reference import Int8Arguments, LayerArguments

_PLAIN = (Tensor, nn.Parameter)  # subclasses have ideas of their own about operators


def needs_no_dispatcher(x: Tensor, layers: Sequence[LayerArguments] | Sequence[Int8Arguments]) -> bool:
    """Whether a call in eager mode on a CPU is one that nobody differentiates, traces, converts, records or replaces.

    Args:
        x: the input.
        layers: everything else that is read.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu or x.is_neg() or is_observed():
        return False
    differentiates = torch.is_grad_enabled()
    if differentiates and x.requires_grad:
        return False
    for weight, crow_indices, col_indices, bias, _, _, residual, *more in layers:
        for tensor in (weight, crow_indices, col_indices, bias, residual, *more):
            if tensor is not None and (
                type(tensor) not in _PLAIN or not tensor.is_cpu or (differentiates and tensor.requires_grad)
            ):
                return False
    return True


def are_plain(*tensors: Tensor) -> bool:
    """Whether tensors in eager mode on a CPU are ones that nobody differentiates, traces, converts or records."""
    if torch.compiler.is_compiling() or is_observed():
        return False
    differentiates = torch.is_grad_enabled()
    return all(
        type(tensor) in _PLAIN
        and tensor.is_cpu
        and not tensor.is_neg()
        and not (differentiates and tensor.requires_grad)
        for tensor in tensors
    )


def is_observed() -> bool:
    """Whether autocast, a transform, a tracer, a profiler or a mode of torch sees each call of an operator."""
    return (
        is_transformed()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    )


def is_transformed() -> bool:
    """Whether torch.func transforms what runs, or forward-mode gradients are recorded: the op knows neither."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
