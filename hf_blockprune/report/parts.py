"""Typed parts of a report, and how they are read from and written to plain values.

A report is a file that other versions of the package wrote, or strangers. So a part refuses values of the wrong kind by
their key, keeps keys that it does not know, and writes no key that the file had not and nobody has set since.
"""

from collections import abc
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from types import UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import CheckpointError
from ..stored_values import short
from ..types import JsonDict

P = TypeVar("P", bound="Part")
FLAT = {"flat": True}  # metadata of a field whose keys stand among those of the part that holds it
CHECKED = {"checked": True}  # metadata of a field that the part's own `check` reads, and nothing before
KINDS: dict[object, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(kw_only=True)
class Part:
    """Some keys of a report; a class's own fields are the keys, in the order in which they are written.

    Attributes:
        extra: keys that this version does not know, with their values.
        absent: names of fields that are not written as long as they hold their default.
    """

    extra: JsonDict = field(default_factory=dict)
    absent: frozenset[str] = frozenset()

    @classmethod
    def from_dict(cls: type[P], values: object, where: str = "report") -> P:
        """Read plain values, as `to_dict` gives them.

        Args:
            values: a mapping; anybody may have written it.
            where: the file, for messages.

        Raises:
            CheckpointError: a key is missing, or its value is of another kind than it should be.
        """
        return cls._from(values, f"{where}: ")

    @classmethod
    def _from(cls: type[P], values: object, prefix: str) -> P:
        """Read values; `prefix` is the file and the keys that lead there, as messages begin."""
        if not isinstance(values, Mapping):
            _refuse(prefix, "an object", values)
        made, absent, known = {}, set(), set()
        for each, kind in _schema(cls):
            if (part := _flat(each, kind)) is not None:
                inner = {key: value for key, value in values.items() if key in part.key_names()}
                made[each.name] = part._from(inner, prefix)
                known |= part.key_names()
                continue
            known.add(each.name)
            if each.name in values and each.metadata.get("checked"):
                made[each.name] = values[each.name]
            elif each.name in values:
                made[each.name] = _read(values[each.name], kind, f"{prefix}{each.name}.")
            elif _has_default(each):
                absent.add(each.name)
            else:
                raise CheckpointError(
                    f"{prefix}{each.name} must be there, and be {_words(kind)}; delete the file to go without"
                )
        extra = {key: value for key, value in values.items() if key not in known}
        read = cls(**made, extra=extra, absent=frozenset(absent))
        read.check(prefix)
        return read

    def check(self, prefix: str) -> None:
        """Refuse values that are of the right kinds and yet none; `prefix` as of messages."""

    @classmethod
    def key_names(cls) -> frozenset[str]:
        """All keys that the part knows."""
        found = set()
        for each, kind in _schema(cls):
            part = _flat(each, kind)
            found |= {each.name} if part is None else part.key_names()
        return frozenset(found)

    def to_dict(self) -> JsonDict:
        """Plain values, which JSON can write."""
        values: JsonDict = {}
        for each, _ in _schema(type(self)):
            value = getattr(self, each.name)
            if each.metadata.get("flat"):
                values |= value.to_dict()
            elif each.name not in self.absent or value != _default(each):
                values[each.name] = _plain(value)
        return {**values, **self.extra}


@cache
def _schema(part: type[Part]) -> list[tuple[Field[object], object]]:
    """The fields that are keys, or hold some, with their declared kinds."""
    hints = get_type_hints(part)
    return [(each, hints[each.name]) for each in fields(part) if each.name not in ("extra", "absent")]


def _flat(each: Field[object], kind: object) -> type[Part] | None:
    """The part whose keys stand among those of the part that holds it, where a field is one."""
    if each.metadata.get("flat") and isinstance(kind, type) and issubclass(kind, Part):
        return kind
    return None


def _has_default(each: Field[object]) -> bool:
    return each.default is not MISSING or each.default_factory is not MISSING


def _default(each: Field[object]) -> object:
    return each.default if each.default_factory is MISSING else each.default_factory()


def _read(value: object, kind: object, prefix: str) -> object:
    """A value as the declared kind has it, such as `list[int]`, `LayerReport | None`, or `object` for all there is."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in (object, Any):  # the values of a JsonDict are Any
        return value
    if origin in (Union, UnionType):  # of something and None
        return None if value is None else _read(value, inner[0], prefix)
    if origin is list:
        if not isinstance(value, (list, tuple)):
            _refuse(prefix, "a list", value)
        return [_read(each, inner[0], f"{prefix[:-1]}[{i}].") for i, each in enumerate(value)]
    if origin in (dict, abc.Mapping):
        if not isinstance(value, Mapping):
            _refuse(prefix, "an object", value)
        return {key: _read(each, inner[1], f"{prefix}{short(key)}.") for key, each in value.items()}
    if not isinstance(kind, type):
        raise TypeError(f"{kind}: no kind that a key of a report can have")
    if issubclass(kind, Part):
        return kind._from(value, prefix)
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        _refuse(prefix, KINDS[kind], value)
    return value


def _words(kind: object) -> str:
    """What a kind is called in messages."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _words(inner[0])
    return "a list" if origin is list else KINDS.get(kind, "an object")


def _refuse(prefix: str, kind: str, value: object) -> NoReturn:
    where = prefix.rstrip(".: ")
    raise CheckpointError(f"{where} must be {kind}, got {short(value)}; delete the file to go without")


def _plain(value: object) -> object:
    """Values without parts; lists and mappings are copies."""
    if isinstance(value, Part):
        return value.to_dict()
    if isinstance(value, list):
        return [each.to_dict() if isinstance(each, Part) else each for each in value]
    return dict(value) if isinstance(value, dict) else value
