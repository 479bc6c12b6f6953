"""What an interrupted run left: told to the user, gone on with or thrown away, but never thrown away in silence.

A run's state is the parts that `runs.resume` keeps in a folder of its own. `unfinished_run` holds the rules for all
runs that have one beside their output.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, ConfigError
from .interruption import Interrupted
from .processes import processes

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass(frozen=True)
class Kept:
    """The state of an unfinished run.

    Attributes:
        folder: where it lies.
        done: how far the run is.
        when: the last part was written.
        num_bytes: of all parts.
    """

    folder: Path
    done: str
    when: datetime
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.done} ({self.when:%Y-%m-%d %H:%M}, {_size(self.num_bytes)} in {self.folder})"


def kept_in(folder: Path) -> Kept | None:
    """The state in a folder; None where there is none."""
    parts = [(path, path.stat()) for path in folder.glob("*.safetensors")]
    if not parts:
        return None
    newest, stat = max(parts, key=lambda part: part[1].st_mtime_ns)
    when = datetime.fromtimestamp(stat.st_mtime)
    return Kept(folder, _done(newest), when, sum(part.st_size for _, part in parts))


def _done(path: Path) -> str:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("done", path.stem)
    except (OSError, SafetensorError):
        return f"{path.stem}, damaged"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def state_folder(output: str | Path) -> Path:
    """Where a run keeps its state: beside its output."""
    output = Path(output).expanduser().resolve()
    return output.with_name(f".{output.name}.unfinished")


@contextmanager
def unfinished_run(output: str | Path, *, resume: bool, restart: bool) -> Iterator[Path]:
    """The folder for a run's state while it goes on; it is removed when the run has come to its end.

    Errors and interruptions leave the state where it is. All processes have to enter it together.

    Args:
        output: what the run writes.
        resume: go on with what an interrupted run left, if it left anything.
        restart: throw that away.

    Raises:
        ConfigError: both are asked for.
        CheckpointError: there is such a state, and neither is.
        Interrupted: Ctrl-C or SIGTERM ended the run; says what is kept.
    """
    if resume and restart:
        raise ConfigError("resume and restart exclude each other: go on with what is kept, or throw it away")
    folder, of_run = state_folder(output), processes()
    if not resume:
        _make_way(folder, restart=restart, of_run=of_run)
    try:
        yield folder
    except KeyboardInterrupt as stop:
        kept = kept_in(folder)
        if kept is None:
            raise
        raise Interrupted(f"kept is {kept}; the same command with --resume goes on", stop) from None
    if of_run.is_main_process:
        discard(folder)


def _make_way(folder: Path, *, restart: bool, of_run: "PartialState") -> None:
    """Leave no state; the first process decides for all, which might see what it writes later."""
    from accelerate.utils import broadcast_object_list

    refusal: list[str | None] = [None]
    if of_run.is_main_process:
        if restart:
            discard(folder)
        if (kept := kept_in(folder)) is not None:
            ways = "remove it by hand" if restart else "go on with --resume, or throw it away with --restart"
            refusal = [f"an unfinished run is kept up to {kept}: {ways}"]
    if of_run.num_processes > 1:
        broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise CheckpointError(refusal[0])


def discard(folder: Path) -> None:
    """Remove a run's state, if there is one."""
    shutil.rmtree(folder, ignore_errors=True)
