"""What block-sparse layers do together: GELU in the product before it, and q, k and v of one attention in one call.

The modules stay what they are and where they are. An MLP looks at each call whether they are still those that were
fused, and whether anyone watches them; if not so, it does what its class does. So activations and layers can be
replaced, and hooks see the values of the dense model.
"""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blockprune_linear import BlockSparseLinear
from .blockprune_reference import ACTIVATIONS
from .blockprune_shared import SharedInput, is_watched
from .blockprune_subclasses import subclass

# Attributes of the MLPs of transformers' vision models.
LINEAR, ACTIVATION, SECOND_LINEAR = "fc1", "activation_fn", "fc2"
# Of their attentions: these read the same tensor.
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# Where classes are known to depend on their input and their attributes alone; a stranger's may draw random numbers.
ACTIVATION_SOURCES = ("torch.nn.modules.activation", "transformers.activations")

_FUSED = "_fused_activation"  # of an MLP: what its fc1 applies
_LINEAR_FORWARD = BlockSparseLinear.forward
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


class FusedActivation(NamedTuple):
    """An activation as it was when it was fused.

    Attributes:
        name: the op's name for it.
        module: the activation.
        forward: of its class.
        attributes: its own, such as `approximate`.
    """

    name: str
    module: nn.Module
    forward: Callable[..., object]
    attributes: dict[str, object]

    def is_that_of(self, mlp: nn.Module) -> bool:
        """Whether the MLP still has it, as it was, and nobody watches it."""
        module = self.module
        if (
            getattr(mlp, ACTIVATION, None) is not module
            or type(module).forward is not self.forward
            or is_watched(module)
        ):
            return False
        return all(getattr(module, key, None) == value for key, value in self.attributes.items())


def share_inputs(model: nn.Module) -> int:
    """Let q, k and v of each attention be computed in one call, in place.

    Returns:
        Number of attentions in which they are.
    """
    count = 0
    for module in model.modules():
        found = [getattr(module, name, None) for name in PROJECTIONS]
        layers = [layer for layer in found if isinstance(layer, BlockSparseLinear)]
        if (
            len(layers) == len(found)
            and len({(type(layer), layer.block_shape, layer.in_features) for layer in layers}) == 1
        ):
            shared = SharedInput(layers)
            for layer in layers:
                layer.shared_input = shared
            count += 1
    return count


def fuse_activations(model: nn.Module) -> int:
    """Let block-sparse layers apply the GELU that follows them, in place; predictions stay the same.

    The MLP's class becomes a subclass of the same name, as with torch's own `parametrize` and `fully_shard`.

    Returns:
        Number of activations fused.
    """
    count = 0
    for mlp, activation in list(_mlps(model)):
        name = _activation_name(activation)
        if name is not None and not is_fused(mlp) and _is_plain(type(mlp)):
            own = {key: value for key, value in vars(activation).items() if key not in _MODULE_ATTRIBUTES}
            setattr(mlp, _FUSED, FusedActivation(name, activation, type(activation).forward, own))
            mlp.__class__ = _fused_class(type(mlp))
            count += 1
    return count


def unfuse_activations(model: nn.Module) -> None:
    """Undo `fuse_activations`, in place."""
    for mlp in model.modules():
        if is_fused(mlp):
            delattr(mlp, _FUSED)
            base = getattr(type(mlp), "_unfused_class", None)
            if base is not None and type(mlp) is _fused_class(base):  # else torch has made yet another class of it
                mlp.__class__ = base


def is_fused(mlp: nn.Module) -> bool:
    """Whether an MLP's fc1 applies its activation, where nobody watches or replaces either."""
    return _FUSED in vars(mlp)


def _mlps(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(MLP, its activation) where the Linear before it is block-sparse."""
    for module in model.modules():
        linear, activation = getattr(module, LINEAR, None), getattr(module, ACTIVATION, None)
        if isinstance(linear, BlockSparseLinear) and isinstance(activation, nn.Module):
            yield module, activation


def _is_plain(mlp_class: type[nn.Module]) -> bool:
    """Whether MLPs of a class are fc2(activation_fn(fc1(x))) and nothing else, told by what becomes of stand-ins."""
    path = [object() for _ in range(4)]

    def step(i: int) -> Callable[[object], object]:
        return lambda value: path[i + 1] if value is path[i] else None

    stand_in = SimpleNamespace(**{LINEAR: step(0), ACTIVATION: step(1), SECOND_LINEAR: step(2)})
    try:
        return mlp_class.forward(stand_in, path[0]) is path[-1]
    except Exception:  # it asks for more than that
        return False


def fused_layers(mlp: nn.Module) -> tuple[BlockSparseLinear, nn.Module, str] | None:
    """(fc1, fc2, the name of what fc1 applies) of an MLP; None where it is to do what its class does."""
    fused: FusedActivation | None = vars(mlp).get(_FUSED)
    linear = getattr(mlp, LINEAR, None)
    if (
        fused is None
        or not isinstance(linear, BlockSparseLinear)
        or type(linear).forward is not _LINEAR_FORWARD
        or linear.is_unpacked  # torch applies the activation apart
        or is_watched(linear)
        or linear.activation != "none"
        or not fused.is_that_of(mlp)
    ):
        return None
    return linear, getattr(mlp, SECOND_LINEAR), fused.name


@functools.cache
def _fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an MLP's class whose fc1 applies the activation where it may."""
    plain_forward = base.forward

    @functools.wraps(plain_forward)
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or base.forward is not plain_forward:
            return base.forward(self, *args, **kwargs)
        layers = fused_layers(self)
        if layers is None or args[0].shape[-1] != layers[0].in_features:
            return base.forward(self, *args, **kwargs)
        first, second, name = layers
        return second(first.product(args[0], name))

    return subclass(base, _fused_class, {"forward": forward, "_unfused_class": base})


def _activation_name(activation: nn.Module) -> str | None:
    """The op's name for an activation, told by its values; None for one that the op does not know."""
    if type(activation).__module__ not in ACTIVATION_SOURCES:
        return None
    values = torch.cat([torch.linspace(-8, 8, 257), torch.tensor([-1e4, -1e2, 1e2, 1e4])])  # some clip large values
    # Every other place of a tensor: oneDNN, which takes GELU of tensors without gaps, starts threads for however few,
    # and a process that loads a model may fork before it starts any.
    probe = values.repeat_interleave(2)[::2]
    values = activation(probe)
    for name in ("gelu", "gelu_tanh"):  # they differ by up to 5e-4
        if torch.allclose(values, ACTIVATIONS[name](probe), rtol=0, atol=1e-6):
            return name
    return None
