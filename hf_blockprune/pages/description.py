"""All that is known of a saved checkpoint: what its weights say, and what its own files say of how it was made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from ..checkpoint.fetching import checkpoint_folder
from ..checkpoint.folder import RECIPE_FILE, REPORT_FILE, read_json
from ..checkpoint.inspection import StoredModel, describe_checkpoint, open_checkpoint
from ..checkpoint.measurements import KINDS, files_fingerprint
from ..checkpoint.simulation import CARD_DEVICES, load_devices, predictions
from ..errors import ModelError
from ..evaluate.intervals import wilson_interval
from ..evaluate.scores import SCORES, score_text
from ..hub.blockprune_cost import Profile
from ..report.measured import Measurements
from ..stored_values import StoredValues, flat, short
from ..types import JsonDict
from .schedules import schedules

PREDICTED = (
    *("device", "kind", "batch", "dtype", "latency_ms", "dense_latency_ms", "speedup"),
    *("energy_mj", "dense_energy_mj", "energy_ratio"),
)


class Circumstances(TypedDict):
    """Of which images, with what and when something was measured; None where the report does not say."""

    dataset: str | None
    split: str | None
    against: str | None
    device: str | None
    dtype: str | None
    measured_at: str | None


class Accuracy(Circumstances):
    """Measured shares of images that were classified rightly, with the 95 % interval of the first."""

    num_images: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float | None


class ComparedAccuracy(Accuracy, total=False):
    """With the dense model's on the same images, where that was measured.

    Attributes:
        baseline_top1, baseline_interval: the dense model's.
        delta, interval: by how much the pruned one is better, a negative share where it is worse.
        flipped_to_wrong, flipped_to_right: images that only one of the two classifies rightly.
    """

    baseline_top1: float
    baseline_interval: tuple[float, float]
    delta: float | None
    interval: list[float] | None
    flipped_to_wrong: float | None
    flipped_to_right: float | None


class Closeness(Circumstances):
    """How close an encoder's embeddings are to the dense model's, see `Fidelity`."""

    num_images: int
    cosine: float
    least_cosine: float
    relative_squared_error: float


class LatencyAt(TypedDict):
    """Milliseconds of a pass and images a second at one batch size, and the quartiles of the speed-up."""

    batch: int
    dense_latency_ms: float
    latency_ms: float
    throughput_img_s: float
    speedup: float
    quartiles: list[float] | None


class Latencies(TypedDict):
    """Measured latencies, with where and when."""

    device: str | None
    dtype: str | None
    measured_at: str | None
    threads: float | None
    rows: list[LatencyAt]


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint for people to look at.

    Attributes:
        name: its folder's or repository's.
        values: JSON-ready; what is not known is None. `layers` hold what `inspect_checkpoint` says and, where the
            report file knows it, `predicted_loss` and `error_after_refit`. `evaluation`, `fidelity` and `latency` are
            the newest that were measured, `other_evaluations`, `other_fidelities` and `other_latencies` those of
            other data sets and machines, newest first; `predicted` comes from the cost model; `tokens` see `Schedules`.
        masks: bool [block_rows, block_cols] of each block-sparse layer by module name, cut rows and columns left out.
    """

    name: str
    values: JsonDict
    masks: dict[str, Tensor]


def describe(
    source: str | Path, devices: Sequence[str | Path] | None = None, *, batch_size: int = 1
) -> CheckpointReport:
    """Read a checkpoint, and predict what it takes on devices; no weight is loaded and no code of it runs.

    Args:
        source: a folder, or a name on the Hub.
        devices: profiles to predict for, by name or file; by default a CPU, a GPU and a systolic array.
        batch_size: images of a pass on `devices`.

    Raises:
        CheckpointError: no block-sparse checkpoint, or its files are damaged.
        BlockSparseFormatError: config and tensors disagree.
        ConfigError: no such profile.
    """
    wanted = CARD_DEVICES if devices is None else dict.fromkeys(devices, batch_size)
    profiles = load_devices(wanted)
    folder = checkpoint_folder(source)
    name = short(folder.resolve().name if Path(source).expanduser().exists() else str(source))
    stored = open_checkpoint(folder)
    values: JsonDict = {"name": name, **describe_checkpoint(stored), "notes": []}
    for layer in values["layers"]:
        del layer["cpu_backend"]  # of the machine that makes the report
    predicted, unknown = _predict(stored, profiles)
    values |= {"predicted": predicted, "not_predicted": unknown}
    file = folder / REPORT_FILE
    values["has_report"] = file.is_file()
    made = read_json(file) if values["has_report"] else {}
    if _is_stale(made, folder):
        made = {key: value for key, value in made.items() if key not in Measurements.key_names()}
        values["notes"].append(
            "What the report file says was measured is of other weights than the folder's, and is not shown"
        )
    values |= _made(StoredValues(made, REPORT_FILE), values)
    values["tokens"], note = schedules(stored.schedule, StoredValues(made, REPORT_FILE))
    values["notes"] += [] if note is None else [note]
    recipe = folder / RECIPE_FILE
    values["recipe"] = flat(read_json(recipe)) if recipe.is_file() else None
    return CheckpointReport(name, values, {layer.module: layer.mask for layer in stored.layers})


def _is_stale(made: JsonDict, folder: Path) -> bool:
    """Whether a report file holds measurements of other weights than the folder's.

    The page shows what it can of any report file, so that this one need not be whole, as `read_report` has it.
    """
    known = made.get("weights_sha256")
    if known is None or not any(made.get(key) for key in (*KINDS, "history")):
        return False
    return known != files_fingerprint(folder)


def _predict(stored: StoredModel, profiles: list[tuple[Profile, int]]) -> tuple[list[JsonDict], str | None]:
    """(what the model takes on each device, None), or (nothing, why the cost model cannot tell)."""
    try:
        return predictions(stored, profiles, PREDICTED), None
    except ModelError as error:
        return [], str(error)


def _made(report: StoredValues, values: JsonDict) -> JsonDict:
    """What the report file says; adds to the layers and the notes of `values`."""
    _add_layers(report, values)
    if words := _other_scores(report.part("evaluation")):
        values["notes"].append(words)
    config, calibration = report.part("config"), report.part("calibration")
    recovery, environment = report.part("recovery"), report.part("environment")
    history = report.part("history") or StoredValues({}, "")
    evaluations = [evaluation_values(part) for part in history.parts("evaluation")]
    values["notes"] += [words for part in history.parts("evaluation") if (words := _other_scores(part))]
    return {
        "base_model": report.text("base_model"),
        "model_class": report.text("model_class"),
        "method": config and config.text("method"),
        "calibration": calibration
        and {"dataset": calibration.text("dataset"), "num_images": calibration.number("num_images", 0)},
        "evaluation": evaluation_values(report.part("evaluation")),
        "other_evaluations": [each for each in evaluations if each is not None],
        "fidelity": None if (found := report.part("fidelity")) is None else _closeness(found),
        "other_fidelities": list(map(_closeness, history.parts("fidelity"))),
        "recovery": recovery
        and {
            "dataset": recovery.text("dataset"),
            "num_images": recovery.number("num_images", 0),
            "evaluation_before": evaluation_values(recovery.part("evaluation_before")),
        },
        "latency": None if (found := report.part("latency")) is None else _latencies(found),
        "other_latencies": list(map(_latencies, history.parts("latency"))),
        "seconds": flat(report.values["seconds"]) if report.part("seconds") else None,
        "environment": environment and flat(environment.values),
    }


def evaluation_values(stored: StoredValues | None) -> ComparedAccuracy | None:
    """Measured accuracies with their intervals, and the paired change where the dense model was measured too.

    None also for a task without accuracy, see `_other_scores`.
    """
    if stored is None or _other_scores(stored):
        return None
    images, top1 = stored.count("num_images"), stored.need("top1", 0, 1)
    values: ComparedAccuracy = {
        **_circumstances(stored),
        "num_images": images,
        "top1": top1,
        "top1_interval": wilson_interval(top1, images),
        "top5": stored.number("top5", 0, 1),
    }
    baseline = stored.number("baseline_top1", 0, 1)
    if baseline is not None:
        values["baseline_top1"], values["baseline_interval"] = baseline, wilson_interval(baseline, images)
        values["delta"], values["interval"] = stored.number("delta", -1, 1), stored.numbers("interval", 2)
        values["flipped_to_wrong"] = stored.number("flipped_to_wrong", 0)
        values["flipped_to_right"] = stored.number("flipped_to_right", 0)
    return values


def _circumstances(stored: StoredValues) -> Circumstances:
    return {
        "dataset": stored.text("dataset"),
        "split": stored.text("split"),
        "against": stored.text("against"),
        "device": stored.text("device"),
        "dtype": stored.text("dtype"),
        "measured_at": stored.text("measured_at"),
    }


def _closeness(stored: StoredValues) -> Closeness:
    cosine, least, error = map(stored.need, ("cosine", "least_cosine", "relative_squared_error"))
    return {
        **_circumstances(stored),
        "num_images": stored.count("num_images"),
        "cosine": cosine,
        "least_cosine": least,
        "relative_squared_error": error,
    }


def _other_scores(stored: StoredValues | None) -> str | None:
    """What was measured of a model that does not choose one class, in words."""
    if stored is None or "top1" in stored.values:
        return None
    values = {key: stored.number(key) for key in SCORES}
    found = [f"{SCORES[key]} {score_text(key, value)}" for key, value in values.items() if value is not None]
    images, dataset = stored.number("num_images", 0), stored.text("dataset")
    return f"Measured on {images} images of {dataset}: {', '.join(found)}" if found else None


def _latencies(stored: StoredValues) -> Latencies:
    environment = stored.part("environment")
    return {
        "device": stored.text("device"),
        "dtype": stored.text("dtype"),
        "measured_at": stored.text("measured_at"),
        "threads": None if environment is None else environment.number("threads", 1),
        "rows": [_latency_at(row) for row in stored.parts("rows")],
    }


def _latency_at(row: StoredValues) -> LatencyAt:
    return {
        "batch": row.count("batch"),
        "dense_latency_ms": row.need("dense_latency_ms", 0),
        "latency_ms": row.need("latency_ms", 0),
        "throughput_img_s": row.need("throughput_img_s", 0),
        "speedup": row.need("speedup", 0),
        "quartiles": row.numbers("speedup_quartiles", 2),
    }


def _add_layers(report: StoredValues, values: JsonDict) -> None:
    """Losses and errors of the report's layers to those of the weights, by name; notes where the two disagree."""
    said = {layer.text("name"): layer for layer in report.parts("layers")}
    for layer in values["layers"]:
        row = said.pop(layer["module"], None)
        layer["predicted_loss"] = row and row.number("predicted_loss")
        layer["error_after_refit"] = row and row.number("error_after_refit")
        if row and row.values.get("kept_blocks") != layer["kept_blocks"]:
            values["notes"].append(
                f"{layer['module']}: the report file speaks of {short(row.values.get('kept_blocks'))} kept blocks, the "
                f"weights hold {layer['kept_blocks']}; this page shows the weights"
            )
    if said:
        names = ", ".join(map(str, list(said)[:3]))
        values["notes"].append(f"The report file names {len(said)} layers that the weights do not hold: {names}")
