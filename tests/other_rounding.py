"""A pytest plugin that stands for other processors: matrix products add up in another order.

`python -m pytest -p tests.other_rounding` runs each CPU product as two halves of the sum, the second one first, so that
every result is as right as before and differs in its last digits. A test that fails under it hangs on how
a processor rounds.
"""

import warnings

import torch

_library = torch.library.Library("aten", "IMPL")


def _halves(length: int) -> tuple[slice, slice]:
    return slice(length // 2, None), slice(0, length // 2)


def mm(a, b):
    second, first = _halves(a.shape[1])
    out = torch.mm(a[:, second], b[second], out=a.new_empty(a.shape[0], b.shape[1]))
    return out.add_(torch.mm(a[:, first], b[first], out=torch.empty_like(out)))


def addmm(bias, a, b, *, beta=1, alpha=1):
    out = mm(a, b).mul_(alpha)
    return out.add_(bias, alpha=beta) if beta else out


def bmm(a, b):
    second, first = _halves(a.shape[2])
    out = torch.bmm(a[..., second], b[:, second], out=a.new_empty(*a.shape[:2], b.shape[2]))
    return out.add_(torch.bmm(a[..., first], b[:, first], out=torch.empty_like(out)))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says that kernels are replaced
    for product in (mm, addmm, bmm):
        _library.impl(product.__name__, product, "CPU")
