"""Say in what two pruned models differ: `python scripts/compare_folders.py BEFORE AFTER`; ends with 1 where they do.

Weights and masks are compared bit by bit, configs and reports value by value. Times, and what names the machine, the
folder or the versions, are left out: they differ from run to run.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

VALUES = ("config.json", "blockprune_config.json", "blockprune_report.json", "preprocessor_config.json")
# Of the run, not of its result; a card shows times.
OF_THE_RUN = {"seconds", "environment", "device", "latency", "card_sha256", "transformers_version", "date"}


def main() -> None:
    """Print every difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path, metavar="FOLDER")
    folders = parser.parse_args().folders
    for folder in folders:
        if not any(folder.glob("*.safetensors")):
            parser.error(f"{folder}: no folder with a model in safetensors")
    found = [*differing_tensors(*folders), *differing_values(*folders)]
    print("\n".join(found) or "the same weights, masks, configs and reports")
    sys.exit(bool(found))


def differing_tensors(before: Path, after: Path) -> Iterator[str]:
    """A line for each tensor that only one folder has, or that differs."""
    tensors = []
    for folder in (before, after):
        tensors.append(
            {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        )
    for name in sorted(tensors[0].keys() | tensors[1].keys()):
        one, other = (each.get(name) for each in tensors)
        if one is None or other is None:
            yield f"{name}: only in {(after if one is None else before).name}"
        elif (one.shape, one.dtype) != (other.shape, other.dtype):
            yield f"{name}: {one.dtype} {list(one.shape)}, then {other.dtype} {list(other.shape)}"
        elif not torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)):
            most = (one.double() - other.double()).abs().max()
            yield f"{name}: {int((one != other).sum()):,} of {one.numel():,} values differ, by at most {most:.3g}"


def differing_values(before: Path, after: Path) -> Iterator[str]:
    """A line for each value of a JSON file that only one folder has, or that differs."""
    for name in VALUES:
        files = [folder / name for folder in (before, after)]
        if not all(file.is_file() for file in files):
            if any(file.is_file() for file in files):
                yield f"{name}: only in {next(file for file in files if file.is_file()).parent.name}"
            continue
        yield from _differences(name, *(json.loads(file.read_text(encoding="utf-8")) for file in files))


def _differences(where: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if key in OF_THE_RUN:
                continue
            if key in one and key in other:
                yield from _differences(f"{where}: {key}", one[key], other[key])
            else:
                yield f"{where}: {key} is in one of them alone"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{where}[{i}]", a, b)
    elif one != other:
        yield f"{where}: {one!r}, then {other!r}"


if __name__ == "__main__":
    main()
