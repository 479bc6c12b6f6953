"""The `blockprune` command.

Help and completion import none of torch and transformers: what a command needs is imported once it runs.
"""

from typing import Annotated

import typer

from ..version import __version__
from .checkpoints import export, inspect, push, report, simulate, tokens
from .machine import calibrate, demo, env
from .measuring import benchmark, evaluate
from .pruning import prune, recover, sweep
from .training import finetune

app = typer.Typer(
    help="Make vision transformers small and fast by removing whole blocks of their weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    *(prune, recover, finetune, evaluate, benchmark, inspect, sweep),
    *(report, tokens, export, push, simulate, calibrate, env, demo),
):
    app.command()(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass
