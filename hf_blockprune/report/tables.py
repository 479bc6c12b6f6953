"""A pruning report as tables for the terminal."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from ..config import shape_text
from ..display.console import folding_table
from ..evaluate.scores import SCORES, change_text, main_score, score_text
from ..types import JsonDict
from .measured import Measurements
from .values import Report

PATCHES_LEFT = "patches left after the last layer"


def summary_table(values: JsonDict) -> Table:
    """What `prune` did, in short.

    Args:
        values: what `BlockPruner.report()` gives, with `output` where the model was saved.
    """
    report = Report.from_dict(values)
    title = f"{report.base_model} -> {values['output']}" if "output" in values else report.base_model
    table = folding_table("", "", title=title)
    table.add_row("method", f"{report.config['method']}, blocks {shape_text(report.config['block_shape'])}")
    if report.calibration is not None:
        images = report.calibration
        of = "a stream" if images.found_images is None else f"{images.found_images} found"
        table.add_row("calibration images", f"{images.num_images} of {of} in {images.dataset}")
    table.add_row("FLOPs kept, whole model", _percent(report.masks.flops_ratio))
    table.add_row("FLOPs kept, pruned layers", _percent(report.masks.linear_flops_ratio))
    for budget in report.budgets:
        if budget.device is not None:
            what = f"predicted {budget.metric} on {budget.device}, batch {budget.batch}"
            reached = f"{budget.reached:.4g} of {budget.dense:.4g} {budget.unit}"
            table.add_row(what, f"{reached} ({budget.reached / budget.dense:.1%})")
    cut = sum(layer.cut_units for layer in report.masks.layers)
    if cut:
        table.add_row("hidden units cut out", str(cut))
    if report.masks.cut_head_features:
        table.add_row("features of heads cut out", str(report.masks.cut_head_features))
    if report.tokens is not None:
        table.add_row(PATCHES_LEFT, patches_text(report.tokens.leave, report.tokens.patches))
    if report.dtype is not None:
        table.add_row("weights of pruned layers", report.dtype)
    if report.size_bytes is not None:
        table.add_row("weights on disk", bytes_text(values))
    if report.residual_order:
        table.add_row("features of hidden states", "in another order (permutation.residual_order); predictions stay")
    _add_training(table, report)
    _add_measurements(table, report.measured)
    table.add_row("seconds", ", ".join(f"{stage} {s:.1f}" for stage, s in report.seconds.items()))
    return table


def patches_text(leave: Sequence[int], patches: int) -> str:
    """How many of an image's patches are left after the last layer.

    Args:
        leave: how many leave each layer.
        patches: of an image.
    """
    return f"{patches - sum(leave)} of {patches}"


def _add_training(table: Table, report: Report) -> None:
    """What was learned since pruning."""
    if report.recovery is not None and report.recovery.evaluation_before is not None:
        before = report.recovery.evaluation_before.to_dict()
        key = main_score(before)
        table.add_row(f"{SCORES[key]} before recovery", score_text(key, before[key]))
    if report.finetuning is not None:
        run = report.finetuning
        epochs = run.settings["epochs"]
        table.add_row("trained", f"{epochs} epochs on {run.num_images} images of {run.dataset}, kept {run.kept_epoch}")


def _add_measurements(table: Table, measured: Measurements) -> None:
    """The newest of each kind."""
    if measured.evaluation is not None:
        scores = measured.evaluation.to_dict()
        key = main_score(scores)
        dense = f", dense {score_text(key, scores[f'baseline_{key}'])}" if f"baseline_{key}" in scores else ""
        table.add_row(SCORES[key], f"{score_text(key, scores[key])} of {scores['num_images']} images{dense}")
    if measured.fidelity is not None:
        found = measured.fidelity
        text = f"cosine {found.cosine:.4f}, squared error {found.relative_squared_error:.4f} of the variance"
        table.add_row("embeddings against the dense model", f"{text}, {found.num_images} images")
    if measured.latency is not None:
        rows = ", ".join(f"{row.speedup:.2f}x at {row.batch} images" for row in measured.latency.rows)
        table.add_row(f"speed-up, measured on {measured.latency.device}", rows)


def layer_table(values: JsonDict) -> Table:
    """Layer by layer: what is kept, what was predicted and measured, and the time it took.

    Args:
        values: what `BlockPruner.report()` gives.
    """
    masks = Report.from_dict(values).masks
    footers = {
        "layer": "all",
        "removed blocks": _percent(None if masks.density is None else 1 - masks.density),
        "predicted loss": _number(sum(layer.predicted_loss or 0.0 for layer in masks.layers)),
        "seconds": _number(sum(layer.seconds or 0.0 for layer in masks.layers)),
    }
    columns = ("layer", "shape", "removed blocks", "predicted loss", "error after refit", "seconds")
    table = folding_table(*columns, footers=footers)
    for layer in masks.layers:
        gone = layer.blocks - layer.kept_blocks
        table.add_row(
            layer.name,
            shape_text(layer.shape),
            f"{gone}/{layer.blocks} ({gone / layer.blocks:.0%})",
            *map(_number, (layer.predicted_loss, layer.error_after_refit, layer.seconds)),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def bytes_text(values: JsonDict) -> str:
    """Size of the weights beside that of the dense model's, of values with `size_bytes` and `dense_size_bytes`."""
    return f"{values['size_bytes']:,} (dense {values['dense_size_bytes']:,})"


def simulation_table(values: JsonDict) -> Table:
    """What a pruned and a dense model take on a device.

    Args:
        values: what `simulate_checkpoint` gives.
    """
    title = f"Predicted: {values['device']}, {values['batch']} images, {values['dtype']}"
    table = folding_table("", "pruned", "dense", "ratio", title=title)
    rows = [
        ("latency", "latency_ms", "{:.3f} ms"),
        ("energy", "energy_mj", "{:.2f} mJ"),
        ("FLOPs", "flops", "{:.3g}"),
        ("main memory", "size_bytes", "{:.3g} B"),
    ]
    if "cycles" in values:
        rows.insert(0, ("cycles", "cycles", "{:,}"))
    for name, key, form in rows:
        pruned, dense = values[key], values[f"dense_{key}"]
        table.add_row(name, form.format(pruned), form.format(dense), f"{dense / pruned:.2f}" if pruned else "-")
    table.add_row("latency of pruned layers", "", "", f"{values['linear_speedup']:.2f}")
    if "utilisation" in values:
        table.add_row("utilisation of elements", f"{values['utilisation']:.1%}", "", "")
    return table


def tokens_table(values: JsonDict) -> Table:
    """How many tokens a model has after each layer, and what a picture of them shows.

    Args:
        values: of a `pages.tokens.DrawnTokens`.
    """
    drawn = f"{values['groups']} groups of {values['patches']} patches, {values['largest']} in the largest"
    table = folding_table(
        *("layer", "tokens"),
        title=f"{values['tokens_before']} tokens of an image of {shape_text(values['image_size'])}",
        caption=f"drawn after layer {values['layer']}: {drawn}\n{values['output']}",
    )
    for number, tokens in enumerate(values["tokens_after"], 1):
        table.add_row(str(number), str(tokens))
    return table


def plain_table(title: str, values: JsonDict) -> Table:
    """Names and values."""
    table = folding_table("", "", title=title)
    for key, value in values.items():
        table.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def environment_table(values: JsonDict) -> Table:
    """The machine, the versions and the backends.

    Args:
        values: those of `runs.environment.environment`, with `backends`.
    """
    table = folding_table("", "")
    for name, value in values.items():
        for key, part in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(f"{name} {key}".strip(), "-" if part is None else str(part))
    return table


def latency_table(values: JsonDict) -> Table:
    """Measured latencies, a row for each batch size.

    Args:
        values: what `BlockPruner.benchmark` gives.
    """
    title = f"{values['device']}, {values['environment']['threads']} threads, {values['dtype']}"
    used = ", ".join(f"{count} {name}" for name, count in sorted(values["backends"].items()))
    columns = ("images", "dense ms", "pruned ms", "pruned img/s", "speed-up", "quartiles")
    table = folding_table(*columns, title=title, caption=f"layers by backend: {used}")
    for row in values["rows"]:
        low, high = row["speedup_quartiles"]
        times = (f"{row[key]:.2f}" for key in ("dense_latency_ms", "latency_ms"))
        table.add_row(
            str(row["batch"]),
            *times,
            f"{row['throughput_img_s']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{low:.2f} to {high:.2f}",
        )
    return table


def evaluation_table(values: JsonDict) -> Table:
    """Accuracy, with the comparison where there was one.

    Args:
        values: what `to_dict` of an `Evaluation`, or of another task's, gives.
    """
    table = folding_table("", "")
    table.add_row("images", str(values["num_images"]))
    for key in SCORES:
        if key in values:
            table.add_row(SCORES[key], score_text(key, values[key]))
    if "delta" in values:
        key = main_score(values)
        table.add_row(f"baseline {SCORES[key]}", score_text(key, values[f"baseline_{key}"]))
        table.add_row("change", change_text(values))
    if "flipped_to_wrong" in values:
        table.add_row("flipped", f"{values['flipped_to_wrong']} to wrong, {values['flipped_to_right']} to right")
    return table


def fidelity_table(values: JsonDict) -> Table:
    """How close an encoder's embeddings are to another model's.

    Args:
        values: what `Fidelity.to_dict` gives.
    """
    table = folding_table("", "")
    table.add_row("images", str(values["num_images"]))
    table.add_row("cosine similarity", f"{values['cosine']:.4f} (least {values['least_cosine']:.4f})")
    table.add_row("squared error over variance", f"{values['relative_squared_error']:.4f}")
    return table


def _tokens_text(tokens: JsonDict | None) -> str:
    """A line on patches that merge, nothing where none do."""
    return "" if tokens is None else f"\n{PATCHES_LEFT}: {patches_text(**tokens)}"


def _heads_text(heads: list[JsonDict]) -> str:
    """A line on attentions that were cut, nothing where none was."""
    kept, dense = (sum(h[f"{of}heads"] * h[f"{of}head_size"] for h in heads) for of in ("", "dense_"))
    return f"\nfeatures of heads: {kept} of {dense} in the attentions that were cut ({len(heads)})" if heads else ""


def _dtype_text(dtype: str | None) -> str:
    """A line on weights that are no floating numbers, nothing where they are."""
    return "" if dtype is None else f"\nweights of these layers: {dtype}, a scale for each output"


def inspect_table(values: JsonDict) -> Table:
    """One row a layer, totals in the footer.

    Args:
        values: what `inspect_checkpoint` gives.
    """
    block = shape_text(values["layers"][0]["block_shape"]) if values["layers"] else "no"
    order = {True: "another order than the dense model's", False: "the dense model's order", None: "an unknown order"}
    table = folding_table(
        *("layer", "shape", "kept blocks", "density", "bytes", "CPU"),
        title=f"{block} blocks, {values['flops_ratio']:.2%} of the model's FLOPs",
        caption=f"weights on disk: {bytes_text(values)}\n"
        f"features of hidden states: {order[values['stream_reordered']]}{_heads_text(values['heads'])}"
        f"{_tokens_text(values['tokens'])}{_dtype_text(values['dtype'])}",
        footers={"layer": "all", "density": f"{values['density']:.2%}", "bytes": f"{values['size_bytes']:,}"},
    )
    for layer in values["layers"]:
        kept = f"{layer['kept_blocks']}/{layer['blocks']}"
        table.add_row(
            layer["module"],
            shape_text(layer["shape"]),
            kept,
            f"{layer['density']:.2%}",
            f"{layer['size_bytes']:,}",
            layer["cpu_backend"],
        )
    return table


def sweep_table(values: JsonDict) -> Table:
    """A sweep's points, cheapest first; those that no other beats are marked.

    Args:
        values: what `run_sweep` gives, `sweep.json`'s content.
    """
    dense = values["dense"]
    table = folding_table(
        *("", "point", "FLOPs kept", "top-1", "change, 95 % interval", "seconds"),
        title=f"{values['model']}, dense top-1 {dense['top1']:.1%} of {dense['num_images']} images",
        caption="* no other point is as cheap and as accurate",
    )
    done = [point for point in values["points"] if point["status"] == "done"]
    for point in sorted(done, key=lambda p: (p["flops_ratio"], -p["evaluation"]["top1"])):
        e = point["evaluation"]
        low, high = (f"{100 * bound:+.1f}" for bound in e["interval"])
        table.add_row(
            "*" if point["frontier"] else "",
            point["name"],
            f"{point['flops_ratio']:.1%}",
            f"{e['top1']:.1%}",
            f"{100 * e['delta']:+.1f} ({low} to {high})",
            f"{point['wall_seconds']:.0f}",
            style="bold" if point["frontier"] else None,
        )
    for point in values["points"]:
        if point["status"] != "done":
            table.add_row("!", point["name"], "failed", style="red")
    return table


class PruneReport(JsonDict):
    """A report as plain values, which JSON can write; `rich.print` shows it as tables."""

    def __rich__(self) -> Group:
        return Group(layer_table(self), summary_table(self))
