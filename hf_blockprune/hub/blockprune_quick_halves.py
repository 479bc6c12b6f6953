"""Halves of a transformers layer, each in one call: norm, attention and residual; norm, MLP and residual.

That is for eager inference in which nobody looks at what lies between. What parts a layer has is found out once, and
each call looks whether they are still these, and whether anyone watches one; else parts are called one by one.
"""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn

from .blockprune_backends import LayerArguments
from .blockprune_direct import is_observed
from .blockprune_fusion import PROJECTIONS, fused_layers
from .blockprune_heads import SCALE_NAMES, SIZE_NAMES
from .blockprune_linear import BlockSparseLinear
from .blockprune_reference import Int8Arguments
from .blockprune_shared import is_watched

OUT = "o_proj"  # of transformers' attentions, after `PROJECTIONS`
FACTOR = "lambda1"  # of what scales the outputs of a half
ATTENTIONS = ("eager", "sdpa")  # implementations of what is computed here
BACKENDS = ("auto", "cpu")  # where `BLOCKPRUNE_BACKEND` names one
_LINEAR_FORWARD = BlockSparseLinear.forward


class Heads(NamedTuple):
    """Of an attention: how many heads, features of each, the factor of logits, and what is added, [images, tokens]."""

    heads: int
    head_size: int
    scale: float
    bias: Tensor | None


class HalfArguments(NamedTuple):
    """y = x + output_scale * second(f(first(norm(x)))), f the attention, or nothing where there are no heads.

    Attributes:
        norm: LayerNorm's weight and bias, [width] each, and its epsilon.
        layers: of first, three or one, and then of second.
        output_scale: [width] or None.
        heads: None of an MLP.
        reads: whether norm(x) is wanted too.
        in_place: whether y may be written over x.
    """

    norm: tuple[Tensor, Tensor, float]
    layers: Sequence[LayerArguments] | Sequence[Int8Arguments]
    output_scale: Tensor | None
    heads: Heads | None
    reads: bool
    in_place: bool = False


class HalfRunner(Protocol):
    """(y, norm(x) where it is wanted) of x [images, tokens, width]; None for tensors that it does not take."""

    def __call__(self, x: Tensor, half: HalfArguments) -> tuple[Tensor, Tensor | None] | None: ...


# By device type; one for all copies of this file in a process, as with `blockprune_backends`.
_RUNNERS: dict[str, HalfRunner] = vars(torch.ops.blockprune).setdefault("half_runners", {})


def use_half_runner(device_type: str, runner: HalfRunner) -> None:
    """Let halves of layers on a kind of device be computed by a function."""
    _RUNNERS[device_type] = runner


class _Plan(NamedTuple):
    """The parts of a half, and whether they are what one call computes.

    Attributes:
        places: (module, name of one of its parts, that part or None, its class).
        works: whether they do that and nothing else, outside of training.
        norm: the first part.
        inner: the attention or the MLP.
        factor: what scales the outputs, None where nothing does.
    """

    places: "tuple[_Place, ...]"
    works: bool
    norm: nn.Module
    inner: nn.Module
    factor: nn.Module | None

    def holds(self) -> bool:
        """Whether the parts are still these."""
        return all(owner._modules.get(name) is part and type(part) is kind for owner, name, part, kind in self.places)

    def is_watched(self) -> bool:
        """Whether anyone watches one of them, or it trains."""
        return any(part is not None and (is_watched(part) or _trains(part)) for _, _, part, _ in self.places)


_Place: TypeAlias = tuple[nn.Module, str, nn.Module | None, type]
_PLANS: "weakref.WeakKeyDictionary[nn.Module, dict[str, _Plan]]" = weakref.WeakKeyDictionary()


def quick_half(
    layer: nn.Module,
    names: tuple[str, str, tuple[str, ...]],
    states: Tensor,
    bias: Tensor | None = None,
    kwargs: Mapping[str, object] | None = None,
    *,
    reads: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """(states after half of a layer, what its inner part read where that is wanted); None where parts are to do it.

    Args:
        layer: of transformers.
        names: of its norm, its attention or MLP, and of what comes after that.
        states: before it, [images, tokens, width].
        bias: what is added to the attention's logits.
        kwargs: for the attention.
        reads: whether what is read is wanted.
        in_place: whether nobody needs the states before it any more.
    """
    runner = _RUNNERS.get(states.device.type)
    if (
        runner is None
        or torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or type(states) is not Tensor
        or states.dim() != 3
        or (kwargs and any(kwargs.values()))
        or is_observed()
        or (os.environ.get("BLOCKPRUNE_BACKEND") or "auto") not in BACKENDS
    ):
        return None
    plans = _PLANS.setdefault(layer, {})
    plan = plans.get(names[1])
    if plan is None or not plan.holds():
        places = _places(layer, *names)
        if any(part is not None and _trains(part) for _, _, part, _ in places):
            return None
        plan = plans[names[1]] = _plan(places)
    if not plan.works or layer.training or plan.is_watched():
        return None
    half = _arguments(plan, bias, reads=reads, in_place=in_place)
    return None if half is None else runner(states, half)


def _places(layer: nn.Module, norm: str, inner: str, after: tuple[str, ...]) -> tuple[_Place, ...]:
    """All parts that a half may have: its norm, its attention or MLP, what comes after that, and Linears."""
    names = [(layer, name) for name in (norm, inner, *after)]
    names += [(layer._modules[inner], name) for name in (*PROJECTIONS, OUT)]
    found = [(owner, name, owner._modules.get(name)) for owner, name in names if owner is not None]
    return tuple((owner, name, part, type(part)) for owner, name, part in found)


def _trains(part: nn.Module) -> bool:
    return part.training and type(part) is not nn.Identity


def _arguments(plan: _Plan, bias: Tensor | None, *, reads: bool, in_place: bool) -> HalfArguments | None:
    """What is computed by a half as it is now."""
    if all(hasattr(plan.inner, name) for name in PROJECTIONS):
        heads, layers = _heads(plan.inner, bias), _attention_layers(plan.inner)
    else:
        heads, layers = None, _mlp_layers(plan.inner)
    if layers is None or (heads is None and len(layers) > 2):
        return None
    norm = cast(nn.LayerNorm, plan.norm)
    factor = None if plan.factor is None else plan.factor._parameters[FACTOR]
    return HalfArguments((norm.weight, norm.bias, norm.eps), layers, factor, heads, reads, in_place)


def _attention_layers(attention: nn.Module) -> list[LayerArguments] | None:
    layers = [attention._modules[name] for name in (*PROJECTIONS, OUT)]
    if not all(isinstance(layer, BlockSparseLinear) and type(layer).forward is _LINEAR_FORWARD for layer in layers):
        return None
    return [cast(BlockSparseLinear, layer).arguments() for layer in layers]


def _mlp_layers(mlp: nn.Module) -> list[LayerArguments] | None:
    found = fused_layers(mlp)
    if found is None:
        return None
    first, second, name = found
    if not isinstance(second, BlockSparseLinear) or type(second).forward is not _LINEAR_FORWARD or is_watched(second):
        return None
    return [first.arguments(name), second.arguments()]


def _heads(attention: nn.Module, bias: Tensor | None) -> Heads | None:
    """None where logits are something else than a product, a factor and a number for each token that is seen."""
    if getattr(getattr(attention, "config", None), "_attn_implementation", None) not in ATTENTIONS:
        return None
    if bias is not None:
        if bias.dim() != 4 or bias.shape[1:3] != (1, 1) or not bias.is_floating_point():
            return None
        bias = bias[:, 0, 0].float()
    size, scale = _first(attention, SIZE_NAMES), _first(attention, SCALE_NAMES)
    if not isinstance(size, int) or not isinstance(scale, float):
        return None
    query = cast(BlockSparseLinear, attention._modules[PROJECTIONS[0]])
    return Heads(query.out_features // size, size, scale, bias)


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next((vars(module)[name] for name in names if name in vars(module)), None)


def _plan(places: tuple[_Place, ...]) -> _Plan:
    """What a half does, told by its parts."""
    norm, inner, *rest = (part for _, _, part, _ in places)
    after, projections = rest[: -len(PROJECTIONS) - 1], rest[-len(PROJECTIONS) - 1 :]
    assert norm is not None  # who asks has looked
    assert inner is not None
    factors = [part for part in after if part is not None and _scales(part)]
    works = (
        type(norm) is nn.LayerNorm
        and norm.bias is not None
        and len(norm.normalized_shape) == 1
        and len(factors) <= 1
        and all(part is None or part in factors or _changes_nothing(part) for part in after)
        and (all(part is None for part in projections) or _attends(inner))
    )
    return _Plan(places, works, norm, inner, factors[0] if factors else None)


def _scales(part: nn.Module) -> bool:
    """Whether a part multiplies with its one parameter, told by what becomes of numbers."""
    if list(part._parameters) != [FACTOR] or part._modules:
        return False
    try:
        return type(part).forward(SimpleNamespace(**{FACTOR: 3.0}), 5.0) == 15.0
    except Exception:  # it asks for more than that
        return False


def _changes_nothing(part: nn.Module) -> bool:
    """Whether a part gives what it gets, told by what becomes of a stand-in; dropout does outside of training."""
    if type(part) is nn.Dropout:
        return True
    stand_in = object()
    try:
        forward: Callable[..., object] = part.forward
        return not part._parameters and forward(stand_in) is stand_in
    except Exception:  # it computes with it
        return False


class _StandIn:
    """An attention with other Linears, and with an implementation that says all that is computed."""

    def __init__(self, attention: nn.Module, **parts: object) -> None:
        self.__dict__.update(parts)
        self.attention, self.config = attention, SimpleNamespace(_attn_implementation=ATTENTIONS[0])

    def __getattr__(self, name: str) -> object:
        return getattr(self.attention, name)


def _attends(attention: nn.Module) -> bool:
    """Whether an attention is softmax(q k^T * scale + mask) v and its Linears, told by what becomes of numbers."""
    size, scale = _first(attention, SIZE_NAMES), _first(attention, SCALE_NAMES)
    query = attention._modules.get(PROJECTIONS[0])
    if not isinstance(size, int) or not isinstance(scale, float) or not isinstance(query, BlockSparseLinear):
        return False
    tokens, features = 3, query.out_features // size * size
    numbers = torch.arange(3 * tokens * features, dtype=torch.float64).view(3, 1, tokens, features).sin()
    q, k, v = numbers.view(3, 1, tokens, -1, size).transpose(2, 3)
    parts = {name: lambda _, own=own: own for name, own in zip(PROJECTIONS, numbers, strict=True)}
    stand_in = _StandIn(attention, **parts, **{OUT: lambda states: states})
    forward: Callable[..., tuple[Tensor, object]] = type(attention).forward
    read = numbers.new_zeros(1, tokens, query.in_features)
    try:
        for mask in (None, numbers.new_tensor([0.5, -1.0, 2.0]).view(1, 1, 1, tokens)):
            logits = q @ k.transpose(-1, -2) * scale
            weights = (logits if mask is None else logits + mask).softmax(-1)
            expected = (weights @ v).transpose(1, 2).reshape(1, tokens, -1)
            # Some take the softmax in float32 whatever the dtype is.
            if not torch.allclose(forward(stand_in, read, mask)[0], expected, rtol=1e-5, atol=1e-6):
                return False
    except Exception:  # it asks for more than that
        return False
    return True
