"""Checks that settings share: each refuses a value by the name of its key, and says what was expected."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NoReturn, TypeGuard

from .errors import ConfigError


def refuse(key: str, expected: str, got: object) -> NoReturn:
    """Raise the error for a wrong value.

    Args:
        key: where it stood, with dots between a setting and the one that it is part of.
        expected: what would be right, as words that follow "expected".
        got: the value.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(f"{key}: expected {expected}, got {got!r}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def check_whole(key: str, value: object, minimum: int) -> None:
    """Refuse all but whole numbers from a minimum."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        refuse(key, f"a whole number from {minimum}", value)


def check_number(key: str, value: object, least: float = 0.0, most: float = math.inf) -> None:
    """Refuse all but numbers from `least` to `most`."""
    if not is_number(value) or not least <= value <= most:
        limits = f"from {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        refuse(key, f"a number {limits} (YAML reads 1e-3 as text: write 1.0e-3)", value)


def check_keys(cls: type, values: object, where: str) -> None:
    """Refuse what is no mapping, and keys that are no fields of a dataclass."""
    if not isinstance(values, Mapping):
        refuse(where, "a mapping of settings", values)
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}; known keys are {', '.join(known)}")
