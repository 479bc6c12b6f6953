"""Pages about pruned models: one HTML file that needs nothing else, and runs no script.

All text of a checkpoint is escaped by the templates, and a policy in the page forbids everything that is not in it.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypedDict

from ..budget import budget_text
from ..checkpoint.folder import CONFIG_FILE, check_output_file, read_json, write_text
from ..errors import CheckpointError
from ..evaluate.frontier import frontier
from ..evaluate.intervals import wilson_interval
from ..stored_values import flat
from ..types import JsonDict
from ..version import __version__
from .description import CheckpointReport, ComparedAccuracy, describe
from .drawings import Bar, BarChart, Mark, Plot, bar_chart, mask_picture, scatter
from .schedules import schedules_plot

TEMPLATES = Path(__file__).with_name("templates")


def write_report(
    checkpoints: str | Path | Sequence[str | Path],
    output: str | Path = "report.html",
    *,
    devices: Sequence[str | Path] | None = None,
    batch_size: int = 1,
    overwrite: bool = False,
) -> list[CheckpointReport]:
    """Write a page about one or more saved checkpoints; whole or not at all.

    Args:
        checkpoints: folders that `BlockPruner.save_pretrained` wrote, or names on the Hub.
        output: HTML file.
        devices: profiles to predict latency and energy for, by name or file; by default a CPU, a GPU and a systolic
            array.
        batch_size: images of a pass on `devices`.
        overwrite: replace an older file.

    Returns:
        What the page is about.

    Raises:
        CheckpointError: no block-sparse checkpoint, damaged files, or the page cannot be written.
        BlockSparseFormatError: a checkpoint's config and tensors disagree.
        ConfigError: no such profile.

    Example:
        ```python
        pruner.save_pretrained("pruned")
        write_report("pruned", "pruned.html")
        ```
    """
    check_page(output, overwrite=overwrite)
    several = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
    if not several:
        raise CheckpointError("no checkpoint was named; name a folder, or a model on the Hub")
    for source in several:
        if (folder := Path(source).expanduser()).exists():
            read_json(folder / CONFIG_FILE)
    reports = [describe(source, devices, batch_size=batch_size) for source in several]
    write_text(Path(output).expanduser(), report_page(reports))
    return reports


def check_page(output: str | Path, *, overwrite: bool) -> None:
    """Refuse a page's file name before any long work is begun.

    Raises:
        CheckpointError: it exists and `overwrite` is off, or its folder is missing or cannot be written.
    """
    check_output_file(output, overwrite=overwrite)
    if not Path(output).expanduser().parent.is_dir():
        raise CheckpointError(f"{output}: its folder does not exist; make it, or name another file")


def report_page(reports: Sequence[CheckpointReport]) -> str:
    """The page about checkpoints, as text."""
    models = [_model(report) for report in reports]
    return render("report_template.html.j2", models=models, plot=_comparison(reports))


def render(template: str, **values: object) -> str:
    """Fill one of the templates; texts are escaped, and a value that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "megabytes": megabytes, "sig": significant}
    return environment.get_template(template).render(version=__version__, **values)


def percent(value: float, digits: int = 1) -> str:
    """A share in per cent."""
    return f"{100 * value:.{digits}f} %"


def points(value: float) -> str:
    """A change of a share, signed, without its unit."""
    return f"{100 * value:+.1f}"


def megabytes(value: float) -> str:
    """Bytes in MB; small files in kB."""
    return f"{value / 1e6:,.2f} MB" if value >= 1e5 else f"{value / 1e3:,.1f} kB"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits."""
    return f"{value:.{digits}g}"


class ModelView(TypedDict):
    """What the template says of one checkpoint.

    Attributes:
        values: those of its report.
        layers: its layers' values, with `group`, `role` and the `picture` of the mask, see `split_name` and
            `mask_picture`.
        groups: (repeated layer, its layers).
        kept: shares of blocks.
        losses: predicted ones, None where none is known.
        tokens: schedules of tokens that were tried, None where none were.
    """

    values: JsonDict
    layers: list[JsonDict]
    groups: list[tuple[str, list[JsonDict]]]
    kept: BarChart
    losses: BarChart | None
    tokens: Plot | None


class Comparison(Plot):
    """Checkpoints in one plot, and whether all were measured on the same images."""

    same_images: bool


def _model(report: CheckpointReport) -> ModelView:
    """What the template says of one checkpoint."""
    values = report.values
    layers: list[JsonDict] = [dict(layer) for layer in values["layers"]]
    longest = max((max(layer["shape"]) for layer in layers), default=1)
    for layer in layers:
        layer["group"], layer["role"] = split_name(layer["module"])
        layer["picture"] = mask_picture(report.masks[layer["module"]], tuple(layer["block_shape"]), longest)
    groups = [(name, list(members)) for name, members in groupby(layers, key=lambda layer: layer["group"])]
    names = [".".join(re.findall(r"\d+", layer["group"])) or "other" for layer in layers]
    bars = [
        Bar(layer["density"], name, layer["role"], f"{layer['module']}: {percent(layer['density'])}")
        for layer, name in zip(layers, names, strict=True)
    ]
    losses = [
        Bar(loss, name, layer["role"], f"{layer['module']}: {significant(loss)}")
        for layer, name in zip(layers, names, strict=True)
        if (loss := layer["predicted_loss"]) is not None
    ]
    return {
        "values": values,
        "layers": layers,
        "groups": groups,
        "kept": bar_chart(bars, top=1.0),
        "losses": bar_chart(losses) if losses else None,
        "tokens": schedules_plot(values["tokens"]) if values["tokens"] else None,
    }


def split_name(module: str) -> tuple[str, str]:
    """A module's repeated layer, and what it is in there.

    Example:
        >>> split_name("vit.layers.3.mlp.fc1")
        ('vit.layers.3', 'mlp.fc1')
    """
    match = re.fullmatch(r"(.*\.\d+)\.(.+)", module)
    return (match[1], match[2]) if match else ("", module)


def _comparison(reports: Sequence[CheckpointReport]) -> Comparison | None:
    """Accuracy over FLOPs kept of those checkpoints for which it was measured; None where there are not two."""
    measured = [(i, r) for i, r in enumerate(reports, 1) if r.values["evaluation"] is not None]
    if len(measured) < 2:
        return None
    best = frontier([(r.values["flops_ratio"], r.values["evaluation"]["top1"]) for _, r in measured])
    marks = [
        Mark(
            label=str(i),
            title=report.name,
            cost=report.values["flops_ratio"],
            gain=report.values["evaluation"]["top1"],
            interval=report.values["evaluation"]["top1_interval"],
            best=on_frontier,
        )
        for (i, report), on_frontier in zip(measured, best, strict=True)
    ]
    sets = {(r.values["evaluation"]["dataset"], r.values["evaluation"]["num_images"]) for _, r in measured}
    return {
        **scatter([*marks, *dense_marks(r.values["evaluation"] for _, r in measured)]),
        "same_images": len(sets) == 1,
    }


def dense_marks(evaluations: Iterable[ComparedAccuracy]) -> list[Mark]:
    """The dense model, where it was measured with the same result beside all others."""
    found = {(e.get("baseline_top1"), e["num_images"]): e for e in evaluations}
    (top1, _), evaluation = next(iter(found.items()))
    if len(found) != 1 or top1 is None or "baseline_interval" not in evaluation:
        return []
    return [Mark("dense", "the dense model", 1.0, top1, evaluation["baseline_interval"], dense=True)]


def sweep_page(sweep: JsonDict) -> str:
    """The page about a sweep, as text.

    Args:
        sweep: what its `sweep.json` holds, or will hold.
    """
    numbered = [(number, _point(point)) for number, point in enumerate(sweep["points"], 1)]
    done = [(number, point) for number, point in numbered if point["status"] == "done"]
    marks = [
        Mark(
            label=str(number),
            title=point["name"],
            cost=point["flops_ratio"],
            gain=point["evaluation"]["top1"],
            interval=point["top1_interval"],
            best=point["frontier"],
        )
        for number, point in done
    ]
    dense = sweep["dense"]
    interval = wilson_interval(dense["top1"], dense["num_images"])
    marks.append(Mark("dense", "the dense model", 1.0, dense["top1"], interval, dense=True))
    settings = {key: value for key, value in sweep["settings"].items() if key != "points"}
    return render(
        "sweep_template.html.j2",
        sweep=sweep,
        done=done,
        failed=[(number, point) for number, point in numbered if point["status"] != "done"],
        total=len(sweep["settings"]["points"]),
        plot=scatter(marks) if done else None,
        settings=flat(settings),
        environment=flat(sweep["environment"]),
    )


def _point(point: JsonDict) -> JsonDict:
    """A sweep's point with what the template adds to it."""
    if point["status"] != "done":
        return point
    evaluation, budget = point["evaluation"], point["budget"]
    return {
        **point,
        "top1_interval": wilson_interval(evaluation["top1"], evaluation["num_images"]),
        "budget_text": budget_text(budget),
    }
