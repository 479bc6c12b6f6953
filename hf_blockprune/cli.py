"""The `blockprune` command."""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .config import Budget
from .errors import BlockPruneError, BlockSparseFormatError, ConfigError
from .tables import (
    evaluation_table,
    fidelity_table,
    inspect_table,
    latency_table,
    plain_table,
    simulation_table,
    summary_table,
    sweep_table,
)

app = typer.Typer(
    help="Make vision transformers small and fast by removing whole blocks of their weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)


def parse_block_shape(text: str) -> tuple[int, int]:
    """ROWSxCOLS as two numbers."""
    rows, _, cols = text.lower().partition("x")
    try:
        return int(rows), int(cols)
    except ValueError:
        raise typer.BadParameter(f"expected ROWSxCOLS such as 32x32, got {text!r}") from None


def parse_budget(text: str) -> Budget:
    """METRIC=RATIO."""
    try:
        return Budget.parse(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


def parse_each(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Comma-separated values, each read by itself."""

    def parse_list(text: str) -> tuple[Any, ...]:
        return tuple(parse(part.strip()) for part in text.split(",") if part.strip())

    return parse_list


def parse_flops_or_budget(text: str) -> Budget:
    """A share of the FLOPs, or METRIC=RATIO."""
    return parse_budget(text if "=" in text else f"flops={text}")


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that a user can act on end the command with one line and exit code 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (BlockPruneError, BlockSparseFormatError) as error:
            err.print(f"error: {' '.join(str(error).split())}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from None

    return wrapped


def set_quiet(quiet: bool) -> None:
    """Show errors only, and no progress bars."""
    if not quiet:
        return
    import datasets
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()


def emit(values: dict[str, Any], table: Table, *, as_json: bool) -> None:
    """Print JSON and nothing else, or a table."""
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    else:
        out.print(table)


def say_skipped(files: list[str], left_out: list[str] | None = None) -> None:
    """Name the images that could not be decoded, and the files of formats that are not read."""
    if files:
        err.print(f"skipped {len(files)} corrupt image(s): {', '.join(files)}", markup=False, soft_wrap=True)
    if left_out:
        named = f"{', '.join(left_out[:20])}{', ...' if len(left_out) > 20 else ''}"
        err.print(
            f"left out {len(left_out)} file(s) that are not read as pictures: {named}", markup=False, soft_wrap=True
        )


Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars or warnings.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an older checkpoint once the new one is complete.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the layer at which the same command was interrupted.")
]
BlockShape = Annotated[
    Any, typer.Option("--block-shape", parser=parse_block_shape, metavar="ROWSxCOLS", help="Block, out x in features.")
]
BudgetOption = Annotated[
    Any,
    typer.Option(
        "--budget",
        parser=parse_budget,
        metavar="METRIC=RATIO",
        help="Share kept: flops=0.75, params=0.6, sparsity=0.5, latency=0.6@DEVICE or energy=0.6@DEVICE; or an amount: "
        "latency=8ms@DEVICE, energy=5mJ@DEVICE.",
    ),
]
Method = Annotated[str | None, typer.Option("--method", help="obs, taylor or magnitude.")]
Refit = Annotated[
    bool | None,
    typer.Option(
        "--refit/--no-refit", help="Solve for the surviving weights; by default with obs alone.", show_default=False
    ),
]
Recover = Annotated[
    bool | None,
    typer.Option(
        "--recover/--no-recover",
        help="Train the pruned model to behave like the dense one, without labels.",
        show_default=False,
    ),
]
Config = Annotated[Path | None, typer.Option("--config", help="Recipe in YAML or JSON; options override it.")]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Calibration images: a folder, file, pattern, URL or Hub data set.")
]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Folder for the pruned model.")]
EvaluateOn = Annotated[
    str | None, typer.Option("--evaluate-on", help="Labelled images to compare with the dense model on.")
]
Split = Annotated[str | None, typer.Option("--split", help="Split of the data set.")]
DatasetConfig = Annotated[str | None, typer.Option("--dataset-config", help="Configuration of a Hub data set.")]
ImageColumn = Annotated[str | None, typer.Option("--image-column", help="Column with the images.")]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", help="Column with the labels; json.label for a key inside of one.")
]
LabelsBy = Annotated[
    str | None,
    typer.Option(
        "--labels-by",
        help="name finds classes by what they are called; position takes the data set's class numbers for the "
        "model's; none reads no labels.",
    ),
]
Streaming = Annotated[
    bool | None, typer.Option("--streaming", help="Read images one by one, no further than needed.", show_default=False)
]
ShuffleBuffer = Annotated[
    int | None, typer.Option("--shuffle-buffer", min=1, help="Draw a stream's images from a buffer of so many.")
]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Calibration images.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Images in one pass.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the draw of calibration images.")]
Patterns = Annotated[list[str] | None, typer.Option("--ignore", help="Leave layers that match dense; may be repeated.")]


def job_from_options(
    recipe: Path | None,
    *,
    samples: int | None,
    batch_size: int | None,
    seed: int | None,
    dataset_config: str | None,
    image_column: str | None,
    label_column: str | None,
    labels_by: str | None,
    streaming: bool | None,
    shuffle_buffer: int | None,
    **settings: Any,
) -> Any:
    """A `PruneJob` from a recipe and the options that commands which prune share."""
    from .jobs import PruneJob

    calibration = {"samples": samples, "batch_size": batch_size, "seed": seed}
    calibration = {key: value for key, value in calibration.items() if value is not None}
    columns = {"image_column": image_column, "label_column": label_column, "streaming": streaming}
    columns["labels_by"] = labels_by
    settings["dataset_options"] = {**columns, "config": dataset_config, "shuffle_buffer": shuffle_buffer}
    settings["evaluation_options"] = columns
    return PruneJob.read(recipe, calibration=calibration, **settings)


def prune_from_options(
    recipe: Path | None, *, budget: Budget | None, overwrite: bool, resume: bool, **settings: Any
) -> dict[str, Any]:
    """Run a job from a recipe and the options that `blockprune prune` and `recipes/prune.py` share."""
    from .jobs import run_prune

    job = job_from_options(recipe, budget=None if budget is None else asdict(budget), **settings)
    return run_prune(job, overwrite=overwrite, resume=resume)


@app.command()
@one_line_errors
def prune(
    model: Annotated[
        str | None, typer.Argument(help="Dense model: a Hub name or a folder. A recipe may name it.")
    ] = None,
    config: Config = None,
    dataset: Dataset = None,
    output: Output = None,
    block_shape: BlockShape = None,
    budget: BudgetOption = None,
    method: Method = None,
    refit: Refit = None,
    recover: Recover = None,
    evaluate_on: EvaluateOn = None,
    split: Split = None,
    dataset_config: DatasetConfig = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    labels_by: LabelsBy = None,
    streaming: Streaming = None,
    shuffle_buffer: ShuffleBuffer = None,
    samples: Samples = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    ignore: Patterns = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model and save it block-sparse."""
    set_quiet(quiet)
    report = prune_from_options(
        config,
        model=model,
        dataset=dataset,
        output=output,
        block_shape=block_shape,
        budget=budget,
        method=method,
        refit=refit,
        recover=recover,
        evaluation=evaluate_on,
        split=split,
        dataset_config=dataset_config,
        image_column=image_column,
        label_column=label_column,
        labels_by=labels_by,
        streaming=streaming,
        shuffle_buffer=shuffle_buffer,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        ignore=ignore or None,
        overwrite=overwrite,
        resume=resume,
    )
    emit(report, summary_table(report), as_json=json_)
    if not quiet and report["calibration"] is not None:
        say_skipped(report["calibration"]["skipped"], report["calibration"]["left_out"])


@app.command()
@one_line_errors
def evaluate(
    model: Annotated[str, typer.Argument(help="Dense or pruned model: a Hub name or a folder.")],
    dataset: Annotated[str, typer.Option("--dataset", help="Labelled images, named as for prune.")],
    against: Annotated[str | None, typer.Option("--against", help="Model to compare with, image by image.")] = None,
    split: Split = None,
    dataset_config: DatasetConfig = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    labels_by: LabelsBy = None,
    streaming: Streaming = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images in one pass.")] = 32,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure accuracy, or what else measures the model's task, and the change against another model."""
    set_quiet(quiet)
    from .pruner import BlockPruner
    from .sources import DataSource

    columns = {"image_column": image_column, "label_column": label_column, "labels_by": labels_by}
    source = DataSource.of(dataset, config=dataset_config, split=split, streaming=bool(streaming), **columns)
    pruner = BlockPruner.from_pretrained(model)
    result = pruner.evaluate(source, against=against, batch_size=batch_size)
    values = result.to_dict()
    emit(values, fidelity_table(values) if "cosine" in values else evaluation_table(values), as_json=json_)
    if not quiet:
        say_skipped(result.skipped, result.left_out)


@app.command()
@one_line_errors
def inspect(
    directory: Annotated[Path, typer.Argument(help="Folder of a pruned model.")],
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a pruned model keeps, layer by layer, and check its format."""
    set_quiet(quiet)
    from .inspection import inspect_checkpoint

    values = inspect_checkpoint(directory)
    emit(values, inspect_table(values), as_json=json_)


@app.command()
@one_line_errors
def sweep(
    budgets: Annotated[
        Any,
        typer.Option(
            "--budgets",
            parser=parse_each(parse_flops_or_budget),
            metavar="RATIO,...",
            help="Shares of the FLOPs, or budgets as for prune, with commas between.",
        ),
    ],
    model: Annotated[str | None, typer.Argument(help="Dense model: a Hub name or a folder.")] = None,
    config: Config = None,
    dataset: Dataset = None,
    evaluate_on: Annotated[str | None, typer.Option("--evaluate", help="Labelled images to compare on.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for results and checkpoints.")] = None,
    block_shapes: Annotated[
        Any,
        typer.Option(
            "--block-shapes", parser=parse_each(parse_block_shape), metavar="ROWSxCOLS,...", help="Blocks to try."
        ),
    ] = "32x32",
    methods: Annotated[
        Any, typer.Option("--methods", parser=parse_each(str), metavar="METHOD,...", help="obs, taylor, magnitude.")
    ] = "obs",
    keep: Annotated[str, typer.Option("--keep", help="Checkpoints to keep: all, frontier or none.")] = "frontier",
    refit: Refit = None,
    recover: Recover = None,
    split: Split = None,
    dataset_config: DatasetConfig = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    labels_by: LabelsBy = None,
    streaming: Streaming = None,
    shuffle_buffer: ShuffleBuffer = None,
    samples: Samples = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    ignore: Patterns = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model at every point of a grid and compare them; the same command goes on where it stopped."""
    set_quiet(quiet)
    from .sweep import KEEP, Grid, run_sweep

    if keep not in KEEP:
        raise typer.BadParameter(f"expected one of {', '.join(KEEP)}, got {keep!r}", param_hint="--keep")
    job = job_from_options(
        config,
        model=model,
        dataset=dataset,
        output=output,
        evaluation=evaluate_on,
        refit=refit,
        recover=recover,
        split=split,
        dataset_config=dataset_config,
        image_column=image_column,
        label_column=label_column,
        labels_by=labels_by,
        streaming=streaming,
        shuffle_buffer=shuffle_buffer,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        ignore=ignore or None,
    )
    values = run_sweep(job, Grid(budgets, block_shapes, methods), keep=keep, on_point=None if quiet else say_point)  # type: ignore[arg-type]
    emit(values, sweep_table(values), as_json=json_)
    if failed := [point for point in values["points"] if point["status"] == "failed"]:
        for point in failed:
            err.print(f"error: {point['name']}: {point['error']}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1)


def say_point(point: dict[str, Any]) -> None:
    """One line on a sweep's point that is done."""
    result = f"top-1 {point['evaluation']['top1']:.2%}" if point["status"] == "done" else "failed"
    err.print(f"{point['name']}: {result}, {point['wall_seconds']:.0f} s", markup=False, highlight=False)


@app.command()
@one_line_errors
def report(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Pruned models: folders or Hub names; several are compared.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="Device profile to predict for: a name or a YAML file; may be repeated."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of a pass on --device.")] = 1,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about pruned models: what they keep, cost and get right."""
    set_quiet(quiet)
    from .html_report import write_report

    made = write_report(checkpoints, output, devices=device, batch_size=batch_size, overwrite=overwrite)
    values = {"output": str(output), "checkpoints": [checkpoint.values for checkpoint in made]}
    shown = {"output": str(output), "size bytes": output.expanduser().stat().st_size, "models": len(made)}
    emit(values, plain_table("report", shown), as_json=json_)


@app.command()
@one_line_errors
def benchmark(
    model: Annotated[str, typer.Argument(help="Pruned model: a folder or a Hub name.")],
    against: Annotated[
        str | None, typer.Option("--against", help="Dense model; by default the pruned one with zeros.")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Images; may be repeated.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="About how long for each batch size.")] = 10.0,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time a pruned and the dense model on this machine, by turns."""
    set_quiet(quiet)
    import torch

    from .pruner import BlockPruner

    if threads is not None:
        torch.set_num_threads(threads)
    pruner = BlockPruner.from_pretrained(model)
    values = pruner.benchmark(against=against, batch_sizes=tuple(batch_size or [1]), seconds=seconds)
    emit(values, latency_table(values), as_json=json_)


@app.command()
@one_line_errors
def export(
    directory: Annotated[str, typer.Argument(help="Pruned model: a folder or a Hub name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder (--dense) or file to write.")],
    dense: Annotated[bool, typer.Option("--dense", help="A stock dense folder; loads without this package.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="An ONNX file of the dense form, for any batch size.")] = False,
    torch_export: Annotated[
        bool, typer.Option("--torch-export", help="A torch.export program; block-sparse, so it needs this package.")
    ] = False,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a pruned model in another form, and check that it answers alike."""
    set_quiet(quiet)
    from .export import FORMATS, export_checkpoint

    chosen = [form for form, wanted in zip(FORMATS, (dense, onnx, torch_export), strict=True) if wanted]
    if len(chosen) != 1:
        raise typer.BadParameter("give one of --dense, --onnx and --torch-export")
    values = export_checkpoint(directory, output, chosen[0], overwrite=overwrite)
    emit(values, plain_table("exported", values), as_json=json_)


@app.command()
@one_line_errors
def push(
    directory: Annotated[Path, typer.Argument(help="Folder of a pruned model.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, as OWNER/NAME; made where there is none.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Who sees a new repository.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch; made where there is none.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str, typer.Option("--message", help="Title of the commit.")] = "Upload block-sparse model",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a pruned model and upload it to the Hub."""
    set_quiet(quiet)
    from .publish import upload_checkpoint

    options = {"private": private, "revision": revision, "create_pr": create_pr, "commit_message": message}
    commit = upload_checkpoint(directory, repo_id, **options)
    values = {"repo_id": repo_id, "commit": commit.oid, "url": commit.pr_url or commit.commit_url}
    emit(values, plain_table("uploaded", values), as_json=json_)


@app.command()
@one_line_errors
def simulate(
    directory: Annotated[Path, typer.Argument(help="Folder of a pruned model.")],
    device: Annotated[str, typer.Option("--device", help="Device profile: its name or a YAML file.")] = "systolic-32",
    dataflow: Annotated[str | None, typer.Option("--dataflow", help="Of a systolic array: ws, os or is.")] = None,
    overlap: Annotated[
        bool | None, typer.Option("--overlap/--no-overlap", help="Whether an array loads while it works.")
    ] = None,
    arrays: Annotated[int | None, typer.Option("--arrays", min=1, help="Arrays side by side.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images.")] = 1,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Work out what a pruned and a dense model take on a device: cycles, utilisation, latency and energy."""
    set_quiet(quiet)
    from .simulation import simulate_checkpoint

    options = {"dataflow": dataflow, "overlap": overlap, "arrays": arrays, "batch": batch_size}
    values = simulate_checkpoint(directory, device, **options)
    emit(values, simulation_table(values), as_json=json_)


@app.command()
@one_line_errors
def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="YAML file for the profile.")],
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="About how long to measure.")] = 45.0,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine for a minute and write its device profile, for budgets and simulate."""
    set_quiet(quiet)
    from .hardware.calibrate import calibrate, rank_correlation
    from .hardware.profiles import save_profile

    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu or cuda, got {device!r}", param_hint="--device")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: exists; name another file, or allow --overwrite")
    profile, measured = calibrate(device, seconds=seconds, name=output.stem)
    values = save_profile(profile, output)
    values |= {"measurements": len(measured), "rank_correlation": rank_correlation(profile, measured)}
    emit(values, plain_table(f"{output}", values), as_json=json_)


@app.command()
@one_line_errors
def env(json_: Json = False, quiet: Quiet = False) -> None:
    """Show the machine, the versions, and what multiplies with block-sparse weights here."""
    set_quiet(quiet)
    from .environment import backends, environment

    values = {**environment(), "backends": backends()}
    table = Table(show_header=False)
    for name, value in values.items():
        for key, part in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(f"{name} {key}".strip(), "-" if part is None else str(part))
    emit(values, table, as_json=json_)


@app.command()
@one_line_errors
def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the models here.")] = None,
    budget: BudgetOption = None,
    overwrite: Overwrite = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a small vision transformer on scikit-learn's digits, prune it, load it back. No network, about a minute."""
    set_quiet(quiet)
    from .demo import demo_table, run_demo

    result = run_demo(output, budget=budget, overwrite=overwrite)
    emit(result, demo_table(result), as_json=json_)


if __name__ == "__main__":
    app()
