"""Draw docs/frontier.png: top-1 over the FLOPs that are kept, by what leaves, beside what others publish.

    python benchmarks/frontier.py

From the rows of accuracy.py and baselines.py; all one shot but where it says so, on the same images.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
OTHERS = {"corp": "CORP (arXiv 2602.05243)", "dvbp-ob2c": "DVBP + OB2C (arXiv 2608.17657)"}
EVERYTHING = "blocks, units, heads and tokens"
RECOVERED = f"{EVERYTHING}, recovered"
LEAVES = {
    ("blocks", "keep"): "blocks alone",
    ("units,heads", "keep"): "units and heads",
    ("blocks,units,heads", "keep"): "blocks, units and heads",
    ("none", "auto"): "tokens alone",
    ("blocks,units,heads", "auto"): EVERYTHING,
}
KINDS = (*LEAVES.values(), RECOVERED, *OTHERS.values())
COLOURS = ("#8c8c8c", "#b07aa1", "#76b7b2", "#f28e2b", "#4e79a7", "#1b3f6b", "#59a14f", "#e15759")

Frontier = dict[str, dict[float, dict[str, Any]]]


def frontier(rows: Iterable[dict[str, Any]]) -> Frontier:
    """Rows beside those of the other result files, by what leaves and by share of the FLOPs.

    Where a row was recovered, that is another one.
    """
    found: Frontier = {name: {} for name in KINDS}
    for row in (*alone(stored("accuracy")), *stored("moves"), *rows):
        share = asked(row)
        found[LEAVES[row.get("moves", "blocks"), row.get("tokens", "keep")]][share] = row
        if row.get("recovered"):
            found[RECOVERED][share] = row["recovered"]
    for row in stored("baselines"):
        found[OTHERS[row["method"]]][asked(row)] = row
    return {name: dict(sorted(points.items(), reverse=True)) for name, points in found.items() if points}


def asked(row: dict[str, Any]) -> float:
    """The budget's ratio."""
    return float(row["budget"].partition("=")[2])


def alone(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows of blocks alone, those to compare with others: obs, 16x16, 512 images, the first draw, one shot."""
    wanted = ("obs", "16x16", 512, 0)
    found = [row for row in rows if (row["method"], row["block_shape"], row["samples"], row["seed"]) == wanted]
    return [{**row, "recovered": None} for row in found]


def stored(name: str) -> list[dict[str, Any]]:
    """Rows of a result file of DeiT-Ti."""
    return json.loads((RESULTS / f"{name}-deit-tiny.json").read_text(encoding="utf-8"))["rows"]


def main() -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, colours = stored("tokens"), dict(zip(KINDS, COLOURS, strict=True))
    figure, axis = pyplot.subplots(figsize=(7.5, 4.8))
    axis.axhline(100 * rows[0]["baseline_top1"], color="black", linewidth=1, linestyle=":", label="dense")
    for name, points in frontier(rows).items():
        style = "--" if name in OTHERS.values() else "-"
        values = [100 * row["top1"] for row in points.values()]
        axis.plot(
            [100 * share for share in points], values, style, color=colours[name], marker="o", markersize=4, label=name
        )
    axis.set(xlabel="% of the dense model's FLOPs", ylabel="top-1, %", ylim=(0, 90))
    axis.set_title("DeiT-Ti, one shot from 512 images", fontsize=11)
    axis.invert_xaxis()
    axis.grid(color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    figure.savefig(ROOT / "docs/frontier.png", dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
