"""What commands have in common with their terminal: errors of one line, JSON or tables, quiet."""

import functools
import json
import logging
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from inspect import Parameter, signature
from typing import TYPE_CHECKING, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from ..display.console import table_console
from ..errors import first_names
from ..runs.interruption import interruptible

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

err = Console(stderr=True)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors that a user can act on end it with one line and exit code 1, as interruptions do.

    Parameters that are dataclasses become their fields, as options: commands share those that belong together.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}

    def wrapped(**values: object) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})  # type: ignore[operator]
        with interruptible(say):
            _run(function, values)

    functools.update_wrapper(wrapped, function)
    del wrapped.__wrapped__  # typer would read the groups' signature
    parameters = _flat_parameters(function, groups, hints)
    wrapped.__signature__ = signature(function).replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _run(function: Callable[..., None], values: dict[str, object]) -> None:
    from ..errors import BackendError, BlockPruneError, BlockSparseFormatError

    try:
        function(**values)
    except (BackendError, BlockPruneError, BlockSparseFormatError) as error:
        say_error(str(error))
        raise typer.Exit(1) from None


def _flat_parameters(
    function: Callable[..., None], groups: "dict[str, type[DataclassInstance]]", hints: dict[str, object]
) -> list[Parameter]:
    """A command's own parameters, then those of its groups.

    Args:
        function: the command.
        groups: those of its parameters that are dataclasses.
        hints: the annotation of each of its parameters.
    """
    own = [p for p in signature(function).parameters.values() if p.name not in groups]
    flat = [p.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[p.name]) for p in own]
    for group in groups.values():
        of_fields = get_type_hints(group, include_extras=True)
        flat += [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=of_fields[field.name])
            for field in fields(group)
        ]
    return flat


def set_quiet(quiet: bool) -> None:
    """Show errors only, and no progress bars."""
    if not quiet:
        return
    import datasets
    import huggingface_hub.utils
    import transformers

    logging.getLogger("hf_blockprune").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()


def emit(values: object, table: Table, *, as_json: bool) -> None:
    """Print JSON and nothing else, or a table.

    Args:
        values: what `json` can write.
        table: the same to read.
        as_json: which of them.
    """
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    else:
        table_console().print(table)


def say(line: str) -> None:
    """One line beside the result, on standard error."""
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def say_error(message: str) -> None:
    err.print(f"error: {' '.join(message.split())}", style="red", markup=False, highlight=False, soft_wrap=True)


def say_skipped(files: list[str], left_out: list[str] | None = None) -> None:
    """Name the images that could not be decoded, and the files of formats that are not read."""
    if files:
        say(f"skipped {len(files)} corrupt image(s): {', '.join(files)}")
    if left_out:
        say(f"left out {len(left_out)} file(s) that are not read as pictures: {first_names(left_out, 20)}")
