"""Which configuration of the GPU kernel to use: a few candidates, measured once on a device and kept on disk.

`BLOCKPRUNE_AUTOTUNE=0` takes the first candidate, always the same, and neither measures nor reads what was measured.
Files lie in `$BLOCKPRUNE_CACHE`, by default `$HF_HOME/blockprune`; one that cannot be read or written costs time alone.
"""

import contextlib
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from huggingface_hub.constants import HF_HOME

if TYPE_CHECKING:
    from .blockprune_config import JsonDict

logger = logging.getLogger(__name__)

DENSITY_STEPS = 16  # densities that round to the same sixteenth share a choice
FORMAT = 1  # of the files; other ones are not read


class Config(NamedTuple):
    """How the kernel runs.

    Attributes:
        block_m: tokens of a tile.
        block_k: kept features multiplied at once.
        warps, stages: of a program, and loads it has under way.
        group: token tiles that pass by all block rows before the next ones do.
        per_sm: programs for each multiprocessor, which then take several tiles each; 0 for a program a tile.
        strips: each program takes neighbouring block rows of the same tokens, so that x stays in its L1 cache.
        k_major: x is transposed first, so that single features of many tokens lie side by side.
    """

    block_m: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    per_sm: int = 0
    strips: bool = False
    k_major: bool = False


class Problem(NamedTuple):
    """What a choice depends on; `key` names it in files."""

    dtype: str
    element_bytes: int
    precision: str
    rows: int
    cols: int
    tokens: int
    out_features: int
    in_features: int
    density: float

    @property
    def key(self) -> str:
        """Problems of one key share a choice."""
        tokens = 1 << max(self.tokens - 1, 0).bit_length()
        sixteenths = max(1, round(self.density * DENSITY_STEPS))
        return (
            f"{self.dtype} {self.precision} {self.rows}x{self.cols} tokens {tokens} "
            f"{self.out_features}x{self.in_features} kept {sixteenths}/{DENSITY_STEPS}"
        )


class Choice(NamedTuple):
    """The best configuration, its time and that of a dense product, in milliseconds; no times where none were taken."""

    config: Config
    sparse_ms: float | None = None
    dense_ms: float | None = None


def candidates(problem: Problem, shared_memory: int) -> list[Config]:
    """What is worth trying, the safest first.

    Args:
        problem: what is multiplied.
        shared_memory: bytes that a program may use.
    """
    block_k = 64 if problem.element_bytes <= 2 else 32
    if problem.tokens <= 512:
        plain = [Config(64, block_k, 4, 4), Config(32, 2 * block_k, 4, 3), Config(16, 2 * block_k, 4, 4)]
    else:
        tall = [Config(256, block_k, 8, 3)] if problem.rows <= 64 else []
        plain = [
            Config(128, block_k, 8 if problem.rows >= 128 else 4, 4),
            *tall,
            Config(128, block_k, 8, 3, per_sm=1),
            Config(64, block_k, 4, 4),
            Config(64, block_k, 4, 4, group=1, per_sm=2, strips=True),
            Config(128, block_k // 2, 4, 5),
        ]
    # Narrower than one 16-byte access: single features are only quick to gather from a transposed x.
    narrow = (problem.cols & -problem.cols) * problem.element_bytes < 16
    found = [config._replace(k_major=True) for config in plain] + plain[:1] if narrow else plain
    fitting = [
        config
        for config in found
        if (config.block_m + problem.rows) * config.block_k * problem.element_bytes * config.stages <= shared_memory
    ]
    return fitting or [Config(32, block_k // 2, 4, 2, k_major=narrow)]


class Tuner:
    """Choices of one device, in memory and on disk.

    Args:
        device: its name and the versions of what compiles for it; part of the file's name.
    """

    def __init__(self, device: str) -> None:
        self._path = cache_folder() / f"triton-{re.sub('[^a-z0-9.]+', '-', device.lower()).strip('-')}.json"
        self._choices: dict[str, Choice] | None = None

    def choose(
        self,
        problem: Problem,
        configs: list[Config],
        measure: Callable[[Config], float | None],
        measure_dense: Callable[[], float],
    ) -> Choice:
        """The best of the configurations, measured where that was not done before.

        Args:
            problem: what is multiplied.
            configs: what to try.
            measure: milliseconds of a configuration, None for one that does not run here.
            measure_dense: milliseconds of a dense product in its place.

        Raises:
            RuntimeError: no configuration runs.
        """
        if self._choices is None:
            self._choices = _read(self._path)
        found = self._choices.get(problem.key)
        if found is not None:
            return found
        times = {config: ms for config in configs if (ms := measure(config)) is not None}
        if not times:
            raise RuntimeError(f"no configuration of the block-sparse kernel runs here for {problem.key}")
        best = min(times, key=times.__getitem__)
        self._choices[problem.key] = Choice(best, times[best], measure_dense())
        # Other processes may have measured other problems in the meantime.
        self._choices = {**_read(self._path), **self._choices}
        _write(self._path, self._choices)
        return self._choices[problem.key]


def cache_folder() -> Path:
    """Where measured choices are kept."""
    return Path(os.environ.get("BLOCKPRUNE_CACHE") or Path(HF_HOME, "blockprune")).expanduser()


def _read(path: Path) -> dict[str, Choice]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return {}
        return {key: _choice(value) for key, value in content["choices"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning(f"{path} cannot be read ({error!r}); kernels are measured anew")
        return {}


def _choice(value: "JsonDict") -> Choice:
    """Refuses what the kernel could not take: the file may have been written by anyone."""
    config = Config(**value["config"])
    for size, least in ((config.block_m, 16), (config.block_k, 16), (config.warps, 1)):
        if type(size) is not int or not least <= size <= 1024 or size & (size - 1):
            raise ValueError(f"impossible {config}")
    for count, least, most in ((config.stages, 1, 8), (config.group, 1, 1 << 16), (config.per_sm, 0, 32)):
        if type(count) is not int or not least <= count <= most:
            raise ValueError(f"impossible {config}")
    if type(config.strips) is not bool or type(config.k_major) is not bool:
        raise ValueError(f"impossible {config}")
    times = float(value["sparse_ms"]), float(value["dense_ms"])
    if not all(0 <= ms < math.inf for ms in times):
        raise ValueError(f"impossible times {times}")
    return Choice(config, *times)


def _write(path: Path, choices: dict[str, Choice]) -> None:
    content = {
        "format": FORMAT,
        "choices": {key: {**value._asdict(), "config": value.config._asdict()} for key, value in choices.items()},
    }
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
            partial = Path(file.name)
            json.dump(content, file, indent=1)
        partial.replace(path)
    except OSError as error:
        logger.warning(f"{path} cannot be written ({error!r}); kernels will be measured anew next time")
        if partial is not None:
            with contextlib.suppress(OSError):  # what kept it from being written may keep it from being removed
                partial.unlink()
