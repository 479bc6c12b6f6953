"""A pruning report as tables for the terminal."""

from typing import Any

from rich.table import Table

from .checkpoint import stream_reordered
from .config import shape_text
from .console import folding_table
from .scores import SCORES, change_text, main_score, score_text


def summary_table(report: dict[str, Any]) -> Table:
    """What `prune` did, in short."""
    title = f"{report['base_model']} -> {report['output']}" if "output" in report else report["base_model"]
    table = folding_table("", "", title=title)
    table.add_row("method", f"{report['config']['method']}, blocks {shape_text(report['config']['block_shape'])}")
    if report["calibration"] is not None:
        c = report["calibration"]
        of = "a stream" if c["found_images"] is None else f"{c['found_images']} found"
        table.add_row("calibration images", f"{c['num_images']} of {of} in {c['dataset']}")
    table.add_row("FLOPs kept, whole model", f"{report['flops_ratio']:.2%}")
    table.add_row("FLOPs kept, pruned layers", f"{report['linear_flops_ratio']:.2%}")
    for budget in report.get("budgets", []):
        if budget["device"] is not None:
            what = f"predicted {budget['metric']} on {budget['device']}, batch {budget['batch']}"
            values = f"{budget['reached']:.4g} of {budget['dense']:.4g} {budget['unit']}"
            table.add_row(what, f"{values} ({budget['reached'] / budget['dense']:.1%})")
    cut = sum(layer["cut_units"] for layer in report["layers"])
    if cut:
        table.add_row("hidden units cut out", str(cut))
    if "size_bytes" in report:
        table.add_row("weights on disk", bytes_text(report))
    if stream_reordered(report):
        table.add_row("features of hidden states", "in another order (permutation.residual_order); predictions stay")
    recovery = report["recovery"]
    if recovery is not None and recovery["evaluation_before"] is not None:
        before = recovery["evaluation_before"]
        key = main_score(before)
        table.add_row(f"{SCORES[key]} before recovery", score_text(key, before[key]))
    if report.get("finetuning") is not None:
        f = report["finetuning"]
        epochs = f["settings"]["epochs"]
        table.add_row(
            "trained", f"{epochs} epochs on {f['num_images']} images of {f['dataset']}, kept {f['kept_epoch']}"
        )
    if report["evaluation"] is not None:
        e = report["evaluation"]
        key = main_score(e)
        dense = f", dense {score_text(key, e[f'baseline_{key}'])}" if f"baseline_{key}" in e else ""
        table.add_row(SCORES[key], f"{score_text(key, e[key])} of {e['num_images']} images{dense}")
    if report.get("fidelity") is not None:
        f = report["fidelity"]
        text = f"cosine {f['cosine']:.4f}, squared error {f['relative_squared_error']:.4f} of the variance"
        table.add_row("embeddings against the dense model", f"{text}, {f['num_images']} images")
    if report.get("latency") is not None:
        latency = report["latency"]
        rows = ", ".join(f"{row['speedup']:.2f}x at {row['batch']} images" for row in latency["rows"])
        table.add_row(f"speed-up, measured on {latency['device']}", rows)
    table.add_row("seconds", ", ".join(f"{stage} {s:.1f}" for stage, s in report["seconds"].items()))
    return table


def layer_table(report: dict[str, Any]) -> Table:
    """Layer by layer: what is kept, what was predicted and measured, and the time it took."""
    footers = {
        "layer": "all",
        "removed blocks": f"{1 - report['density']:.2%}",
        "predicted loss": _number(_total(report, "predicted_loss")),
        "seconds": _number(_total(report, "seconds")),
    }
    columns = ("layer", "shape", "removed blocks", "predicted loss", "error after refit", "seconds")
    table = folding_table(*columns, footers=footers)
    for layer in report["layers"]:
        gone = layer["blocks"] - layer["kept_blocks"]
        table.add_row(
            layer["name"],
            shape_text(layer["shape"]),
            f"{gone}/{layer['blocks']} ({gone / layer['blocks']:.0%})",
            *(_number(layer[key]) for key in ("predicted_loss", "error_after_refit", "seconds")),
        )
    return table


def _total(report: dict[str, Any], key: str) -> float:
    return sum(layer[key] or 0.0 for layer in report["layers"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def bytes_text(values: dict[str, Any]) -> str:
    """Size of the weights beside that of the dense model's."""
    return f"{values['size_bytes']:,} (dense {values['dense_size_bytes']:,})"


def simulation_table(values: dict[str, Any]) -> Table:
    """What a pruned and a dense model take on a device."""
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


def plain_table(title: str, values: dict[str, Any]) -> Table:
    """Names and values."""
    table = folding_table("", "", title=title)
    for key, value in values.items():
        table.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def environment_table(values: dict[str, Any]) -> Table:
    """The machine, the versions and the backends."""
    table = folding_table("", "")
    for name, value in values.items():
        for key, part in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(f"{name} {key}".strip(), "-" if part is None else str(part))
    return table


def latency_table(values: dict[str, Any]) -> Table:
    """Measured latencies, a row for each batch size."""
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


def evaluation_table(values: dict[str, Any]) -> Table:
    """Accuracy, with the comparison where there was one."""
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


def fidelity_table(values: dict[str, Any]) -> Table:
    """How close an encoder's embeddings are to another model's."""
    table = folding_table("", "")
    table.add_row("images", str(values["num_images"]))
    table.add_row("cosine similarity", f"{values['cosine']:.4f} (least {values['least_cosine']:.4f})")
    table.add_row("squared error over variance", f"{values['relative_squared_error']:.4f}")
    return table


def inspect_table(values: dict[str, Any]) -> Table:
    """One row a layer, totals in the footer."""
    block = shape_text(values["layers"][0]["block_shape"]) if values["layers"] else "no"
    order = {True: "another order than the dense model's", False: "the dense model's order", None: "an unknown order"}
    table = folding_table(
        *("layer", "shape", "kept blocks", "density", "bytes", "CPU"),
        title=f"{block} blocks, {values['flops_ratio']:.2%} of the model's FLOPs",
        caption=f"weights on disk: {bytes_text(values)}\n"
        f"features of hidden states: {order[values['stream_reordered']]}",
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


def sweep_table(values: dict[str, Any]) -> Table:
    """A sweep's points, cheapest first; those that no other beats are marked."""
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
