"""Layers in which tokens merge: transformers' own, with fewer patches from their attention on to their MLP.

A layer of which patches leave gives (states, sizes, places) instead of states, and the next one takes that; the last
one gives every patch a state again. So what is known of the tokens of an image travels with them: nothing is kept in
the model, and several threads may call it.
"""

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from .blockprune_halves import ATTENTION, attend, attention_of, has_halves, think, whole_layer
from .blockprune_heads import ROTATION
from .blockprune_layout import BlockSparseFormatError
from .blockprune_merging import Groups, attention_bias, merge, restore, whole
from .blockprune_subclasses import subclass

# Parameters of embeddings that are tokens before the patches, [.., tokens, width] or [width].
PREFIXES = ("class_embedding", "cls_token", "distillation_token", "register_tokens")
PATCHES = ("patch_embedding", "patch_embeddings")  # what makes the patches; embeddings of text have none
ADDING = ("eager", "sdpa")  # attentions that add what they are given as a mask
LEAST_TOKENS = 2
_EXPORTING = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 knows the latter alone
MEMORY = "_merging"  # of a layer's module
HALVES = "_works_by_halves"  # of a layer that may be an attention and an MLP, one call each
_MERGING = "_whole_class"  # of a class in which tokens may merge: the one that it was made of
OF_TOKENS = SIZES, PLACES = "token_sizes", "token_places"  # arguments that a layer gets of the one before it


class UnmergeableError(BlockSparseFormatError):
    """A model is of a kind whose tokens cannot merge, or is called with what merged tokens have no meaning for."""


@dataclass(frozen=True)
class TokenSchedule:
    """How many patches leave at each layer, between its attention and its MLP.

    Attributes:
        leave: by layer.
        patches: of the image that these numbers are of; of others, as large a share of the patches leaves.
    """

    leave: tuple[int, ...]
    patches: int

    def remaining(self, patches: int) -> list[int]:
        """Of so many patches, how many are there after each layer; one at least."""
        left, found = self.patches, []
        for count in self.leave:
            left -= count
            found.append(max(1, (patches * left + self.patches // 2) // self.patches))
        return found

    def passing(self, patches: int, prefix: int) -> list[tuple[int, int]]:
        """(tokens in the attention, tokens in the MLP) of each layer, of an image of so many patches."""
        left = [patches, *self.remaining(patches)]
        return [(before + prefix, after + prefix) for before, after in pairwise(left)]

    @property
    def merges(self) -> bool:
        """Whether any patch leaves."""
        return any(self.leave)


class _Memory(TypedDict):
    """What a layer remembers: plain values, as another copy of this code may read them."""

    leave: list[int]
    patches: int
    prefix: int
    number: int


def set_schedule(model: nn.Module, schedule: TokenSchedule, names: Iterable[str]) -> None:
    """Let tokens merge in the layers of a model, in place.

    Each layer's class becomes a subclass of the same name, as with torch's own `parametrize` and `fully_shard`.

    Args:
        model: of transformers.
        schedule: of its layers; one by which nothing leaves undoes what was set.
        names: of Linears of these layers.

    Raises:
        UnmergeableError: it is of a kind whose tokens cannot merge.
        BlockSparseFormatError: the schedule is not one of as many layers, or leaves too few tokens.
    """
    layers, prefix = mergeable_layers(model, names)
    check_schedule(schedule, len(layers), prefix)
    for layer in layers:
        _forget(layer)
    for number, layer in enumerate(layers if schedule.merges else ()):
        memory: _Memory = {
            "leave": list(schedule.leave),
            "patches": schedule.patches,
            "prefix": prefix,
            "number": number,
        }
        vars(layer)[MEMORY] = memory
        layer.__class__ = _merging_class(type(layer))


def work_by_halves(model: nn.Module, names: Iterable[str]) -> None:
    """Let layers of a model be an attention and an MLP, each of which may be one call, in place.

    Args:
        model: any.
        names: of Linears of these layers; those that are not of a known kind stay as they are.
    """
    owners = {name.rpartition(".")[0].rpartition(".")[0] for name in names}
    for owner in sorted(owners):
        layer = model.get_submodule(owner)
        if owner and (_MERGING in vars(type(layer)) or has_halves(layer)):
            vars(layer)[HALVES] = True
            layer.__class__ = _merging_class(type(layer))


def work_as_before(model: nn.Module) -> None:
    """Undo `work_by_halves`, in place."""
    for layer in model.modules():
        if vars(layer).pop(HALVES, None) is not None:
            _settle(layer)


def is_merging(layer: nn.Module) -> bool:
    """Whether tokens merge in a layer, or in others of its model."""
    return MEMORY in vars(layer)


def schedule_of(model: nn.Module) -> TokenSchedule | None:
    """By which tokens merge in a model, None where they do not."""
    layers = merging_layers(model)
    return _schedule(vars(layers[0][1])[MEMORY]) if layers else None


def _schedule(memory: _Memory) -> TokenSchedule:
    return TokenSchedule(tuple(memory["leave"]), memory["patches"])


def merging_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the layers of a model in which tokens merge."""
    return [(name, module) for name, module in model.named_modules() if is_merging(module)]


def passing_here(layer: nn.Module, tokens: float) -> tuple[int, int, int]:
    """(tokens in the attention of a layer, tokens in its MLP, those of them that are no patches).

    Args:
        layer: in which tokens merge.
        tokens: before the first layer.
    """
    memory: _Memory = vars(layer)[MEMORY]
    before, after = _schedule(memory).passing(round(tokens) - memory["prefix"], memory["prefix"])[memory["number"]]
    return before, after, memory["prefix"]


def tokens_read(model: nn.Module, name: str, tokens: float) -> float:
    """How many tokens a Linear of a model reads.

    Args:
        model: in which tokens may merge.
        name: of the Linear's module.
        tokens: that it reads where none merge.
    """
    parts = name.split(".")
    for depth in range(len(parts)):
        layer = model.get_submodule(".".join(parts[:depth]))
        if is_merging(layer):
            return passing_here(layer, tokens)[parts[depth] not in ATTENTION]
    return tokens


def passing_tokens(model: nn.Module, tokens: float) -> tuple[tuple[int, int], ...] | None:
    """(tokens in the attention, tokens in the MLP) of each layer, None where none merge.

    Args:
        model: in which tokens may merge.
        tokens: before its first layer.
    """
    return tuple(passing_here(layer, tokens)[:2] for _, layer in merging_layers(model)) or None


def forget_schedule(model: nn.Module) -> None:
    """Let no tokens merge in a model, in place."""
    for module in model.modules():
        _forget(module)


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """While it lasts, no tokens merge in a model."""
    held = [(layer, vars(layer).pop(MEMORY)) for _, layer in merging_layers(model)]
    try:
        yield
    finally:
        for layer, memory in held:
            vars(layer)[MEMORY] = memory


def _forget(layer: nn.Module) -> None:
    if vars(layer).pop(MEMORY, None) is not None:
        _settle(layer)


def _settle(layer: nn.Module) -> None:
    """Give a layer its own class again where it remembers nothing that asks for another."""
    base = vars(type(layer)).get(_MERGING)
    # Else torch has made yet another class of it, which does nothing without the memory.
    if base is not None and MEMORY not in vars(layer) and HALVES not in vars(layer):
        layer.__class__ = base


def check_schedule(schedule: TokenSchedule, layers: int, prefix: int) -> None:
    """Refuse a schedule that is not one of so many layers, or that leaves too few tokens.

    Raises:
        BlockSparseFormatError: saying what was found.
    """
    if len(schedule.leave) != layers:
        raise BlockSparseFormatError(f"tokens: {len(schedule.leave)} numbers, but the model has {layers} layers")
    left = schedule.patches - sum(schedule.leave)
    if left < 1 or left + prefix < LEAST_TOKENS:
        raise BlockSparseFormatError(
            f"tokens: {sum(schedule.leave)} of {schedule.patches} patches leave, so that {max(left, 0) + prefix} "
            f"tokens are left; {LEAST_TOKENS} must stay, one of them a patch"
        )


def mergeable_layers(model: nn.Module, names: Iterable[str]) -> tuple[list[nn.Module], int]:
    """(the layers in which a model's tokens can merge, tokens before its patches).

    Args:
        model: of transformers.
        names: of Linears of these layers.

    Raises:
        UnmergeableError: it is of a kind whose tokens cannot merge, saying why.
    """
    kind = type(model).__name__
    if (why := _unmergeable(model)) is not None:
        raise UnmergeableError(f"{kind}: tokens cannot merge, as {why}")
    name = _layer_list(model, set(names))
    layers = list(model.get_submodule(name).children())
    for layer in layers:
        if not isinstance(layer, nn.Module) or not (_MERGING in vars(type(layer)) or has_halves(layer)):
            raise UnmergeableError(
                f"{kind}: tokens cannot merge, as {name} has a {type(layer).__name__}, which is not known to be an "
                "attention and an MLP, each added to what it reads"
            )
    return layers, _prefix(model, name)


def _unmergeable(model: nn.Module) -> str | None:
    """What about a model's kind forbids that its tokens merge, None for nothing."""
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Backbone"):
            return f"it gives states of its layers as maps of patches ({name or 'all of it'})"
        for parameter, _ in module.named_parameters(recurse=False):
            if "relative_position_bias" in parameter:
                return f"its attention has a bias for each pair of places ({name}.{parameter})"
        if ROTATION in inspect.signature(module.forward).parameters:
            return f"places turn the features of its queries and keys ({name})"
        if hasattr(module, "window_size"):
            return f"its attention is one within windows ({name})"
    return None


def _layer_list(model: nn.Module, names: set[str]) -> str:
    """Name of the list of layers that holds all of some Linears."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [name for name in lists if all(linear.startswith(f"{name}.") for linear in names)]
    if not names or not found:
        raise UnmergeableError(
            f"{type(model).__name__}: tokens merge in one list of layers, and its Linears lie in more"
        )
    return found[0]


def _prefix(model: nn.Module, layers: str) -> int:
    """How many tokens the embeddings beside a list of layers put before the patches."""
    parts = layers.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        embeddings = getattr(model.get_submodule(".".join(parts[:depth])), "embeddings", None)
        if isinstance(embeddings, nn.Module) and any(hasattr(embeddings, name) for name in PATCHES):
            tokens = [getattr(embeddings, name, None) for name in PREFIXES]
            return sum(token.shape[-2] if token.dim() > 1 else 1 for token in tokens if isinstance(token, Tensor))
    raise UnmergeableError(f"{type(model).__name__}: it is not known which of its tokens are patches")


def _merging_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's class in which tokens merge."""
    return base if _MERGING in vars(base) else _made_class(base)


@functools.cache
def _made_class(base: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, states: object, *args: object, **kwargs: object) -> object:
        """What the layer before gave is taken apart here, so that hooks and checkpointing see states, as ever."""
        if isinstance(states, tuple):
            states, kwargs[SIZES], kwargs[PLACES] = states
        given = base.__call__(self, states, *args, **kwargs)
        memory: _Memory | None = vars(self).get(MEMORY)
        if memory is not None and isinstance(given, tuple) and memory["number"] == len(memory["leave"]) - 1:
            return restore(given[0], Groups(*given[1:]))
        return given

    @functools.wraps(base.forward)
    def forward(self: nn.Module, states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> object:
        memory: _Memory | None = vars(self).get(MEMORY)
        if memory is not None:
            return _step(self, memory, states, attention_mask, **kwargs)
        if HALVES in vars(self):
            return whole_layer(self, states, attention_mask, **kwargs)
        return base.forward(self, states, attention_mask, **kwargs)

    return subclass(base, _made_class, {"__call__": call, "forward": forward, _MERGING: base})


def _step(
    layer: nn.Module,
    memory: _Memory,
    states: Tensor,
    mask: Tensor | None,
    token_sizes: Tensor | None = None,
    token_places: Tensor | None = None,
    **kwargs: object,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """One layer: as it is, until the first patches have left.

    Raises:
        UnmergeableError: it is called with what merged tokens have no meaning for.
    """
    prefix = memory["prefix"]
    # Reentrant checkpoints take all that a layer gives for differentiable, and would follow it back without end.
    groups = None if token_sizes is None or token_places is None else Groups(token_sizes.detach(), token_places)
    patches = (states.shape[1] if groups is None else groups.places.shape[1]) - prefix
    left = _schedule(memory).remaining(patches)
    leave = states.shape[1] - prefix - left[memory["number"]]
    if groups is None and not leave:
        return whole_layer(layer, states, mask, **kwargs)
    if mask is not None and not _EXPORTING():  # there transformers makes one of nothing but True
        raise UnmergeableError("attention_mask: has no meaning where tokens merge; leave it out")
    bias = None
    if groups is not None:
        _check_adds(attention_of(layer))
        bias = attention_bias(groups, states.dtype)
        if not leave:
            return whole_layer(layer, states, bias, **kwargs), groups.sizes, groups.places
    states, read = attend(layer, states, bias, **kwargs)
    states, groups = merge(states, read, groups or whole(states), leave, prefix)
    return think(layer, states), groups.sizes, groups.places


def _check_adds(attention: nn.Module) -> None:
    """Refuse attentions that cannot count a token as often as it has patches."""
    used = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if used not in ADDING:
        raise UnmergeableError(
            f"attn_implementation: {used!r} adds nothing to logits, as merged tokens need; load the model with "
            f"{' or '.join(map(repr, ADDING))}"
        )
