"""What was measured of a pruned model: kept in its report by kind, and in its folder as long as the weights stay.

The newest measurement of a kind stands under the kind's own key of the report, where card and pages find it; those of
other data sets or machines stand under `history`, newest first. `weights_sha256` says which stored weights all of them
are of: beside other weights none of them holds.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

from .card import CARD_DIGEST, updated_card
from .checkpoint import CARD_FILE, REPORT_FILE, read_report
from .environment import machine_of
from .errors import CheckpointError
from .files import write_all
from .inspection import weight_files
from .progress import tensors_fingerprint

try:
    import fcntl
except ImportError:  # no POSIX system: two processes that measure one folder at once may each keep its own alone
    fcntl = None

logger = logging.get_logger(__name__)
KINDS = ("evaluation", "fidelity", "latency")
HISTORY, WEIGHTS = "history", "weights_sha256"
DATA_KEY = ("dataset", "split", "against")
MACHINE_KEY = ("device", "dtype")


def stamped(values: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Measured values with when and where they were measured: UTC, device, dtype and environment."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**values, "measured_at": now, **machine_of(model)}


def held(report: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """All measurements of a kind in a report, newest first."""
    newest = report.get(kind)
    return ([] if newest is None else [newest]) + list((report.get(HISTORY) or {}).get(kind) or [])


def measured(report: dict[str, Any]) -> bool:
    """Whether a report holds any measurement."""
    return any(report.get(key) for key in (*KINDS, HISTORY))


def add(report: dict[str, Any], kind: str, values: dict[str, Any]) -> None:
    """Make a measurement the newest of its kind, in place of an older one of the same thing.

    The same thing is the same data set and split, compared with the same model or none; or the same device, threads,
    dtype and batch size, for which a row leaves an older measurement of several.
    """
    rest = _other_rows if kind == "latency" else _other_data
    older = [kept for old in held(report, kind) if (kept := rest(old, values)) is not None]
    report[kind] = values
    report[HISTORY] = {**(report.get(HISTORY) or {}), kind: older}


def _other_data(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any] | None:
    same = all(old.get(key) == new.get(key) for key in DATA_KEY) and ("delta" in old) == ("delta" in new)
    return None if same else old


def _other_rows(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any] | None:
    if any(old.get(key) != new.get(key) for key in MACHINE_KEY) or _threads(old) != _threads(new):
        return old
    again = {row["batch"] for row in new.get("rows", [])}
    rows = [row for row in old.get("rows", []) if row["batch"] not in again]
    return {**old, "rows": rows} if rows else None


def _threads(values: dict[str, Any]) -> Any:
    return (values.get("environment") or {}).get("threads")


def drop(report: dict[str, Any]) -> bool:
    """Take all measurements out of a report: the weights are others now. Says whether there were any."""
    found = measured(report)
    report |= dict.fromkeys(KINDS)
    report.pop(HISTORY, None)
    report.pop(WEIGHTS, None)
    return found


def merge(report: dict[str, Any], others: dict[str, Any]) -> None:
    """Add another report's measurements of the same weights, in the order of their time."""
    for kind in KINDS:
        # Older versions did not write down when; what they measured counts as older than the rest.
        found = [*reversed(held(report, kind)), *reversed(held(others, kind))]
        report[kind] = None
        report[HISTORY] = {**(report.get(HISTORY) or {}), kind: []}
        for values in sorted(found, key=lambda values: str(values.get("measured_at") or "")):
            add(report, kind, values)


def files_fingerprint(folder: Path) -> str | None:
    """The same for equal tensors in a checkpoint's files, however they are split; None where there are none.

    Raises:
        CheckpointError: a file is damaged.
    """
    try:
        files = weight_files(folder)
    except CheckpointError:
        return None
    try:
        return tensors_fingerprint(sorted(_tensors(files), key=lambda entry: entry[0]))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be read ({error}); copy or download them again") from error


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a handle, not a dict)
                yield name, file.get_tensor(name)  # mapped, not read yet


def drop_stale(report: dict[str, Any], weights: str | None) -> bool:
    """Take out of a report what was measured of other weights; says whether there was any.

    Reports of older versions do not say of which weights; they are believed.

    Args:
        report: changed in place.
        weights: fingerprint of those beside it.
    """
    return report.get(WEIGHTS, weights) != weights and drop(report)


def save(folder: Path, report: dict[str, Any], weights: str) -> dict[str, Any]:
    """Write a report's measurements into a folder's report and card, both or neither.

    A card whose text somebody edited stays as it is, and a warning says so.

    Args:
        folder: of a pruned model.
        report: with the measurements.
        weights: fingerprint of the files that they are of.

    Returns:
        The folder's report, with all that is known of these weights.

    Raises:
        CheckpointError: the folder has other weights or no report, or cannot be written.
    """
    file, card = folder / REPORT_FILE, folder / CARD_FILE
    with _locked(folder):
        if files_fingerprint(folder) != weights:
            raise CheckpointError(f"{folder}: holds other weights than those that were measured; measure them again")
        stored = read_report(file)
        if stored is None:
            raise CheckpointError(f"{folder}: has no {REPORT_FILE} to keep measurements in")
        if file.is_symlink():
            raise CheckpointError(f"{file}: is a link, as in the Hub's cache, where nothing is changed")
        before = dict(stored)
        drop_stale(stored, weights)
        merge(stored, report)
        stored[WEIGHTS] = weights
        texts = {}
        if card.is_file():
            texts = _card_text(card, before, stored)
        texts[file] = json.dumps(stored, indent=2) + "\n"
        try:
            write_all(texts)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return stored


def _card_text(card: Path, before: dict[str, Any], after: dict[str, Any]) -> dict[Path, str]:
    """A card's new text by its path, nothing where it stays; its digest goes into the report `after`."""
    made = updated_card(card.read_text(encoding="utf-8"), before, after)
    if made is None:
        logger.warning(f"{card}: was edited, so its figures stay as they are; {REPORT_FILE} has the new ones")
        return {}
    text, after[CARD_DIGEST] = made
    return {card: text}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; no file is left, and where the system has no such locks all go on."""
    if fcntl is None:
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror or error})") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
