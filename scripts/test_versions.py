"""Run part of the tests with the oldest and the newest versions of what the package needs, for docs/compatibility.md.

python scripts/test_versions.py && python benchmarks/tables.py

Each set of scripts/versions.ini gets a virtual environment of its own. This file needs Python alone.
"""

import argparse
import configparser
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
MATRIX = ROOT / "scripts/versions.ini"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
REPORTED = (
    *("torch", "transformers", "accelerate", "datasets", "evaluate", "optimum", "safetensors", "huggingface_hub"),
    *("numpy", "pillow", "typer"),
)
TESTS = (
    "tests/hub/test_ops.py",
    "tests/hub/test_linear.py",
    "tests/hub/test_quantizer.py",
    "tests/hub/test_loading.py",
    "tests/hub/test_saving.py",
    "tests/hub/test_converters.py",
    "tests/hub/test_model_configs.py",
    "tests/hub/test_parts.py",
    "tests/hub/test_storage.py",
    "tests/hub/test_fusion.py",
    "tests/hub/test_format.py",
    "tests/checkpoint/test_safety.py",
    "tests/pruner/test_pruner.py",
    "tests/data/test_batches.py",
    "tests/evaluate/test_accuracy.py",
    "tests/checkpoint/test_publish.py",
    "tests/cli/test_commands.py",
)
# torch 2.6 warns of a setting of its own when it compiles.
TOLERATED = ("-W", "ignore:Skipping serialization:UserWarning")
ASK_VERSIONS = """
import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))
"""


def main() -> None:
    """Test every set asked for, print and write the outcomes; fails where a test did."""
    sets = read_matrix(MATRIX)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(sets), default=list(sets), help="which (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/versions.json")
    parser.add_argument("--environments", type=Path, help="folder to keep the environments in, for another run")
    options = parser.parse_args()
    for name in options.sets:
        with tempfile.TemporaryDirectory() as scratch:
            environment = (options.environments or Path(scratch)) / name
            print(f"{name}: installing", flush=True)
            python = install(environment, sets[name].requirements, Path(scratch))
            print(f"{name}: testing", flush=True)
            write(options.output, {name: outcome(python, sets[name].without, Path(scratch))}, order=list(sets))
    results = json.loads(options.output.read_text(encoding="utf-8"))["sets"]
    print_table({name: results[name] for name in options.sets})
    sys.exit(any(results[name]["failed"] for name in options.sets))


class Set(NamedTuple):
    """What pip is to install, and the tests that are left out."""

    requirements: list[str]
    without: list[str]


def read_matrix(path: Path) -> dict[str, Set]:
    """The sets of a file by name."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(path.read_text(encoding="utf-8"))
    return {
        name: Set(parser[name]["requirements"].split(), parser[name].get("without", "").split())
        for name in parser.sections()
    }


def install(environment: Path, requirements: list[str], scratch: Path) -> Path:
    """Install a set and then the checkout without its dependencies, so that pip's check compares it with its bounds.

    Args:
        environment: folder of the virtual environment, made where it is missing.
        requirements: what pip is to install.
        scratch: a folder for files that are needed for a while.

    Returns:
        The environment's Python.
    """
    python = environment / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(python), "-m", "pip"]
    pins = scratch / "requirements.txt"
    pins.write_text("\n".join(requirements) + "\n")
    # torch goes first, as in setup.sh: resolved as a dependency, pip would take the CUDA build (several GB).
    torch = [each for each in requirements if each.startswith("torch==")]
    cpu_build = ["--retries", "1", "--no-deps", *torch, "--extra-index-url", CPU_INDEX]
    subprocess.run([*pip, "install", "-q", *cpu_build], check=True)
    # A set says what is newest, so what is there from an earlier run must not count as good enough.
    subprocess.run([*pip, "install", "-q", "--upgrade", "-r", str(pins), "pytest>=8", "hypothesis>=6.100"], check=True)
    subprocess.run([*pip, "install", "-q", "--no-deps", "--force-reinstall", str(ROOT)], check=True)
    missing = subprocess.run([*pip, "check"], capture_output=True, text=True, check=False)
    if missing.returncode:
        sys.exit(f"the set does not go together:\n{missing.stdout}")
    return python


def outcome(python: Path, without: list[str], scratch: Path) -> dict[str, Any]:
    """Run the tests away from the checkout, so that what was installed is what they import."""
    shutil.copytree(ROOT / "tests", scratch / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, scratch)
    report = scratch / "report.xml"
    command = [str(python), "-m", "pytest", "-q", *TOLERATED, f"--junit-xml={report}", *TESTS]
    command += [f"--deselect={test}" for test in without]
    subprocess.run(command, cwd=scratch, check=False, env={"OMP_NUM_THREADS": "1", **os.environ})
    if not report.exists():
        sys.exit("the tests did not start")
    asked = subprocess.run([str(python), "-c", ASK_VERSIONS, *REPORTED], check=True, capture_output=True, text=True)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": json.loads(asked.stdout),
        **count(report),
        "without": without,
    }


def count(report: Path) -> dict[str, Any]:
    """How many tests of a JUnit file passed, failed and were skipped, and which failed."""
    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(report).iter("testcase"):
        found = {child.tag for child in case}
        which = "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"
        outcomes[which].append(f"{case.get('classname')}.{case.get('name')}")
    counts = {which: len(set(names)) for which, names in outcomes.items()}  # a failing teardown lists its test again
    return {**counts, "failures": sorted(set(outcomes["failed"]))}


def write(path: Path, outcomes: dict[str, Any], *, order: list[str]) -> None:
    """Replace what the file says of these sets; it is whole at every moment."""
    before = json.loads(path.read_text(encoding="utf-8"))["sets"] if path.exists() else {}
    merged = {**before, **outcomes}
    results = {"tests": list(TESTS), "sets": {name: merged[name] for name in order if name in merged}}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def print_table(sets: dict[str, Any]) -> None:
    """Versions and counts, a column a set."""
    rows = [["", *sets]]
    rows += [[key, *(each["versions"][key] for each in sets.values())] for key in ("python", *REPORTED)]
    rows += [[key, *(str(each[key]) for each in sets.values())] for key in ("passed", "failed", "skipped")]
    for row in rows:
        print("".join(f"{cell:<18}" for cell in row).rstrip())
    for name, each in sets.items():
        for failure in each["failures"]:
            print(f"{name}: failed: {failure}")


if __name__ == "__main__":
    main()
