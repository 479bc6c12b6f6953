"""When a call needs nothing of torch's dispatcher, which takes longer than the product of a small layer.

The op in torch.library is there for gradients, compilers, exporters, tensors without data and whoever records calls. A
call that none of them looks at computes the same outputs from the same tensors without it.
"""

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)  # subclasses have ideas of their own about operators


def needs_no_dispatcher(x: Tensor, tensors: "tuple[Tensor | None, ...] | list[Tensor | None]") -> bool:
    """Whether a call in eager mode on a CPU is one that nobody differentiates, traces, records or replaces.

    Args:
        x: the input.
        tensors: all others that are read as numbers.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu:
        return False
    if x.is_neg() or x.layout is not torch.strided:  # its memory does not hold its values
        return False
    differentiates = torch.is_grad_enabled()
    if differentiates and x.requires_grad:
        return False
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN or not tensor.is_cpu or (differentiates and tensor.requires_grad)
        ):
            return False
    return not is_observed()


def is_observed() -> bool:
    """Whether a tracer, a profiler or a mode of torch sees, or answers, each call of an operator."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )
