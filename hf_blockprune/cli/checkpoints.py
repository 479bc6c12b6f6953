"""Commands on pruned models as they are stored: inspect, simulate, report, tokens, export and push."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import Overwrite, Profile, Revision, Shown, complete_profile, parse_counts
from .terminal import command

Pruned = Annotated[str, typer.Argument(help="Pruned model: a folder or a Hub name.")]


@command
def inspect(
    shown: Shown,
    source: Pruned,
    revision: Revision = None,
) -> None:
    """Show what a pruned model keeps, layer by layer, and check its format."""
    shown.begin()
    from ..checkpoint.inspection import inspect_checkpoint
    from ..report.tables import inspect_table

    shown.result(inspect_checkpoint(source, revision=revision), inspect_table)


@command
def simulate(
    shown: Shown,
    source: Pruned,
    device: Profile = "systolic-32",
    dataflow: Annotated[
        Literal["ws", "os", "is"] | None,
        typer.Option("--dataflow", help="Of a systolic array.", show_default="the profile's"),
    ] = None,
    overlap: Annotated[
        bool | None,
        typer.Option(
            "--overlap/--no-overlap", help="Whether an array loads while it works.", show_default="the profile's"
        ),
    ] = None,
    arrays: Annotated[
        int | None, typer.Option("--arrays", min=1, help="Arrays side by side.", show_default="the profile's")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images.")] = 1,
    revision: Revision = None,
) -> None:
    """Work out what a pruned and a dense model take on a device: cycles, utilisation, latency and energy."""
    shown.begin()
    from ..checkpoint.simulation import simulate_checkpoint
    from ..report.tables import simulation_table

    options = {"dataflow": dataflow, "overlap": overlap, "arrays": arrays, "batch": batch_size}
    options["revision"] = revision
    shown.result(simulate_checkpoint(source, device, **options), simulation_table)


@command
def report(
    shown: Shown,
    checkpoints: Annotated[
        list[str], typer.Argument(help="Pruned models: folders or Hub names; several are compared.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            help="Device profile to predict for: a name or a YAML file; may be repeated.",
            autocompletion=complete_profile,
            show_default="those of the saved predictions",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of a pass on --device.")] = 1,
    overwrite: Overwrite = False,
) -> None:
    """Write one HTML page about pruned models: what they keep, cost and get right."""
    shown.begin()
    from ..pages.page import write_report
    from ..report.tables import plain_table

    made = write_report(checkpoints, output, devices=device, batch_size=batch_size, overwrite=overwrite)
    values = {"output": str(output), "checkpoints": [checkpoint.values for checkpoint in made]}
    size = output.expanduser().stat().st_size
    shown.result(
        values,
        lambda values: plain_table("report", {"output": values["output"], "size bytes": size, "models": len(made)}),
    )


@command
def tokens(
    shown: Shown,
    model: Annotated[
        str, typer.Argument(help="Model whose tokens merge, or any in which they can: a folder or a Hub name.")
    ],
    image: Annotated[str, typer.Argument(help="Picture file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write.")] = Path("tokens.png"),
    leave: Annotated[
        Any,  # numbers
        typer.Option(
            "--leave",
            parser=parse_counts,
            metavar="N,...",
            help="Patches that leave each layer.",
            show_default="as the model was saved",
        ),
    ] = None,
    per_layer: Annotated[
        int | None,
        typer.Option(
            "--per-layer", min=1, help="Patches that leave every layer.", show_default="as the model was saved"
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            "--layer",
            min=1,
            help="Draw what has merged after so many layers.",
            show_default="the last in which patches leave",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw which patches of a picture merge in a model, and count its tokens layer by layer."""
    shown.begin()
    if leave is not None and per_layer is not None:
        raise typer.BadParameter("--leave and --per-layer both say how many patches leave; give one of them")
    from ..pages.tokens import draw_tokens
    from ..report.tables import tokens_table

    schedule = per_layer if leave is None else leave
    drawn = draw_tokens(model, image, output, leave=schedule, layer=layer, overwrite=overwrite)
    shown.result(asdict(drawn), tokens_table)


@command
def export(
    shown: Shown,
    directory: Pruned,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder (--dense, --int8) or file to write.")],
    dense: Annotated[bool, typer.Option("--dense", help="A stock dense folder; loads without this package.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="An ONNX file of the dense form, for any batch size.")] = False,
    torch_export: Annotated[
        bool, typer.Option("--torch-export", help="A torch.export program; block-sparse, so it needs this package.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="A pruned model with weights in int8; a quarter of the size, and faster.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a pruned model in another form, and check that it answers alike."""
    shown.begin()
    from ..export.forms import FORMATS, export_checkpoint
    from ..pruner.int8 import export_int8
    from ..report.tables import plain_table

    chosen = [form for form, wanted in zip(FORMATS, (dense, onnx, torch_export), strict=True) if wanted]
    if len(chosen) + int8 != 1:
        raise typer.BadParameter("give one of --dense, --onnx, --torch-export and --int8")
    if int8:
        values = export_int8(directory, output, overwrite=overwrite)
    else:
        values = export_checkpoint(directory, output, chosen[0], overwrite=overwrite)
    shown.result(values, lambda values: plain_table("exported", values))


@command
def push(
    shown: Shown,
    directory: Annotated[Path, typer.Argument(help="Folder of a pruned model.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, as OWNER/NAME; made where there is none.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who sees a new repository.", show_default="what the owner has set"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch; made where there is none.", show_default="main")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str, typer.Option("--message", help="Title of the commit.")] = "Upload block-sparse model",
) -> None:
    """Check a pruned model and upload it to the Hub."""
    shown.begin()
    from ..checkpoint.publish import upload_checkpoint
    from ..report.tables import plain_table

    options = {"private": private, "revision": revision, "create_pr": create_pr, "commit_message": message}
    commit = upload_checkpoint(directory, repo_id, **options)
    values = {"repo_id": repo_id, "commit": commit.oid, "url": commit.pr_url or commit.commit_url}
    shown.result(values, lambda values: plain_table("uploaded", values))
