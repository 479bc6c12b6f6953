"""Commands that remove blocks, and repair what is left: prune, recover and sweep."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer

from ..budget import Budget
from ..config import shape_text
from ..score.methods import METHODS
from ..types import JsonDict
from .options import (
    DEFAULTS,
    Calibration,
    Choosing,
    Dataset,
    EvaluateOn,
    Ignore,
    Output,
    Recipe,
    Recovering,
    Repair,
    Shown,
    Training,
    Unfinished,
    parse_block_shape,
    parse_each,
    parse_flops_or_budget,
)
from .terminal import command, say, say_error, say_skipped

DEFAULT_SHAPE = shape_text(DEFAULTS.block_shape)
Teacher = Annotated[
    str | None, typer.Option("--teacher", help="The dense model that it was pruned from: a Hub name or a folder.")
]
DenseModel = Annotated[str | None, typer.Argument(help="Dense model: a Hub name or a folder. A recipe may name it.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="The same as MODEL.", hidden=True)]


def one_model(argument: str | None, option: str | None) -> str | None:
    """The model that was named, in either way."""
    if argument is not None and option is not None:
        raise typer.BadParameter(f"MODEL ({argument}) and --model ({option}) are the same; give one of them")
    return argument or option


@command
def prune(
    choosing: Choosing,
    repair: Repair,
    training: Training,
    calibration: Calibration,
    unfinished: Unfinished,
    shown: Shown,
    model: DenseModel = None,
    model_option: ModelOption = None,
    config: Recipe = None,
    dataset: Dataset = None,
    output: Output = None,
    evaluate_on: EvaluateOn = None,
) -> None:
    """Prune a model and save it block-sparse."""
    shown.begin()
    from ..jobs.prune import PruneJob, run_prune
    from ..report.tables import summary_table

    settings = {**choosing.settings(), **repair.settings(), **training.settings(), **calibration.settings()}
    if choosing.budget is not None:
        settings["budget"] = asdict(choosing.budget)
    model = one_model(model, model_option)
    job = PruneJob.read(config, model=model, dataset=dataset, output=output, evaluation=evaluate_on, **settings)
    report = run_prune(job, **unfinished.what_to_do())
    shown.result(report, summary_table)
    if not shown.quiet and report["calibration"] is not None:
        say_skipped(report["calibration"]["skipped"], report["calibration"]["left_out"])


@command
def recover(
    training: Training,
    calibration: Recovering,
    unfinished: Unfinished,
    shown: Shown,
    model: Annotated[str, typer.Argument(help="Pruned model: a folder or a Hub name.")],
    config: Recipe = None,
    teacher: Teacher = None,
    dataset: Dataset = None,
    output: Output = None,
    evaluate_on: EvaluateOn = None,
) -> None:
    """Train a pruned model to behave like the dense one, without labels; its masks stay as they are."""
    shown.begin()
    from ..jobs.recover import RecoverJob, run_recover
    from ..report.tables import summary_table

    job = RecoverJob.read(
        config,
        model=model,
        teacher=teacher,
        dataset=dataset,
        output=output,
        evaluation=evaluate_on,
        **training.settings(),
        **calibration.settings(),
    )
    report = run_recover(job, **unfinished.what_to_do())
    shown.result(report, summary_table)


@command
def sweep(
    repair: Repair,
    training: Training,
    calibration: Calibration,
    shown: Shown,
    budgets: Annotated[
        Sequence[Budget],
        typer.Option(
            "--budgets",
            parser=parse_each(parse_flops_or_budget),
            metavar="RATIO,...",
            help="Shares of the FLOPs, or budgets as for prune, with commas between.",
        ),
    ],
    model: DenseModel = None,
    config: Recipe = None,
    dataset: Dataset = None,
    evaluate_on: Annotated[
        str | None,
        typer.Option("--evaluate-on", "--evaluate", help="Labelled images to compare with the dense model on."),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for results and checkpoints.")] = None,
    block_shapes: Annotated[
        Any,  # pairs of rows and columns; the default is text, which is parsed too
        typer.Option(
            "--block-shapes", parser=parse_each(parse_block_shape), metavar="ROWSxCOLS,...", help="Blocks to try."
        ),
    ] = DEFAULT_SHAPE,
    methods: Annotated[
        Sequence[str],
        typer.Option("--methods", parser=parse_each(str), metavar="METHOD,...", help=f"Of {', '.join(METHODS)}."),
    ] = DEFAULTS.method,
    keep: Annotated[
        Literal["all", "frontier", "none"], typer.Option("--keep", help="Checkpoints to keep.")
    ] = "frontier",
    ignore: Ignore = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what points that are not done keep of their runs.")
    ] = False,
) -> None:
    """Prune a model at every point of a grid and compare them; the same command goes on where it stopped."""
    shown.begin()
    from ..jobs.prune import PruneJob
    from ..jobs.sweep import Grid, run_sweep
    from ..report.tables import sweep_table

    settings = {**repair.settings(), **training.settings(), **calibration.settings(), "ignore": ignore or None}
    job = PruneJob.read(config, model=model, dataset=dataset, output=output, evaluation=evaluate_on, **settings)
    grid = Grid(tuple(budgets), tuple(block_shapes), tuple(methods))
    values = run_sweep(job, grid, keep=keep, on_point=None if shown.quiet else say_point, restart=restart)
    shown.result(values, sweep_table)
    if failed := [point for point in values["points"] if point["status"] == "failed"]:
        for point in failed:
            say_error(f"{point['name']}: {point['error']}")
        raise typer.Exit(1)


def say_point(point: JsonDict) -> None:
    """One line on a sweep's point that is done."""
    result = f"top-1 {point['evaluation']['top1']:.2%}" if point["status"] == "done" else "failed"
    say(f"{point['name']}: {result}, {point['wall_seconds']:.0f} s")
