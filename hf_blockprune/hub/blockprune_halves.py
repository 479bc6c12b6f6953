"""The two halves of a transformers layer, its attention and its MLP, to do something between them.

Which parts a layer has and in what order they work is told by what becomes of stand-ins: a layer whose class does
anything else than these halves, one after the other, is not known.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .blockprune_quick_halves import quick_half

# Names of attributes of transformers' layers. The norms and the attention have one of theirs; of what comes after an
# attention or an MLP a layer has some, in this order.
FIRST_NORM = ("layernorm_before", "norm1", "layer_norm1")
ATTENTION = ("attention", "self_attn")
AFTER_ATTENTION = ("layer_scale1", "dropout", "drop_path")
SECOND_NORM = ("layernorm_after", "norm2", "layer_norm2")
MLP = ("mlp",)
AFTER_MLP = ("layer_scale2", "dropout", "drop_path")


def attend(layer: nn.Module, states: Tensor, bias: Tensor | None, **kwargs: object) -> tuple[Tensor, Tensor]:
    """(states after a layer's attention, what the attention read), both [images, tokens, width].

    Args:
        layer: one that `has_halves`.
        states: before it.
        bias: what is added to the attention's logits.
        **kwargs: for the attention.
    """
    quick = _quick(layer, FIRST_NORM, ATTENTION, AFTER_ATTENTION, states, bias, kwargs, reads=True)
    if quick is not None:
        made, read = quick
        assert read is not None  # it was asked for
        return made, read
    read = _part(layer, FIRST_NORM)(states)
    written, _ = _part(layer, ATTENTION)(read, bias, **kwargs)
    return _after(layer, AFTER_ATTENTION, written) + states, read


def think(layer: nn.Module, states: Tensor) -> Tensor:
    """States after a layer's MLP, [images, tokens, width]; those before it may be written over."""
    quick = _quick(layer, SECOND_NORM, MLP, AFTER_MLP, states, in_place=True)
    if quick is not None:
        return quick[0]
    return _after(layer, AFTER_MLP, _part(layer, MLP)(_part(layer, SECOND_NORM)(states))) + states


def whole_layer(layer: nn.Module, states: Tensor, bias: Tensor | None, **kwargs: object) -> Tensor:
    """States after a layer that `has_halves`; arguments as for `attend`."""
    quick = _quick(layer, FIRST_NORM, ATTENTION, AFTER_ATTENTION, states, bias, kwargs)
    return think(layer, attend(layer, states, bias, **kwargs)[0] if quick is None else quick[0])


def _quick(
    layer: nn.Module,
    norms: tuple[str, ...],
    inner: tuple[str, ...],
    after: tuple[str, ...],
    states: Tensor,
    bias: Tensor | None = None,
    kwargs: Mapping[str, object] | None = None,
    **how: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Half of a layer in one call, see `quick_half`; None where its parts are to do it."""
    if not isinstance(layer, nn.Module):
        return None
    norm, part = _name(layer, norms), _name(layer, inner)
    return None if norm is None or part is None else quick_half(layer, (norm, part, after), states, bias, kwargs, **how)


def _name(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if layer._modules.get(name) is not None), None)


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention of a layer that `has_halves`."""
    return _part(layer, ATTENTION)


def _part(layer: nn.Module, names: tuple[str, ...]) -> Any:
    found = (getattr(layer, name, None) for name in names)
    return next(part for part in found if part is not None)


def _after(layer: nn.Module, names: tuple[str, ...], states: Tensor) -> Tensor:
    for name in names:
        if (part := getattr(layer, name, None)) is not None:
            states = part(states)
    return states


class _Term:
    """What became of a stand-in: the names of the parts that it passed, in order, and what was added to it."""

    def __init__(self, *said: object) -> None:
        self.said = said

    def __add__(self, other: object) -> "_Term":
        return _Term("+", frozenset((self, other)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Term) and self.said == other.said

    def __hash__(self) -> int:
        return hash(self.said)


class _StandIn:
    """A layer of which each part says that it was called, and with what."""

    forward = None  # asked for by transformers, to see whether it is its own

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.training, self.gradient_checkpointing = layer, False, False

    def __getattr__(self, name: str) -> object:
        if name not in self.layer._modules:
            return getattr(self.layer, name)

        def said(*args: object, **kwargs: object) -> object:
            term = _Term(name, *args, *kwargs.values())
            return (term, None) if name in ATTENTION else term

        return said


def has_halves(layer: nn.Module) -> bool:
    """Whether a layer is `attend` and then `think`, and nothing else."""
    stand_in: Any = _StandIn(layer)
    states, bias = _Term("states"), _Term("bias")
    forward: Callable[..., object] = type(layer).forward
    try:
        halves = think(stand_in, attend(stand_in, states, bias)[0])  # pyright: ignore[reportArgumentType]
        return forward(stand_in, states, bias) == halves
    except Exception:  # it lacks a part, or asks for more than that
        return False
