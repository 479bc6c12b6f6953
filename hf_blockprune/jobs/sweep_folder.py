"""A sweep's folder: its results, the checkpoints that it keeps, and the state of the point it is at."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.folder import read_json, write_text
from ..errors import CheckpointError
from ..types import JsonDict

RESULTS, PAGE = "sweep.json", "sweep.html"
CHECKPOINTS, UNFINISHED = "checkpoints", ".unfinished"
# What a process that was killed while it wrote may have left.
LEFT_OVER = (".*.partial", ".*.old")


@dataclass(frozen=True)
class SweepFolder:
    """Reads and writes a sweep's folder; every file and every checkpoint in it is whole.

    Attributes:
        path: of the folder.
        names: of the sweep's points, in their order.
    """

    path: Path
    names: list[str]

    def check(self) -> None:
        """Refuse a folder that holds something else, before any work is begun.

        Raises:
            CheckpointError: it does.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path}: is a file; name a folder")
        others = self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir())
        if others and not (self.path / RESULTS).is_file():
            raise CheckpointError(f"{self.path}: holds files that are no sweep's; name an empty folder, or a new one")

    def open(self, fresh: JsonDict) -> JsonDict:
        """The results so far, of a sweep with the settings of `fresh`; or `fresh` where there are none.

        Raises:
            CheckpointError: the results are those of other settings or damaged, or the folder cannot be made.
        """
        file = self.path / RESULTS
        if not file.is_file():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be created ({error.strerror or error})") from error
            self.write(fresh, None)
            return fresh
        found = read_json(file)
        wanted = json.loads(json.dumps(fresh["settings"]))
        stored = found.get("settings")
        if found.get("format_version") != fresh["format_version"] or not isinstance(stored, dict):
            raise CheckpointError(f"{file}: is no sweep of this version; name another folder")
        if differing := sorted(key for key in wanted if wanted[key] != stored.get(key)):
            raise CheckpointError(
                f"{self.path}: holds a sweep with other settings ({', '.join(differing)}); give what was given then, "
                "or name another folder"
            )
        self._clean()
        return found

    def _clean(self) -> None:
        for folder in (self.path, self.path / CHECKPOINTS):
            for pattern in LEFT_OVER:
                for path in folder.glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write(self, values: JsonDict, page: str | None) -> None:
        """Write the results, points in their order, and the page about them.

        Raises:
            CheckpointError: they cannot be written.
        """
        values["points"].sort(key=lambda point: self.names.index(point["name"]))
        write_text(self.path / RESULTS, json.dumps(values, indent=2) + "\n")
        if page is not None:
            write_text(self.path / PAGE, page)

    def discard_unfinished(self) -> None:
        """Remove what points that are not done keep of their runs."""
        shutil.rmtree(self.path / UNFINISHED, ignore_errors=True)

    def work_dir(self, name: str) -> Path:
        """Where a point keeps the state of its unfinished run."""
        return self.path / UNFINISHED / name

    def checkpoint(self, name: str) -> Path:
        """A point's checkpoint, there or not."""
        return self.path / CHECKPOINTS / name

    def keep(self, name: str) -> str | None:
        """Where a point's checkpoint lies within the folder; None where an earlier run dropped it."""
        return f"{CHECKPOINTS}/{name}" if self.checkpoint(name).is_dir() else None

    def drop(self, name: str) -> None:
        """Remove a point's checkpoint, if it is there; an interruption leaves all of it or nothing under its name."""
        if self.checkpoint(name).is_dir():
            gone = self.checkpoint(name).rename(self.path / CHECKPOINTS / f".{name}.old")
            shutil.rmtree(gone)
