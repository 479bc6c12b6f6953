"""What block-sparse layers do together: GELU in the product before it, and q, k and v of one attention in one call.

In a fused MLP fc1 gives activated outputs and the activation passes them through, so a hook on fc1 sees them activated.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .blockprune_linear import BlockSparseLinear, SharedInput
from .blockprune_reference import ACTIVATIONS

# Attributes of the MLPs of transformers' vision models: the activation takes the Linear's output and nothing else.
LINEAR, ACTIVATION = "fc1", "activation_fn"
# Of their attentions: these read the same tensor.
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class FusedActivation(nn.Module):
    """Stands where an activation stood that the Linear before it applies.

    Args:
        original: that activation; still applied where the Linear has been replaced by one that does not.
        mlp: the module that holds both.
    """

    def __init__(self, original: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.original = original
        self._mlp = (mlp,)  # in a tuple, or it would count as a part of this module

    def forward(self, x: Tensor) -> Tensor:
        """x as it is, or activated."""
        linear = getattr(self._mlp[0], LINEAR)
        return self.original(x) if getattr(linear, "activation", "none") == "none" else x


def fuse(model: nn.Module) -> None:
    """Let block-sparse layers work together, in place; predictions stay the same, but for rounding."""
    fuse_activations(model)
    share_inputs(model)


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`, in place."""
    unfuse_activations(model)
    for module in model.modules():
        if isinstance(module, BlockSparseLinear):
            module.shared_input = None


def share_inputs(model: nn.Module) -> int:
    """Let q, k and v of each attention be computed in one call, in place.

    Returns:
        Number of attentions in which they are.
    """
    count = 0
    for module in model.modules():
        layers: list[Any] = [getattr(module, name, None) for name in PROJECTIONS]
        if all(isinstance(layer, BlockSparseLinear) for layer in layers) and (
            len({(layer.block_shape, layer.in_features) for layer in layers}) == 1
        ):
            shared = SharedInput(layers)
            for layer in layers:
                layer.shared_input = shared
            count += 1
    return count


def fuse_activations(model: nn.Module) -> int:
    """Let block-sparse layers apply the GELU that follows them, in place; predictions stay the same.

    Returns:
        Number of activations fused.
    """
    count = 0
    for mlp, linear, activation in list(_pairs(model)):
        name = None if type(activation).__name__ == FusedActivation.__name__ else _activation_name(activation)
        if name is not None:
            linear.activation = name
            setattr(mlp, ACTIVATION, FusedActivation(activation, mlp))
            count += 1
    return count


def unfuse_activations(model: nn.Module) -> None:
    """Undo `fuse_activations`, in place."""
    for mlp, linear, activation in list(_pairs(model)):
        if type(activation).__name__ == FusedActivation.__name__:
            linear.activation = "none"
            setattr(mlp, ACTIVATION, activation.original)


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, Any, Any]]:
    """(MLP, its block-sparse layer, the activation that follows), also of layers made by another copy of this code."""
    for module in model.modules():
        linear, activation = getattr(module, LINEAR, None), getattr(module, ACTIVATION, None)
        if type(linear).__name__ == BlockSparseLinear.__name__ and isinstance(activation, nn.Module):
            yield module, linear, activation


def _activation_name(activation: nn.Module) -> str | None:
    """The op's name for an activation, told by its values; None for one that the op does not know."""
    # Every other value: oneDNN, which takes GELU of tensors without gaps, starts threads for however few, and a process
    # that loads a model may fork before it starts any.
    probe = torch.linspace(-8, 8, 513)[::2]
    values = activation(probe)
    for name in ("gelu", "gelu_tanh"):  # they differ by up to 5e-4
        if torch.allclose(values, ACTIVATIONS[name](probe), rtol=0, atol=1e-6):
            return name
    return None
