"""Values of a checkpoint's JSON files, which anybody may have written: of the type that is expected, or refused."""

import math
import re
from collections.abc import Mapping
from typing import TypeGuard

from .errors import CheckpointError

MAX_TEXT = 200
MAX_ROWS = 200
MAX_DEPTH = 4
# Control characters, halves of surrogate pairs, and what turns the direction of all the text that follows.
UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
MAX_NUMBER = 1e100  # so that whole numbers of any length can be shown


class StoredValues:
    """Reads a mapping key by key; a key that is absent, or holds null, reads as None.

    Args:
        values: what was read.
        where: the file, and the keys that lead there, for messages.
    """

    def __init__(self, values: object, where: str) -> None:
        self.where = where
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where}: expected a mapping, got {short(values)}")
        self.values: Mapping[str, object] = values

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """A finite number within bounds."""
        value = self.values.get(key)
        if value is None:
            return None
        if not is_number(value) or not low <= value <= high:
            bounds = "" if math.isinf(low) else f" from {low:g}" + ("" if math.isinf(high) else f" to {high:g}")
            raise CheckpointError(f"{self.where}.{key}: expected a number{bounds}, got {short(value)}")
        return value

    def need(self, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A number that has to be there."""
        value = self.number(key, low, high)
        if value is None:
            raise CheckpointError(f"{self.where}.{key}: expected a number, got nothing")
        return value

    def count(self, key: str) -> int:
        """A whole number from 1 that has to be there."""
        value = self.need(key, 1)
        if not isinstance(value, int):
            raise CheckpointError(f"{self.where}.{key}: expected a whole number, got {short(value)}")
        return value

    def numbers(self, key: str, count: int) -> list[float] | None:
        """So many finite numbers."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or not all(map(is_number, value)):
            raise CheckpointError(f"{self.where}.{key}: expected {count} numbers, got {short(value)}")
        return value

    def text(self, key: str) -> str | None:
        """A text, cut where it is long."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise CheckpointError(f"{self.where}.{key}: expected text, got {short(value)}")
        return short(value)

    def part(self, key: str) -> "StoredValues | None":
        """The mapping under a key."""
        value = self.values.get(key)
        return None if value is None else StoredValues(value, f"{self.where}.{key}")

    def parts(self, key: str) -> "list[StoredValues]":
        """The mappings in the list under a key; none where it is absent."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise CheckpointError(f"{self.where}.{key}: expected a list, got {short(value)}")
        return [StoredValues(entry, f"{self.where}.{key}[{i}]") for i, entry in enumerate(value)]


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def short(value: object) -> str:
    """A value as text of bounded length that can be written and shown in one direction."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = "something nested too deeply"
    text = text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
    return UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def flat(values: object, prefix: str = "") -> list[tuple[str, str]]:
    """(key, value) rows of nested mappings as texts, keys joined by dots; of bounded number, depth and length."""
    if not isinstance(values, Mapping) or not values or prefix.count(".") >= MAX_DEPTH:
        return [(short(prefix), "-" if values is None else short(values))]
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        rows += flat(value, f"{prefix}.{key}" if prefix else str(key))
        if len(rows) >= MAX_ROWS:
            return [*rows[: MAX_ROWS - 1], ("…", "more was left out")]
    return rows
