"""Who multiplies: a registry of backends, and the choice between them at each call.

Every backend must equal `reference`. Where no kernel can run, or none is expected to pay, `dense` multiplies with the
unpacked matrix. That expectation counts multiplications and not calls: very small layers may still lose a little.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blockprune_layout import PackedWeight, check_indices, unpack
from .blockprune_prepared import PreparedCache
from .blockprune_reference import ACTIVATIONS, LayerArguments, reference_forward

__all__ = [
    "Backend",
    "LayerArguments",
    "available_backends",
    "checked_bias",
    "choose_backend",
    "register_backend",
    "run",
    "run_all",
]


class Backend(NamedTuple):
    """One way to run the op.

    Attributes:
        forward: (x [tokens, in_features], layer) -> [tokens, out_features].
        supports: (x, layer) -> whether it can run a call.
        pays: (x, layer) -> whether it is expected to be faster than `dense`; asked for "auto" alone.
        keeps_copy: layer -> whether it works with a copy of the weight from an earlier call.
        forward_all: (x [tokens, in_features], layers that read it, of one block shape) -> their outputs; None where
            one call for several layers is no faster than several.
    """

    forward: Callable[[Tensor, LayerArguments], Tensor]
    supports: Callable[[Tensor, LayerArguments], bool]
    pays: Callable[[Tensor, LayerArguments], bool] = lambda *_: True
    keeps_copy: Callable[[LayerArguments], bool] = lambda _: False
    forward_all: Callable[[Tensor, list[LayerArguments]], list[Tensor]] | None = None


# One registry for all copies of this file in a process, as there is one op: a checkpoint's own copy may define the op
# before the installed package adds its kernels.
_BACKENDS: dict[str, Backend] = vars(torch.ops.blockprune).setdefault("backend_registry", {})


def register_backend(name: str, backend: Backend) -> None:
    """Add a backend. Later registrations are preferred."""
    _BACKENDS[name] = backend


def available_backends() -> list[str]:
    """Names of the registered backends, most preferred first."""
    return list(reversed(_BACKENDS))


def choose_backend(x: Tensor, layer: LayerArguments, backend: str = "auto") -> str:
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
                candidate.supports(x, layer)
                and not (backend == "auto-live" and candidate.keeps_copy(layer))
                and candidate.pays(x, layer)
            ):
                return name
        backend = "reference"
    if backend not in _BACKENDS:
        raise ValueError(f"unknown block-sparse backend {backend!r}; choose one of {available_backends()} or 'auto'")
    if not _BACKENDS[backend].supports(x, layer):
        rows, cols = layer.weight.shape[1:]
        raise ValueError(
            f"block-sparse backend {backend!r} cannot run {x.dtype} inputs with {layer.weight.dtype} weights in "
            f"{rows}x{cols} blocks on {x.device}; convert one of them, or leave the backend at 'auto'"
        )
    return backend


def checked_bias(layer: LayerArguments, dtype: torch.dtype) -> Tensor | None:
    """A layer's bias as kernels read it, without gaps.

    Raises:
        ValueError: it has another size or dtype than the outputs.
    """
    bias = layer.bias
    if bias is None:
        return None
    if bias.shape != (layer.out_features,) or bias.dtype != dtype:
        raise ValueError(f"bias: expected {dtype} [{layer.out_features}], got {bias.dtype} {list(bias.shape)}")
    return bias.contiguous()


_DENSE_WEIGHTS: PreparedCache[Tensor] = PreparedCache()


def dense_forward(x: Tensor, layer: LayerArguments) -> Tensor:
    """torch's own Linear with the unpacked matrix, which is kept in memory beside the packed one."""
    weight, crow_indices, col_indices, bias, out_features, activation, residual = layer
    packed, in_features = PackedWeight(weight, crow_indices, col_indices), x.shape[-1]

    def make() -> Tensor:
        check_indices("weight", crow_indices, col_indices, -(-in_features // weight.shape[2]))
        return unpack(packed, out_features, in_features)

    key = (out_features, in_features, weight.shape, weight.stride(), weight.dtype)
    dense = _DENSE_WEIGHTS.get(packed, key, make)
    out = ACTIVATIONS[activation](F.linear(x, dense, bias))
    return out if residual is None else out + residual


def _same_dtype(x: Tensor, layer: LayerArguments) -> bool:
    return x.dtype == layer.weight.dtype


register_backend("reference", Backend(reference_forward, _same_dtype))
register_backend("dense", Backend(dense_forward, _same_dtype, keeps_copy=lambda _: True))


def run(x: Tensor, layer: LayerArguments, backend: str = "auto") -> Tensor:
    """One layer's output for x [tokens, in_features]; errors as for `choose_backend`."""
    return _BACKENDS[choose_backend(x, layer, backend)].forward(x, layer)


def run_all(x: Tensor, layers: list[LayerArguments]) -> list[Tensor]:
    """Outputs of layers of one block shape that read the same x [tokens, in_features]; in one call where that pays."""
    names = [choose_backend(x, layer) for layer in layers]
    together = _BACKENDS[names[0]].forward_all
    if together is not None and len(set(names)) == 1:
        return together(x, layers)
    return [_BACKENDS[name].forward(x, layer) for name, layer in zip(names, layers, strict=True)]
