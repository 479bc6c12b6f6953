"""What tests/fuzzing.py asks of `inspect_checkpoint`, searched by coverage; needs the extra `fuzz` (Linux alone).

    python scripts/fuzz_atheris.py [-runs=N] [-max_total_time=SECONDS] [CORPUS_FOLDER]

An input's first byte says what the rest replaces in a checkpoint of tests/fixtures: config.json, its
quantization_config, the weights, or their header. `inspect_checkpoint` must read the result or raise a typed error.
"""

import json
import struct
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
with atheris.instrument_imports(include=["hf_blockprune"]):
    import hf_blockprune  # noqa: F401

from hf_blockprune import BlockPruneError, BlockSparseFormatError
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from tests.fuzzing import FIXTURE

CONFIG, WEIGHTS = (FIXTURE / "config.json").read_bytes(), (FIXTURE / "model.safetensors").read_bytes()


def changed_files(data: bytes) -> tuple[bytes, bytes]:
    """(config.json, model.safetensors) that an input stands for."""
    kind, rest = data[0] % 4, data[1:]
    if kind == 0:
        return rest, WEIGHTS
    if kind == 1:
        before, _, _ = CONFIG.partition(b'"quantization_config"')
        return before + b'"quantization_config": ' + rest + b"}", WEIGHTS
    if kind == 2:
        return CONFIG, rest
    (size,) = struct.unpack("<Q", WEIGHTS[:8])
    return CONFIG, struct.pack("<Q", len(rest)) + rest + WEIGHTS[8 + size :]


def one_input(data: bytes) -> None:
    """Inspect what an input stands for; anything but a typed error ends the run."""
    if not data:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, weights = changed_files(data)
        (folder / "config.json").write_bytes(config)
        (folder / "model.safetensors").write_bytes(weights)
        with suppress(BlockPruneError, BlockSparseFormatError):
            inspect_checkpoint(folder)


def write_seeds(folder: Path) -> None:
    """Whole files to start from, where there is no corpus yet."""
    folder.mkdir(parents=True, exist_ok=True)
    (size,) = struct.unpack("<Q", WEIGHTS[:8])
    settings = json.dumps(json.loads(CONFIG)["quantization_config"]).encode()
    for kind, content in enumerate((CONFIG, settings, WEIGHTS, WEIGHTS[8 : 8 + size])):
        (folder / f"seed-{kind}").write_bytes(bytes([kind]) + content)


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    if folders:
        write_seeds(Path(folders[0]))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
