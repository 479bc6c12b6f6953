"""Errors a user can act on: each message says what was expected, what came and how to mend it.

`BlockSparseFormatError`, which a damaged or hostile checkpoint raises, and `BackendError` live with the format in
`hf_blockprune.hub.blockprune_layout` because that file travels alone with every saved model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hub.blockprune_layout import BackendError, BlockSparseFormatError

__all__ = [
    "BackendError",
    "BlockPruneError",
    "BlockSparseFormatError",
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HubError",
    "ModelError",
]


def __getattr__(name: str) -> type[Exception]:
    """The errors of the format's files, without importing torch for the others."""
    if name in ("BackendError", "BlockSparseFormatError"):
        from .hub.blockprune_layout import BackendError, BlockSparseFormatError

        return {"BackendError": BackendError, "BlockSparseFormatError": BlockSparseFormatError}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def first_line(error: BaseException | None) -> str:
    """The first line of an error of others that says something, or its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def first_names(names: Sequence[str], most: int) -> str:
    """The first of many names, and a sign that there are more."""
    return f"{', '.join(names[:most])}{', ...' if len(names) > most else ''}"


class BlockPruneError(Exception):
    """Base class of the errors this package raises on purpose."""


class ConfigError(BlockPruneError, ValueError):
    """A setting is unknown, impossible, or contradicts another one."""


class ModelError(BlockPruneError):
    """The model cannot be found, loaded, or pruned."""


class DataError(BlockPruneError):
    """The images or labels cannot be used."""


class BudgetError(BlockPruneError):
    """No block mask can meet the budget that was asked for."""


class CheckpointError(BlockPruneError):
    """A checkpoint cannot be written, or what was read is damaged."""


class HubError(BlockPruneError):
    """The Hub refused, or cannot be reached."""
