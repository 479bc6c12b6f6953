"""Write the tables of README.md from the result files: `python benchmarks/tables.py`, `--check` to compare only."""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"


def accuracy_table(results: dict[str, Any]) -> str:
    """Top-1 by method, block shape and budget."""
    rows = results["rows"]
    first = rows[0]
    lines = [
        f"DeiT-Ti, {first['num_images']} labelled photographs that nothing was chosen on, dense top-1 "
        f"{first['baseline_top1']:.1%}; 512 calibration images.",
        "",
        "| FLOPs kept, whole model | blocks | method | top-1 | change, 95 % interval | recovered | weights on disk |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (-asked(row), row["block_shape"], row["method"])):
        low, high = row["interval"]
        lines.append(
            f"| {row['flops_ratio']:.1%} | {row['block_shape']} | `{row['method']}` | {row['top1']:.1%} | "
            f"{100 * row['delta']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}) | "
            f"{recovered(row)} | {row['size_bytes'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def asked(row: dict[str, Any]) -> float:
    """The budget's ratio."""
    return float(row["budget"].partition("=")[2])


def recovered(row: dict[str, Any]) -> str:
    """Top-1 after recovery, with its interval."""
    after = row["recovered"]
    if after is None:
        return "-"
    low, high = after["interval"]
    return f"{after['top1']:.1%}, {100 * after['delta']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


TABLES = {"accuracy": ("accuracy-deit-tiny.json", accuracy_table)}


def fill(text: str) -> str:
    """Replace what stands between `<!-- name: ... -->` and `<!-- /name -->`."""
    for name, (file, table) in TABLES.items():
        content = table(json.loads((RESULTS / file).read_text(encoding="utf-8")))
        pattern = re.compile(rf"(<!-- {name}: [^>]* -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


def main() -> None:
    """Rewrite the README, or fail where it is out of date."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    filled = fill(text)
    if "--check" in sys.argv:
        sys.exit(0 if filled == text else "README.md is out of date; run python benchmarks/tables.py")
    readme.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
