"""Who multiplies: a registry of backends, and the choice between them at each call.

Every backend must equal `reference`. Where no kernel can run, or none is expected to pay, `dense` multiplies with the
unpacked matrix. That expectation counts multiplications, not what a call or unpacking takes.
"""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blockprune_layout import BackendError, PackedWeight, check_packed, unpack
from .blockprune_prepared import PreparedCache
from .blockprune_reference import ACTIVATIONS, LayerArguments, reference_forward

__all__ = [
    "Backend",
    "LayerArguments",
    "available_backends",
    "beats_dense",
    "checked_bias",
    "choose_backend",
    "register_backend",
    "run",
    "run_all",
    "run_quickly",
    "use_unpacker",
    "wanted_backend",
]


class Backend(NamedTuple):
    """One way to run the op.

    Attributes:
        forward: (x [tokens, in_features], layer) -> [tokens, out_features].
        supports: (x, layer) -> whether it can run a call.
        pays: (x, layer) -> whether it is expected to be faster than `dense`; asked for "auto" alone.
        forward_all: (x [tokens, in_features], layers that read it, of one block shape) -> their outputs; None where
            one call for several layers is no faster than several.
        quick: (x [..., in_features], layers that read it) -> their outputs as `forward_all` has them, with no step that
            small layers would notice; or None for what it does not take, which goes the ordinary way and is computed,
            or refused, there.
        beats_dense: (layer, in_features, tokens) -> whether calls with so many tokens are expected to be faster than
            torch's product with a whole matrix that is there already; of two that support them, the preferred is asked.
    """

    forward: Callable[[Tensor, LayerArguments], Tensor]
    supports: Callable[[Tensor, LayerArguments], bool]
    pays: Callable[[Tensor, LayerArguments], bool] = lambda *_: True
    forward_all: Callable[[Tensor, list[LayerArguments]], list[Tensor]] | None = None
    quick: Callable[[Tensor, Sequence[LayerArguments]], list[Tensor] | None] | None = None
    beats_dense: Callable[[LayerArguments, int, int], bool] = lambda *_: True


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
    """Name of the backend that runs a call; `BLOCKPRUNE_BACKEND` overrides "auto", where it is not empty.

    Raises:
        BackendError: the backend is unknown, or cannot run these tensors.
    """
    if backend == "auto":
        backend = wanted_backend()
    if backend == "auto":
        for name in reversed(_BACKENDS):
            if _BACKENDS[name].supports(x, layer) and _BACKENDS[name].pays(x, layer):
                return name
        backend = "reference"
    if backend not in _BACKENDS:
        raise BackendError(f"unknown block-sparse backend {backend!r}; choose one of {available_backends()} or 'auto'")
    if not _BACKENDS[backend].supports(x, layer):
        rows, cols = layer.weight.shape[1:]
        raise BackendError(
            f"block-sparse backend {backend!r} cannot run {x.dtype} inputs with {layer.weight.dtype} weights in "
            f"{rows}x{cols} blocks on {x.device}; convert one of them, or leave the backend at 'auto'"
        )
    return backend


def beats_dense(layer: LayerArguments, in_features: int, tokens: int) -> bool:
    """Whether what would run a layer's calls is expected to be faster than torch's product with the whole matrix.

    Args:
        layer: with its weight packed.
        in_features: its inputs.
        tokens: of a call.
    """
    x = layer.weight.new_empty(0, in_features)
    for name in reversed(_BACKENDS):
        if _BACKENDS[name].supports(x, layer):
            # A backend of an older version of this file has no such attribute.
            asked = getattr(_BACKENDS[name], "beats_dense", None)
            return name not in ("reference", "dense") if asked is None else asked(layer, in_features, tokens)
    return False


def wanted_backend() -> str:
    """What `BLOCKPRUNE_BACKEND` names, "auto" where it is unset or empty.

    Raises:
        BackendError: it names no backend.
    """
    name = os.environ.get("BLOCKPRUNE_BACKEND") or "auto"
    if name != "auto" and name not in _BACKENDS:
        raise BackendError(
            f"BLOCKPRUNE_BACKEND: unknown block-sparse backend {name!r}; choose one of {available_backends()} or 'auto'"
        )
    return name


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


# By device type; of all copies of this file, as above.
Unpacker = Callable[[int, LayerArguments], Tensor]
_UNPACKERS: dict[str, Unpacker] = vars(torch.ops.blockprune).setdefault("unpackers", {})
_CHECKED: PreparedCache[None] = PreparedCache()


def use_unpacker(device_type: str, unpacker: Unpacker) -> None:
    """Let `dense` make its matrices with another function.

    Args:
        device_type: whose tensors it takes.
        unpacker: (in_features, layer) -> dense matrix [out_features, in_features]; checks indices.
    """
    _UNPACKERS[device_type] = unpacker


def unpack_layer(in_features: int, layer: LayerArguments) -> Tensor:
    """A layer's dense matrix [out_features, in_features], its indices checked.

    Where that would make the host wait for another device they are checked once: torch lets later ones lead nowhere
    outside of the matrix.

    Raises:
        BlockSparseFormatError: indices that break the format's rules.
    """
    packed, out_features = PackedWeight(*layer[:3]), layer.out_features

    def check() -> None:
        check_packed("block_sparse_linear", packed, out_features, in_features)

    if packed.weight.device.type == "cpu":
        check()
    else:
        _CHECKED.get(packed[1:], (in_features, out_features, packed.weight.shape), check)
    return unpack(packed, out_features, in_features)


def dense_forward(x: Tensor, layer: LayerArguments) -> Tensor:
    """torch's own Linear with the matrix unpacked for this call."""
    dense = _UNPACKERS.get(x.device.type, unpack_layer)(x.shape[-1], layer)
    out = ACTIVATIONS[layer.activation](F.linear(x, dense, layer.bias))
    return out if layer.residual is None else out + layer.residual


def _same_dtype(x: Tensor, layer: LayerArguments) -> bool:
    return x.dtype == layer.weight.dtype


register_backend("reference", Backend(reference_forward, _same_dtype, beats_dense=lambda *_: False))
register_backend("dense", Backend(dense_forward, _same_dtype, beats_dense=lambda *_: False))


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


def run_quickly(x: Tensor, layers: Sequence[LayerArguments]) -> list[Tensor] | None:
    """Outputs of layers of one block shape that read the same x [..., in_features], by the most preferred backend.

    None where it does not take that call quickly, or `BLOCKPRUNE_BACKEND` names one.
    """
    # A backend of an older version of this file has no such attribute.
    quick = getattr(next(reversed(_BACKENDS.values())), "quick", None)
    if quick is None or (os.environ.get("BLOCKPRUNE_BACKEND") or "auto") != "auto":
        return None
    return quick(x, layers)
