"""What was measured of a pruned model: kept in its report by kind, and in its folder as long as the weights stay.

The newest measurement of a kind stands under the kind's own key of the report, where card and pages find it; those of
other data sets or machines stand under `history`, newest first. `weights_sha256` says which stored weights all of them
are of: beside other weights none of them holds.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging

from ..errors import CheckpointError
from ..files import write_all
from ..report.measured import History, MeasuredLatency, Measurement, Measurements
from ..report.values import Report
from ..runs.environment import machine_of
from ..runs.resume import tensors_fingerprint
from ..types import JsonDict
from .card import updated_card
from .folder import CARD_FILE, REPORT_FILE, read_report
from .inspection import weight_files

try:
    import fcntl
except ImportError:  # no POSIX system: two processes that measure one folder at once may each keep its own alone
    fcntl = None

logger = logging.get_logger(__name__)
KINDS = ("evaluation", "fidelity", "latency")


def stamped(values: JsonDict, model: nn.Module) -> JsonDict:
    """Measured values with when and where they were measured: UTC, device, dtype and environment."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**values, "measured_at": now, **machine_of(model)}


def held(measured: Measurements, kind: str) -> list[Measurement]:
    """All measurements of a kind, one of `KINDS`, in a report, newest first."""
    newest, older = getattr(measured, kind), getattr(measured.history, kind, None)
    return ([] if newest is None else [newest]) + (older or [])


def any_held(measured: Measurements) -> bool:
    """Whether there is any measurement."""
    return any(held(measured, kind) for kind in KINDS)


def add(measured: Measurements, kind: str, new: Measurement) -> None:
    """Make a measurement the newest of its kind, in place of an older one of the same thing.

    The same thing is the same data set and split, compared with the same model or none; or the same device, threads,
    dtype and batch size, for which a row leaves an older measurement of several.
    """
    older = [kept for old in held(measured, kind) if (kept := _beside(old, new)) is not None]
    setattr(measured, kind, new)
    _set_older(measured, kind, older)


def _set_older(measured: Measurements, kind: str, older: list[Measurement]) -> None:
    measured.history = replace(measured.history) if measured.history is not None else History()
    setattr(measured.history, kind, older)


def _beside(old: Measurement, new: Measurement) -> Measurement | None:
    """What of an older measurement is of something else than a new one of its kind; None where it is of the same."""
    if isinstance(old, MeasuredLatency) and isinstance(new, MeasuredLatency):
        return _other_rows(old, new)
    keys = [(each.dataset, each.split, each.against, each.compares) for each in (old, new)]
    return None if keys[0] == keys[1] else old


def _other_rows(old: MeasuredLatency, new: MeasuredLatency) -> MeasuredLatency | None:
    if (old.device, old.dtype, old.threads) != (new.device, new.dtype, new.threads):
        return old
    again = {row.batch for row in new.rows}
    rows = [row for row in old.rows if row.batch not in again]
    return replace(old, rows=rows) if rows else None


def drop(measured: Measurements) -> bool:
    """Take all measurements out of a report: the weights are others now. Says whether there were any."""
    found = any_held(measured)
    measured.evaluation = measured.fidelity = measured.latency = measured.history = measured.weights_sha256 = None
    measured.absent = Measurements.absent
    return found


def merge(measured: Measurements, others: Measurements) -> None:
    """Add another report's measurements of the same weights, in the order of their time."""
    for kind in KINDS:
        # Older versions did not write down when; what they measured counts as older than the rest.
        found = [*reversed(held(measured, kind)), *reversed(held(others, kind))]
        setattr(measured, kind, None)
        _set_older(measured, kind, [])
        for each in sorted(found, key=lambda each: each.measured_at or ""):
            add(measured, kind, each)
    measured.absent = Measurements.absent


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


def drop_stale(measured: Measurements, weights: str | None) -> bool:
    """Take out of a report what was measured of other weights; says whether there was any.

    Reports of older versions do not say of which weights; they are believed.

    Args:
        measured: changed in place.
        weights: fingerprint of those beside it.
    """
    return measured.weights_sha256 not in (None, weights) and drop(measured)


def save(folder: Path, measured: Measurements, weights: str) -> Report:
    """Write measurements into a folder's report and card, both or neither.

    A card whose text somebody edited stays as it is, and a warning says so.

    Args:
        folder: of a pruned model.
        measured: the measurements.
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
        before = stored.copy()
        drop_stale(stored.measured, weights)
        merge(stored.measured, measured)
        stored.measured.weights_sha256 = weights
        texts = {}
        if card.is_file():
            texts = _card_text(card, before, stored)
        texts[file] = json.dumps(stored.to_dict(), indent=2) + "\n"
        try:
            write_all(texts)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return stored


def _card_text(card: Path, before: Report, after: Report) -> dict[Path, str]:
    """A card's new text by its path, nothing where it stays; its digest goes into the report `after`."""
    made = updated_card(card.read_text(encoding="utf-8"), before, after)
    if made is None:
        logger.warning(f"{card}: was edited, so its figures stay as they are; {REPORT_FILE} has the new ones")
        return {}
    text, after.card_sha256 = made
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
