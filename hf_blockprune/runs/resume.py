"""The state of an unfinished pruning run in a folder, so that an interrupted one goes on with the layer it was at.

Every file is written under a temporary name and moved into place: what is there is whole.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import partial_file
from ..hub.blockprune_layers import packed_states
from ..types import JsonDict

if TYPE_CHECKING:
    from accelerate import Accelerator

SECONDS_BETWEEN = 60.0  # two writes of what changes all the time
LARGEST_SHARE = 0.05  # of the time that such writes may take


@dataclass
class RunState:
    """Reads and writes the parts of a run that are done; the first process writes, all read.

    Args:
        folder: made when the first part is written.
        job: all that decides the result, as JSON-ready values. A folder with parts of another job is refused.
        accelerator: the processes.

    Attributes:
        resumed: names of the parts that were there at the start.
    """

    folder: Path
    job: JsonDict
    accelerator: "Accelerator"
    resumed: set[str] = field(init=False)
    _written: float = field(init=False)
    _took: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        from accelerate.utils import broadcast_object_list

        self._written = perf_counter()
        found: list[set[str]] = [set()]
        if self.accelerator.is_main_process:
            found = [{path.stem for path in self.folder.glob("*.safetensors")}]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        self.resumed = found[0]

    def read(self, part: str) -> tuple[dict[str, Tensor], JsonDict] | None:
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
                # Copies, which are aligned as new tensors are: where data begin may decide how their sums round.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}); start again with --restart") from error
        if stored["job"] != fingerprint(self.job):
            raise CheckpointError(
                f"{self.folder}: holds the state of a run with another model, data set or settings; give what was "
                "given then, or throw it away with --restart"
            )
        return tensors, stored["values"]

    def due(self) -> bool:
        """Whether it is time to write what changes all the time; seldom enough to cost little."""
        return perf_counter() - self._written >= max(SECONDS_BETWEEN, self._took / LARGEST_SHARE)

    def write(
        self,
        part: str,
        tensors: dict[str, Tensor],
        values: JsonDict,
        *,
        done: str,
        instead_of: tuple[str, ...] = (),
        own: bool = False,
    ) -> None:
        """Keep a part.

        Args:
            part: its name.
            tensors: by name.
            values: JSON-ready.
            done: how far the run is, as a user is told.
            instead_of: beginnings of the names of parts that this one makes needless; they go once it is there.
            own: whether it belongs to this process; every process writes its own parts.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.resumed = {old for old in self.resumed if not old.startswith(instead_of)}
        if not (own or self.accelerator.is_main_process):
            return
        start = perf_counter()
        path = self._path(part)
        metadata = {"values": json.dumps({"job": fingerprint(self.job), "values": values}), "done": done}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial_file(path) as partial:
                save_file({n: t.contiguous() for n, t in tensors.items()}, partial, metadata=metadata)
            for needless in [old for begin in instead_of for old in self.folder.glob(f"{begin}*")]:
                needless.unlink()
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):  # It stays where other parts are in it.
                self.folder.rmdir()
            raise CheckpointError(f"{path}: could not be written ({error}); free some space") from error
        self._written = perf_counter()
        self._took = self._written - start

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"


@dataclass
class KeptParts:
    """Parts of a run that are kept where it has a folder for them.

    Args:
        run_state: of the run, None where nothing is kept.
    """

    run_state: RunState | None = None

    def read(self, part: str) -> tuple[dict[str, Tensor], JsonDict] | None:
        """As `RunState.read`."""
        return None if self.run_state is None else self.run_state.read(part)

    def write(self, part: str, tensors: dict[str, Tensor], values: JsonDict, done: str, *, own: bool = False) -> None:
        """As `RunState.write`, where something is kept."""
        if self.run_state is not None:
            self.run_state.write(part, tensors, values, done=done, own=own)


def fingerprint(values: JsonDict) -> str:
    """The same for equal JSON-ready values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """The same for equal weights, whichever form layers have them in."""
    with packed_states(model):
        return tensors_fingerprint(sorted(model.state_dict().items()))


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The same for equal tensors by name, in their order."""
    digest = hashlib.sha256()
    for name, value in tensors:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
