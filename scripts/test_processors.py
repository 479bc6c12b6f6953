"""Run the tests as other processors would: `python scripts/test_processors.py [--only NAME ...] [-- PYTEST ARGUMENTS]`.

What this machine's processor has more than another is switched off, in torch, MKL, oneDNN and this package's kernels;
and one run adds up matrix products in another order (`tests/other_rounding.py`). What another has more cannot be
switched on. Prints a table, ends with 1 where a test failed.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "BLOCKPRUNE_CPU_ISA": "avx2",
}
OLDEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "BLOCKPRUNE_CPU_ISA": "baseline",
}
# Name -> (environment, arguments of pytest).
PROCESSORS: dict[str, tuple[dict[str, str], list[str]]] = {
    "this one": ({}, []),
    "AVX2": (AVX2, []),
    "no AVX": (OLDEST, []),
    "another order of sums": ({}, ["-p", "tests.other_rounding"]),
    "one thread": ({"OMP_NUM_THREADS": "1"}, []),
    "two threads": ({"OMP_NUM_THREADS": "2"}, []),
}


def run(name: str, arguments: list[str]) -> tuple[int, int, list[str]]:
    """(tests passed, tests failed, names of those)."""
    environment, options = PROCESSORS[name]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "auto",
        "--maxprocesses",
        "4",
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
    ]
    done = subprocess.run(
        [*command, *options, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?)", done.stdout.splitlines()[-1])}
    bad = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    if not counts:
        bad = [done.stdout[-500:] + done.stderr[-500:]]
    return counts.get("passed", 0), len(bad), bad


def main() -> int:
    """Returns 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PROCESSORS, default=list(PROCESSORS))
    parser.add_argument("arguments", nargs="*", help="of pytest, after --")
    options = parser.parse_args()
    table, every = Table("processor", "passed", "failed"), []
    for name in options.only:
        passed, failed, bad = run(name, options.arguments)
        table.add_row(name, str(passed), str(failed))
        every += [f"{name}: {test}" for test in bad]
    console = Console()
    console.print(table)
    for line in every:
        console.print(line, markup=False)
    return bool(every)


if __name__ == "__main__":
    sys.exit(main())
