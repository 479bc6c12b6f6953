"""Attentions from which whole heads, or features of all heads, were cut out.

What is left is transformers' own attention with other attributes: it takes the size of a head from one, and the number
of heads from that and the shapes. The factor of its scores is an attribute too, and stays that of the dense model.
"""

import inspect
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import TypedDict

import torch
from torch import Tensor, nn

from .blockprune_layout import BlockSparseFormatError

PARTS = ("query", "key", "value", "out")
# Attributes of transformers' attentions, in transformers 5 as it is now and as it began.
SIZE_NAMES, COUNT_NAMES = ("head_dim", "attention_head_size"), ("num_attention_heads", "num_heads")
TOTAL_NAME, SCALE_NAMES = "all_head_size", ("scaling", "scale")
POSITION_BIAS = "position_bias"  # in names of tables that have a column for each head
ROTATION = "position_embeddings"  # an argument of attentions that turn features of q and k in pairs
MEMORY = "_cut_heads"  # of an attention's module: what was cut from it


@dataclass(frozen=True)
class CutHeads:
    """What is left of an attention.

    Attributes:
        query, key, value, out: module names of its Linears, [heads * head_size, width] and, out, the other way round.
        heads, head_size: that it has.
        dense_heads, dense_head_size: those of the architecture.
    """

    query: str
    key: str
    value: str
    out: str
    heads: int
    head_size: int
    dense_heads: int
    dense_head_size: int

    @property
    def attention(self) -> str:
        """Name of the module that computes it."""
        return self.query.rpartition(".")[0]

    @property
    def features(self) -> int:
        """Outputs of query, key and value."""
        return self.heads * self.head_size

    @property
    def dense_features(self) -> int:
        """The same in the architecture."""
        return self.dense_heads * self.dense_head_size

    def names(self) -> tuple[str, str, str, str]:
        """Module names of its Linears, out last."""
        return self.query, self.key, self.value, self.out

    def places(self) -> Tensor:
        """Which feature of the dense attention each one is, int64 [features]: feature j of head h is h * size + j."""
        heads = torch.arange(self.heads)[:, None] * self.dense_head_size
        return (heads + torch.arange(self.head_size)).flatten()


class _Memory(TypedDict):
    """What an attention's module remembers: plain values, as another copy of this code may read them.

    Names are those within the smallest module that holds all four, which lies `levels` above the attention: the model
    may be part of another one later.
    """

    names: list[str]
    levels: int
    sizes: list[int]


def layer_number(name: str) -> int:
    """Number of the layer that a module of a list of layers lies in."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def set_heads(model: nn.Module, cut: CutHeads) -> None:
    """Tell an attention how many heads it has and how large they are, in place; its Linears are as small already.

    Args:
        model: that holds it.
        cut: what it is to be; remembered by the module, and so by copies of it.

    Raises:
        BlockSparseFormatError: as for `check_heads`.
    """
    check_heads(model, cut, sizes=True)
    attention = model.get_submodule(cut.attention)
    _write(attention, cut.heads, cut.head_size)
    names = [name.split(".") for name in cut.names()]
    shared = _shared(names)
    memory: _Memory = {
        "names": [".".join(name[shared:]) for name in names],
        "levels": len(names[0]) - 1 - shared,
        "sizes": [cut.heads, cut.head_size, cut.dense_heads, cut.dense_head_size],
    }
    vars(attention)[MEMORY] = memory


def cut_heads(model: nn.Module) -> list[CutHeads]:
    """What was cut from the attentions of a model, in the order of its modules, under its own names of them."""
    found = []
    for name, module in model.named_modules():
        memory: _Memory | None = vars(module).get(MEMORY)
        if memory is not None:
            parts = name.split(".") if name else []
            above = parts[: len(parts) - memory["levels"]]
            query, key, value, out = (".".join([*above, own]) for own in memory["names"])
            found.append(CutHeads(query, key, value, out, *memory["sizes"]))
    return found


def restore_heads(model: nn.Module) -> None:
    """Tell all attentions of a model that they are the architecture's again, in place; so their Linears must be."""
    for cut in cut_heads(model):
        _write(model.get_submodule(cut.attention), cut.dense_heads, cut.dense_head_size)
    forget_heads(model)


def forget_heads(model: nn.Module) -> None:
    """Let all attentions of a model be as small as they are for good, in place: nothing can make them whole again."""
    for module in model.modules():
        vars(module).pop(MEMORY, None)


def check_heads(model: nn.Module, cut: CutHeads, *, sizes: bool = False) -> None:
    """Refuse what cannot be left of an attention.

    Args:
        model: that holds it, dense or cut.
        cut: what it would be.
        sizes: whether its Linears are as small already.

    Raises:
        BlockSparseFormatError: naming the module: its Linears are not four of one attention, it is of a kind that
            cannot be cut, a number is none or larger than the architecture's, nothing is cut, or a Linear has another
            size.
    """
    name = cut.query
    if not _is_one_attention(cut):
        raise BlockSparseFormatError(f"{name}: no query, key, value and out of one attention: {', '.join(cut.names())}")
    dense = dense_heads_of(model, name)
    if dense != (cut.dense_heads, cut.dense_head_size):
        raise BlockSparseFormatError(
            f"{name}: {cut.dense_heads} heads of {cut.dense_head_size} said of an architecture of {dense[0]} of "
            f"{dense[1]}"
        )
    for what, value, most in (("heads", cut.heads, dense[0]), ("head_size", cut.head_size, dense[1])):
        if type(value) is not int or not 1 <= value <= most:
            raise BlockSparseFormatError(f"{name}: {what} from 1 to {most}, got {reprlib.repr(value)}")
    if cut.features == cut.dense_features:
        raise BlockSparseFormatError(f"{name}: nothing is cut from its {dense[0]} heads of {dense[1]}")
    _check_positions(model, cut)
    for part in cut.names() if sizes else ():
        layer = _module(model, part)
        size = getattr(layer, "in_features" if part == cut.out else "out_features", None)
        if size != cut.features:
            raise BlockSparseFormatError(f"{part}: {size} features, not {cut.heads} heads of {cut.head_size}")


def _is_one_attention(cut: CutHeads) -> bool:
    """Whether names can be those of one attention; out may lie beside it, as it did when transformers 5 began."""
    names = [name.split(".") for name in cut.names()]
    together = all(name[:-1] == names[0][:-1] for name in names[:3])
    return together and len(set(cut.names())) == len(PARTS) and len(names[0]) - 1 - _shared(names) <= 1


def _shared(names: list[list[str]]) -> int:
    """How many parts names have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False)))


def _check_positions(model: nn.Module, cut: CutHeads) -> None:
    """Refuse cuts from which the model's knowledge of positions would suffer.

    Raises:
        BlockSparseFormatError: naming the module.
    """
    if cut.heads < cut.dense_heads and (bias := _position_bias(model, cut.attention)) is not None:
        raise BlockSparseFormatError(f"{cut.query}: must keep {cut.dense_heads} heads, as each has a place in {bias}")
    taken = inspect.signature(_module(model, cut.attention).forward).parameters
    if cut.head_size < cut.dense_head_size and ROTATION in taken:
        raise BlockSparseFormatError(
            f"{cut.query}: must keep {cut.dense_head_size} features of a head, as positions turn them in pairs"
        )


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise BlockSparseFormatError(f"{name}: {type(model).__name__} has no such module") from None


def dense_heads_of(model: nn.Module, query: str) -> tuple[int, int]:
    """(heads, features of each) of the architecture's attention, also where it was cut.

    Args:
        model: that holds it.
        query: module name of its query.

    Raises:
        BlockSparseFormatError: it is of a kind that cannot be cut.
    """
    attention = _module(model, query.rpartition(".")[0])
    memory: _Memory | None = vars(attention).get(MEMORY)
    if memory is not None:
        return memory["sizes"][2], memory["sizes"][3]
    kind = type(attention).__name__
    heads, size = _number(attention, COUNT_NAMES), _number(attention, SIZE_NAMES)
    if heads is None or size is None:
        missing = COUNT_NAMES if heads is None else SIZE_NAMES
        raise BlockSparseFormatError(f"{query}: {kind} has no {' or '.join(missing)}, so its heads cannot be cut")
    if not any(isinstance(getattr(attention, name, None), float) for name in SCALE_NAMES):
        raise BlockSparseFormatError(
            f"{query}: {kind} has no {' or '.join(SCALE_NAMES)}: its scores change with the size of a head, so its "
            "heads cannot be cut"
        )
    return heads, size


def is_attention(module: nn.Module) -> bool:
    """Whether a module has heads of a size."""
    return _number(module, SIZE_NAMES) is not None


def _number(attention: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first attribute of these that is a whole number."""
    found = (getattr(attention, name, None) for name in names)
    return next((value for value in found if type(value) is int), None)


def _write(attention: nn.Module, heads: int, head_size: int) -> None:
    values = dict.fromkeys(COUNT_NAMES, heads) | dict.fromkeys(SIZE_NAMES, head_size) | {TOTAL_NAME: heads * head_size}
    for name, value in values.items():
        if hasattr(attention, name):
            setattr(attention, name, value)


def _position_bias(model: nn.Module, attention: str) -> str | None:
    """Name of a position bias of each head in an attention, or in what it lies in."""
    parts = attention.split(".")
    for depth in range(len(parts) + 1):
        above = ".".join(parts[:depth])
        for name in _own_names(model.get_submodule(above)):
            if POSITION_BIAS in name:
                return f"{above}.{name}".lstrip(".")
    return None


def _own_names(module: nn.Module) -> Iterator[str]:
    """Names of a module's own parameters and parts."""
    yield from (name for name, _ in module.named_parameters(recurse=False))
    yield from (name for name, _ in module.named_children())
