"""The state of an unfinished pruning run in a folder, so that an interrupted one goes on with the layer it was at.

Every file is written under a temporary name and moved into place: what is there is whole.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import CheckpointError
from .files import partial_file

if TYPE_CHECKING:
    from accelerate import Accelerator

SELECTION = "selection"


@dataclass
class Progress:
    """Reads and writes the parts of a run that are done; the first process writes, all read.

    Args:
        folder: made when the first part is written.
        job: all that decides the result, as JSON-ready values. A folder with parts of another job is refused.
        accelerator: the processes.

    Attributes:
        resumed: names of the parts that were there at the start.
    """

    folder: Path
    job: dict[str, Any]
    accelerator: "Accelerator"
    resumed: set[str] = field(init=False)

    def __post_init__(self) -> None:
        from accelerate.utils import broadcast_object_list

        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            found = [{path.stem for path in self.folder.glob("*.safetensors")}]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        self.resumed = found[0]

    def read(self, part: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, values) of a part that was done before; None where it was not.

        Raises:
            CheckpointError: it belongs to another job, or is damaged.
        """
        if part not in self.resumed:
            return None
        path = self._path(part)
        try:
            with safe_open(path, framework="pt") as file:
                stored = json.loads(file.metadata()["values"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}); start again without --resume") from error
        if stored["job"] != fingerprint(self.job):
            raise CheckpointError(
                f"{self.folder}: holds the state of a run with another model, data set or settings; give what was "
                "given then, or start again without --resume"
            )
        return tensors, stored["values"]

    def write(self, part: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Keep a part.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not self.accelerator.is_main_process:
            return
        path = self._path(part)
        stored = json.dumps({"job": fingerprint(self.job), "values": values})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial_file(path) as partial:
                save_file({n: t.contiguous() for n, t in tensors.items()}, partial, metadata={"values": stored})
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):  # It stays where other parts are in it.
                self.folder.rmdir()
            raise CheckpointError(f"{path}: could not be written ({error}); free some space") from error

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"


def discard(folder: Path) -> None:
    """Remove a run's state, if there is one."""
    shutil.rmtree(folder, ignore_errors=True)


def fingerprint(values: dict[str, Any]) -> str:
    """The same for equal JSON-ready values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """The same for equal weights."""
    return tensors_fingerprint(sorted(model.state_dict().items()))


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The same for equal tensors by name, in their order."""
    digest = hashlib.sha256()
    for name, value in tensors:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content: Any = value.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()
