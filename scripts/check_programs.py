"""Run every Python program of a folder and print which ended well: `python scripts/check_programs.py FOLDER`.

For collections of small programs that each show a fault and end with 1 while it is there.
"""

import subprocess
import sys
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Table

TIMEOUT_SECONDS = 300


def check(program: Path) -> tuple[bool, str, float]:
    """(whether it ended with 0, its last line, seconds)."""
    start = perf_counter()
    try:
        done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        said = done.stdout if done.stdout.strip() else done.stderr
        passed, last = done.returncode == 0, (said.strip().splitlines() or [""])[-1]
    except subprocess.TimeoutExpired:
        passed, last = False, f"still running after {TIMEOUT_SECONDS} seconds"
    return passed, last, perf_counter() - start


def main() -> int:
    """Returns the number of programs that did not end well."""
    programs = sorted(Path(sys.argv[1]).glob("*.py"))
    if not programs:
        sys.exit(f"{sys.argv[1]}: holds no programs")
    table, failed = Table("program", "ends", "seconds", "last line"), 0
    for program in programs:
        passed, last, seconds = check(program)
        failed += not passed
        table.add_row(program.stem, "well" if passed else "[red]with a fault", f"{seconds:.0f}", last[:100])
    table.caption = f"{len(programs) - failed} of {len(programs)} ended well"
    Console().print(table)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
