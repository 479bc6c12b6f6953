"""Fill the model card's template for every checkpoint in benchmarks/results/accuracy-deit-tiny.json.

python scripts/model_cards.py [--check]

The checkpoints themselves are not kept: each card names the command that makes its own again.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_blockprune.checkpoint.card import model_card
from hf_blockprune.cost.flops import count_flops
from hf_blockprune.report.values import Report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/accuracy-deit-tiny.json"
CARDS = ROOT / "model_cards"
BASE = "facebook/deit-tiny-patch16-224"
CALIBRATION, EVALUATION = "imagenet-sample/calibration", "nips2017/evaluation"


def main() -> None:
    """Write the cards and their list, or fail where one is out of date."""
    pages = cards(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"])
    stale = [name for name, text in pages.items() if _read(CARDS / name) != text]
    stale += [path.name for path in CARDS.glob("deit-*.md") if path.name not in pages]
    if "--check" in sys.argv:
        sys.exit(f"{', '.join(stale)}: run python scripts/model_cards.py" if stale else 0)
    for path in CARDS.glob("deit-*.md"):
        path.unlink()
    for name, text in pages.items():
        (CARDS / name).write_text(text, encoding="utf-8")


def cards(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Card by file name, with the list of them as README.md."""
    config = ViTConfig(hidden_size=192, intermediate_size=768, num_attention_heads=3, num_labels=1000)
    with torch.device("meta"):
        flops = count_flops(ViTForImageClassification(config))
    dense = {"dense_flops": flops.total, "dense_size_bytes": 4 * flops.parameters}
    pages, lines = {}, []
    for row in rows:
        for recovered in [False, True] if row.get("recovered") else [False]:
            report = _report(row, dense, recovered=recovered)
            name = _name(row, recovered)
            card = model_card(Report.from_dict(report), f"OWNER/{name}")
            command = row["command"] if recovered else row["command"].replace(" --recover", "")
            pages[f"{name}.md"] = f"{card}\n\nMade and measured by:\n\n```console\n$ {command}\n```\n"
            top1 = report["evaluation"]["top1"]
            lines.append(
                f"| [{name}]({name}.md) | {row['flops_ratio']:.1%} | {row['size_bytes'] / 1e6:.1f} | {top1:.1%} |"
            )
    assert len(pages) == len(lines), "two rows have one name"
    head = """# Model cards

Of every DeiT-Ti that was pruned and measured, filled by `scripts/model_cards.py` from
`benchmarks/results/accuracy-deit-tiny.json`. The dense copy has slightly rounded LayerNorm weights. The template is
[template.md](template.md), which `save_pretrained` and `push_to_hub` fill too.

| model | FLOPs kept | MB | top-1 |
|---|---|---|---|
"""
    return {**pages, "README.md": head + "\n".join(lines) + "\n"}


def _name(row: dict[str, Any], recovered: bool) -> str:
    kept = row["budget"].partition("=")[2]
    parts = ["deit-tiny", row["block_shape"], row["method"], f"flops{float(kept) * 100:.0f}"]
    parts += [f"images{row['samples']}"] if row["samples"] != 512 else []
    parts += [f"draw{row['seed']}"] if row["seed"] else []
    return "-".join([*parts, "recovered"] if recovered else parts)


def _report(row: dict[str, Any], dense: dict[str, float], *, recovered: bool) -> dict[str, Any]:
    """What `BlockPruner.report` gave, as far as the row has it and a card shows it."""
    plain = {"dataset": EVALUATION, **row}
    learned = row["recovered"] if recovered else {}
    evaluation = {**plain, **{key: value for key, value in learned.items() if key != "num_images"}}
    return {
        **dense,
        **{key: row[key] for key in ("flops_ratio", "linear_flops_ratio", "density", "size_bytes")},
        "base_model": BASE,
        "model_class": "ViTForImageClassification",
        "config": {"method": row["method"], "block_shape": [int(size) for size in row["block_shape"].split("x")]},
        "calibration": None if row["method"] == "magnitude" else {"num_images": row["samples"], "dataset": CALIBRATION},
        "evaluation": evaluation,
        "recovery": {"num_images": learned["num_images"], "dataset": CALIBRATION, "evaluation_before": plain}
        if recovered
        else None,
        "latency": None,
        "predicted": None,
        "layers": [],  # of which a card says nothing, as of seconds
        "seconds": {},
    }


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


if __name__ == "__main__":
    main()
