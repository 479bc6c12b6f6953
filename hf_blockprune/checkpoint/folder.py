"""Saved checkpoints as folders: written whole or not at all."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from ..errors import CheckpointError
from ..files import check_writable, partial_file, partial_folder
from ..model.loading import HUB_OPTIONS
from ..report.values import Report
from ..types import JsonDict

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
RECIPE_FILE = "blockprune_config.json"
REPORT_FILE = "blockprune_report.json"
CARD_FILE = "README.md"


@contextmanager
def staged_directory(directory: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that takes the place of `directory` when the block ends well, and vanishes when it does not.

    Raises:
        CheckpointError: the folder exists and may not be replaced, or writing failed (a full disk, say).
    """
    target = Path(directory).expanduser().resolve()
    check_output(target, overwrite=overwrite)
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = stack.enter_context(partial_folder(target))
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot be created ({error.strerror or error})") from error
        try:
            yield staging
            stack.close()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{directory}: could not be written ({error}); nothing was changed, free some space or name another "
                "folder"
            ) from error


def check_output(directory: str | Path, *, overwrite: bool) -> None:
    """Refuse an output folder that exists, or that cannot be made, before any long work is begun.

    Raises:
        CheckpointError: it is a file, holds files and `overwrite` is off, is no checkpoint and so never replaced, or
            its folder cannot be written.
    """
    target = Path(directory).expanduser()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{directory}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise CheckpointError(
                f"{directory}: exists already; pass --overwrite (overwrite=True) or name another folder"
            )
        if not (target / CONFIG_FILE).is_file():
            raise CheckpointError(f"{directory}: is no saved model (it has no config.json), so it is not overwritten")
    _check_writable(target)


def check_output_file(file: str | Path, *, overwrite: bool) -> None:
    """Refuse an output file that exists, or that cannot be made, before any long work is begun.

    Raises:
        CheckpointError: it is a folder, exists and `overwrite` is off, or its folder cannot be written.
    """
    target = Path(file).expanduser()
    if target.is_dir():
        raise CheckpointError(f"{file}: is a folder; name a file")
    if target.exists() and not overwrite:
        raise CheckpointError(f"{file}: exists already; pass --overwrite (overwrite=True) or name another file")
    _check_writable(target)


def _check_writable(target: Path) -> None:
    try:
        check_writable(target.resolve())
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error}); name another place") from error


def report_file(name: str, kwargs: Mapping[str, object]) -> Path | None:
    """The report beside a pruned model in a folder or on the Hub; None where something else saved it.

    Args:
        name: Hub name or folder.
        kwargs: what its model was loaded with (revision, token, cache_dir, ...).
    """
    path = cached_file(
        name,
        REPORT_FILE,
        **{key: value for key, value in kwargs.items() if key in HUB_OPTIONS},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def read_report(path: Path) -> Report | None:
    """The report in a file, None where there is no file.

    Raises:
        CheckpointError: a key is missing or of another kind than it should be: anyone may have written it.
        ConfigError: its config holds budgets that are none.
    """
    return Report.from_dict(read_json(path), str(path)) if path.is_file() else None


def read_json(path: Path) -> JsonDict:
    """A JSON object from a checkpoint's file.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def write_text(path: Path, text: str) -> None:
    """Write a file of its own, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with partial_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_json(path: Path, values: JsonDict) -> None:
    """Write a file of a folder that is being made; errors are its."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
