"""Commands that measure a model: evaluate and benchmark."""

from typing import Annotated

import typer

from .options import Columns, Shown
from .terminal import command, say, say_skipped

Save = Annotated[bool, typer.Option("--save/--no-save", help="Keep the result with a pruned model in a folder.")]


@command
def evaluate(
    columns: Columns,
    shown: Shown,
    model: Annotated[str, typer.Argument(help="Dense or pruned model: a Hub name or a folder.")],
    dataset: Annotated[str, typer.Option("--dataset", help="Labelled images, named as for prune.")],
    against: Annotated[
        str | None,
        typer.Option("--against", help="Model to compare with, image by image.", show_default="no comparison"),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images in one pass.")] = 32,
    save: Save = True,
) -> None:
    """Measure accuracy, or what else measures the model's task, and the change against another model."""
    shown.begin()
    from ..evaluate.fidelity import Fidelity
    from ..jobs.measure import run_evaluate
    from ..report.tables import evaluation_table, fidelity_table
    from ..sources.named import DataSource

    source = DataSource.of(dataset, **columns.source())
    result, why_not_kept = run_evaluate(model, source, against=against, batch_size=batch_size, save=save)
    values = result.to_dict()
    shown.result(values, fidelity_table if "cosine" in values else evaluation_table)
    if not shown.quiet:
        say_skipped(result.skipped, None if isinstance(result, Fidelity) else result.left_out)
    say_not_kept(why_not_kept)


@command
def benchmark(
    shown: Shown,
    model: Annotated[str, typer.Argument(help="Pruned model: a folder or a Hub name.")],
    against: Annotated[
        str | None, typer.Option("--against", help="Dense model.", show_default="the pruned one with zeros")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Images; may be repeated.", show_default="1")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="About how long for each batch size.")] = 10.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads.", show_default="what torch takes")
    ] = None,
    save: Save = True,
) -> None:
    """Time a pruned and the dense model on this machine, by turns."""
    shown.begin()
    from ..jobs.measure import run_benchmark
    from ..report.tables import latency_table

    sizes = tuple(batch_size or [1])
    values, why_not_kept = run_benchmark(
        model, against=against, batch_sizes=sizes, seconds=seconds, threads=threads, save=save
    )
    shown.result(values, latency_table)
    say_not_kept(why_not_kept)


def say_not_kept(why: str | None) -> None:
    """Why a result is not with its model."""
    if why is not None:
        say(why)
