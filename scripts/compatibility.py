"""Run every family through tests/model/test_families.py and write down what passed, for docs/compatibility.md.

python scripts/compatibility.py --output benchmarks/results/families.json && python benchmarks/tables.py
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
CASE = re.compile(r"test_(?P<capability>\w+)\[(?P<family>[\w-]+)\]")


def main() -> None:
    """Write the outcome of every test; failures are outcomes too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, default=ROOT / "tests/model/test_families.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", f"--junit-xml={report}", str(options.tests)]
        subprocess.run(command, cwd=ROOT, check=False)
        outcomes = read(report)
    sys.path.insert(0, str(ROOT))
    from benchmarks.timing import save
    from hf_blockprune.runs.environment import environment

    save(options.output, {"families": outcomes, "environment": environment()})


def read(report: Path) -> dict[str, dict[str, str]]:
    """Outcome by family and capability from a JUnit file."""
    outcomes: dict[str, dict[str, Any]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        match = CASE.fullmatch(case.get("name", ""))
        if match:
            failed = case.find("failure") is not None or case.find("error") is not None
            outcome = "fails" if failed else "not run" if case.find("skipped") is not None else "works"
            outcomes.setdefault(match["family"], {})[match["capability"].replace("_", " ")] = outcome
    return outcomes


if __name__ == "__main__":
    main()
