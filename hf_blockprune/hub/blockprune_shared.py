"""Layers that read the same tensor, computed together in eager inference."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_hooks

from .blockprune_backends import LayerArguments
from .blockprune_direct import is_transformed
from .blockprune_reference import Int8Arguments

if TYPE_CHECKING:
    from .blockprune_linear import BlockSparseLinear


class _Waiting(NamedTuple):
    """An output that its layer has not asked for, and what it was computed from beside the input."""

    y: Tensor
    layer: LayerArguments | Int8Arguments
    versions: tuple[int, int, int]

    def is_that_of(self, layer: LayerArguments | Int8Arguments) -> bool:
        """Whether no tensor was replaced or changed in place."""
        then = self.layer
        return (
            layer.weight is then.weight
            and layer.bias is then.bias
            and layer[-1] is then[-1]
            and _versions(layer) == self.versions
        )


class SharedInput:
    """Layers that read the same tensor: whichever is called first computes all of them, the others take their outputs.

    Only in eager inference: a compiled graph keeps nothing from call to call, and training needs each layer's gradient.

    Args:
        layers: block-sparse layers of one class, one block shape and as many inputs.
    """

    def __init__(self, layers: "list[BlockSparseLinear]") -> None:
        self._layers = list(layers)
        self._last: tuple[Tensor, int, dict[int, _Waiting]] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Copies and files hold the layers, not what was computed."""
        return {"_layers": self._layers, "_last": None}

    def output(self, layer: "BlockSparseLinear", x: Tensor) -> Tensor | None:
        """The output of one of the layers; None where each layer is to compute its own."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_meta or is_transformed():
            return None
        if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            return None
        last = self._last
        # Each output is given once, and only for the very tensors that it was computed from.
        if last is not None and last[0] is x and last[1] == _version(x):
            waiting = last[2].pop(id(layer), None)
            if not last[2]:
                self._last = None
            if waiting is not None and waiting.is_that_of(layer.arguments()):
                return waiting.y
        return self._compute(layer, x)

    def _compute(self, layer: "BlockSparseLinear", x: Tensor) -> Tensor | None:
        """The output of one layer; those of the others wait."""
        layers, arguments, is_one = [], [], False
        for other in self._layers:
            each = other.arguments()
            if each.weight.dim() == 2:  # torch multiplies with the whole matrix
                continue
            # Hooks may change a weight or an input. Offloaded weights are there only while their own layer runs.
            if is_watched(other) or (not (each.weight.is_cpu and x.is_cpu) and each.weight.device != x.device):
                return None
            layers.append(other)
            arguments.append(each)
            is_one = is_one or other is layer
        if not is_one:  # `DataParallel` calls replicas of the layers
            return None
        waiting = {}
        for other, each, y in zip(layers, arguments, layer.products(x, arguments), strict=True):
            waiting[id(other)] = _Waiting(y, each, _versions(each))
        y = waiting.pop(id(layer)).y
        self._last = (x, _version(x), waiting)
        return y


def _versions(layer: LayerArguments | Int8Arguments) -> tuple[int, int, int]:
    """Of what a product is computed from: the last argument of a layer in int8 is its weights' scale."""
    return _version(layer.weight), _version(layer.bias), _version(layer[-1])


def _version(tensor: Tensor | None) -> int:
    """Grows with each change in place; tensors from inference mode have none."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def is_watched(module: nn.Module) -> bool:
    """Whether anyone gets or changes what goes in or out of a module: by a hook, or with a `forward` of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        # Of all modules; torch 2.6 has no function that says so.
        or torch_hooks._global_forward_hooks
        or torch_hooks._global_forward_pre_hooks
        or torch_hooks._global_backward_hooks
        or torch_hooks._global_backward_pre_hooks
    )
