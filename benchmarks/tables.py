"""Write the tables of README.md and docs/method.md from the result files; `--check` only compares."""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where it runs as a script; tests import it as it is

from benchmarks.frontier import asked, frontier  # noqa: E402


def accuracy_table(results: dict[str, Any]) -> str:
    """Top-1 by method, block shape and budget."""
    rows = results["rows"]
    first = rows[0]
    lines = [
        f"DeiT-Ti, {first['num_images']} labelled photographs that nothing was chosen on, dense top-1 "
        f"{first['baseline_top1']:.1%}.",
        "",
        "| FLOPs kept | blocks | method | images, draw | top-1 | change, 95 % interval | recovered | on disk |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(
        rows, key=lambda row: (-asked(row), row["block_shape"], row["method"], row["samples"], row["seed"])
    ):
        low, high = row["interval"]
        lines.append(
            f"| {row['flops_ratio']:.1%} | {row['block_shape']} | `{row['method']}` | "
            f"{row['samples']}, {row['seed']} | {row['top1']:.1%} | "
            f"{100 * row['delta']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}) | "
            f"{recovered(row)} | {row['size_bytes'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def moves_table(results: dict[str, Any]) -> str:
    """Top-1 and divergence by what leaves, beside what others publish, at equal FLOPs on the same images."""
    rows = frontier(results["rows"])
    budgets, first = sorted({share for points in rows.values() for share in points}, reverse=True), results["rows"][0]
    lines = [
        f"DeiT-Ti, top-1 on {first['num_images']} labelled photographs that nothing was chosen on (dense "
        f"{first['baseline_top1']:.1%}), {first['samples']} calibration images, one shot but where it says so; in "
        "brackets the change in points, its 95 % interval, then KL(dense \\|\\| pruned) on these photographs in nats.",
        "",
        f"| what leaves | {' | '.join(f'{budget:.0%}' for budget in budgets)} |",
        "|---|" + "---|" * len(budgets),
    ]
    for kind, points in rows.items():
        cells = [moves_cell(points[budget]) + nats(points[budget]) if budget in points else "-" for budget in budgets]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def nats(row: dict[str, Any]) -> str:
    """What a row says of the divergence on the evaluation images."""
    return f"; {row['evaluation_divergence']:.3f}" if "evaluation_divergence" in row else ""


def shrunk_table(results: dict[str, Any]) -> str:
    """Times as fast as the dense model at equal FLOPs, by runtime."""
    rows = results["rows"]
    kinds = [kind for kind in rows[0]["runtimes"]["torch"] if kind != "dense"]
    first = rows[0]
    lines = [
        f"{first['ratio']:.0%} of the FLOPs, float32, {first['threads']} threads, "
        f"{first['environment']['cpu']} ({first['environment']['cpu_capability']}); times as fast as the dense model "
        "in the same runtime, with quartiles.",
        "",
        f"| model | runtime | batch | dense | {' | '.join(kinds)} |",
        "|---|---|---|---|" + "---|" * len(kinds),
    ]
    for row in rows:
        for runtime, found in row["runtimes"].items():
            cells = [ratio_text(found[kind], "ratio_to_dense", "ratio_spread") for kind in kinds]
            dense = f"{found['dense']['ms']:.0f} ms"
            lines.append(f"| {row['arch']} | {runtime} | {row['batch']} | {dense} | {' | '.join(cells)} |")
    return "\n".join(lines)


def runtimes_table(results: dict[str, Any]) -> str:
    """Milliseconds of models in each runtime and dtype, and how often the quickest dense one in int8 goes into each."""
    rows = results["runtimes"]
    columns = [(row["arch"], row["batch"]) for row in rows]
    names = sorted({name for row in rows for name in row["ms"]}, key=runtime_order)
    lines = [
        "Milliseconds a batch (lower to upper quartile), then times as fast as OpenVINO's dense int8; runtimes and "
        f"models by turns, {rows[0]['threads']} threads, {results['environment']['cpu']}; blocks of "
        f"{'x'.join(map(str, rows[0]['block_shape']))}.",
        "",
        f"| runtime, dtype | {' | '.join(f'{arch}, batch {batch}' for arch, batch in columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for name in names:
        lines.append(f"| {name} | {' | '.join(runtime_cell(row['ms'], name) for row in rows)} |")
    return "\n".join(lines)


def runtime_order(name: str) -> tuple[int, str]:
    """Others' first, then ours by dtype."""
    return int(name.startswith("ours")), name


def runtime_cell(ms: dict[str, list[float]], name: str) -> str:
    if name not in ms:
        return "-"
    low, median, high = ms[name]
    other = ms.get("openvino int8")
    beside = "" if other is None else f", {other[1] / median:.2f}"
    return f"{median:.1f} ({low:.1f} to {high:.1f}){beside}"


def rounded_table(results: dict[str, Any]) -> str:
    """Top-1 of models as they are and in int8."""
    lines = [
        f"Top-1 on {results['rows'][0]['num_images']} photographs.",
        "",
        "| model | as it is | in int8 | change, 95 % interval | on disk |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        low, high = (100 * end for end in row["interval"])
        lines.append(
            f"| {row['model']} | {row['baseline_top1']:.1%} | {row['top1']:.1%} | {100 * row['delta']:+.1f} points "
            f"({low:+.1f} to {high:+.1f}) | {row['float_size_bytes'] / 1e6:.1f} -> {row['size_bytes'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def moves_cell(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['top1']:.1%} ({100 * low:+.1f} to {100 * high:+.1f})"


def recovered(row: dict[str, Any]) -> str:
    """Top-1 after recovery, with its interval."""
    after = row["recovered"]
    if after is None:
        return "-"
    low, high = after["interval"]
    return f"{after['top1']:.1%}, {100 * after['delta']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def ablation_table(results: dict[str, Any]) -> str:
    """What the predictions lose with each part switched off."""
    first = results["rows"][0]
    lines = [
        f"DeiT-Ti, {first['block_shape']} blocks, {float(first['budget'].partition('=')[2]):.0%} of the FLOPs, "
        f"{first['samples']} calibration images, no recovery; judged on {first['num_images']} calibration images that "
        "were not drawn.",
        "",
        "| variant | KL(dense \\|\\| pruned), nats | same class as the dense model |",
        "|---|---|---|",
    ]
    for row in sorted(results["rows"], key=lambda row: -row.get("divergence", float("inf"))):
        if "refused" in row:
            lines.append(f"| {row['variant']} | cannot meet the budget | - |")
            continue
        lines.append(
            f"| {row['variant']} | {row['divergence']:.3f} ± {row['standard_error']:.3f} | {row['agreement']:.1%} |"
        )
    return "\n".join(lines)


def scale_table(results: dict[str, Any]) -> str:
    """Time and memory of larger models."""
    stages = list(dict.fromkeys(stage for row in results["rows"] for stage in row["seconds"]))
    lines = [
        f"| model | images | {' | '.join(stages)} | all | peak memory |",
        "|---|---|" + "---|" * (len(stages) + 2),
    ]
    for row in results["rows"]:
        parts = " | ".join(f"{row['seconds'].get(stage, 0):.0f} s" for stage in stages)
        lines.append(
            f"| {row['arch']}, {row['block_shape']} | {row['images']} | {parts} | {row['all_seconds'] / 60:.1f} min | "
            f"{row['peak_memory_bytes'] / 1e9:.1f} GB |"
        )
    return "\n".join(lines)


def estimates_table(results: dict[str, Any]) -> str:
    """Time and memory of models that are larger than those measured."""
    return scale_table({"rows": results["estimates"]})


def systolic_table(results: dict[str, Any]) -> str:
    """The study of dedicated hardware."""
    lines = [
        f"DeiT-B, an array of {results['array']}x{results['array']} elements; computed, not measured.",
        "",
        "| | weights kept | Linears | with attention products |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['variant']} | {row['kept']:.1%} | {row['linear_speedup']:.2f} | {row['speedup']:.2f} |"
        for row in results["rows"]
    ]
    return "\n".join(lines)


def promise_table(results: dict[str, Any]) -> str:
    """Predicted beside measured latencies."""
    profile = results["calibration"][0]
    errors = [abs(row["sparse_error"]) for row in results["end_to_end"]]
    lines = [
        f"{machine(results)}. Linears not fitted to: {profile['held_out_error']:.1%} mean error, rank correlation "
        f"{profile['rank_correlation']:.3f}. Pruned models: {statistics.mean(errors):.1%} mean error, "
        f"{sum(error <= 0.1 for error in errors)} of {len(errors)} within 10 %.",
        "",
        "| model | batch | removed | dense, measured | predicted | pruned, measured | predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["end_to_end"]:
        cells = [
            f"{row[f'{name}_ms']:.1f} ms | {row[f'{name}_predicted_ms']:.1f} ms ({row[f'{name}_error']:+.0%})"
            for name in ("dense", "sparse")
        ]
        lines.append(f"| {row['arch']} | {row['batch']} | {row['sparsity']:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(results: dict[str, Any]) -> str:
    """The processor and what ran on it."""
    e = results["environment"]
    return f"{e['cpu']} ({e['cpu_capability']}), {e['threads']} threads, torch {e['versions']['torch']}"


def shape_text(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def kernels_table(results: dict[str, Any]) -> str:
    """How many times faster than a dense Linear, over the Linears of each architecture."""
    rows = results["kernels"]
    sparsities = sorted({row["sparsity"] for row in rows})
    lines = [
        "Times as fast as `F.linear`: the mean (lowest to highest) over q, fc1 and fc2 with 197 and 1576 "
        f"tokens. {machine(results)}.",
        "",
        f"| model | dtype | blocks | {' | '.join(f'{s:.0%} removed' for s in sparsities)} |",
        "|---|---|---|" + "---|" * len(sparsities),
    ]
    for kind in dict.fromkeys((row["dtype"], row["arch"], shape_text(row["block_shape"])) for row in rows):
        cells = []
        for sparsity in sparsities:
            ratios = [
                row["ratio_to_dense"]
                for row in rows
                if (row["dtype"], row["arch"], shape_text(row["block_shape"])) == kind and row["sparsity"] == sparsity
            ]
            cells.append(f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        dtype, arch, shape = kind
        lines.append(f"| {arch} | {dtype} | {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cases_table(results: dict[str, Any]) -> str:
    """Every case of the widest architecture, torch's own BSR beside."""
    lines = [
        f"Times as fast as `F.linear` with quartiles over rounds. {machine(results)}.",
        "",
        "| dtype | tokens | out x in | blocks | removed | dense | ratio | torch BSR |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["kernels"]:
        if row["arch"] != "deit-base":
            continue
        low, high = row["ratio_spread"]
        bsr = row.get("torch_bsr_ratio_to_dense")
        lines.append(
            f"| {row['dtype']} | {row['m']} | {row['n']}x{row['k']} | {shape_text(row['block_shape'])} | "
            f"{row['sparsity']:.0%} | {row['dense_ms']:.2f} ms | {row['ratio_to_dense']:.2f} ({low:.2f} to "
            f"{high:.2f}) | {'-' if bsr is None else f'{bsr:.2f}'} |"
        )
    return "\n".join(lines)


def end_to_end_table(results: dict[str, Any]) -> str:
    """Whole models."""
    others = {
        "onnxruntime_ms": "dense in onnxruntime",
        "openvino_ms": "in OpenVINO",
        "torch_bsr_ms": "pruned, torch BSR",
    }
    lines = [
        f"Milliseconds a batch, ratios with quartiles. {machine(results)}.",
        "",
        "| model | batch | blocks | removed | dense | pruned | ratio | ratio, both compiled | "
        f"{' | '.join(others.values())} |",
        "|---|---|---|---|---|---|---|---|" + "---|" * len(others),
    ]
    for row in results["end_to_end"]:
        more = " | ".join(f"{row[key]:.0f}" if key in row else "-" for key in others)
        lines.append(
            f"| {row['arch']} | {row['batch']} | {shape_text(row['block_shape'])} | {row['sparsity']:.0%} | "
            f"{row['dense_ms']:.1f} | {row['sparse_ms']:.1f} | {ratio_text(row, 'ratio_to_dense', 'ratio_spread')} | "
            f"{ratio_text(row, 'ratio_to_compiled', 'ratio_to_compiled_spread')} | {more} |"
        )
    return "\n".join(lines)


def small_table(results: dict[str, Any]) -> str:
    """What small models gain, where layers hold the form of their weights that is expected to be faster."""
    rows = results["end_to_end"]
    batches = sorted({row["batch"] for row in rows})
    found = {(row["arch"], shape_text(row["block_shape"]), row["sparsity"], row["batch"]): row for row in rows}
    lines = [
        f"Times as fast as the dense model, with quartiles. {machine(results)}; {rows[0]['kernels']} kernels.",
        "",
        f"| model | blocks | removed | unpacked layers | {' | '.join(f'batch {batch}' for batch in batches)} |",
        "|---|---|---|---|" + "---|" * len(batches),
    ]
    for arch, shape, sparsity in dict.fromkeys(key[:3] for key in found):
        cells = [ratio_text(found[arch, shape, sparsity, batch], "ratio_to_dense", "ratio_spread") for batch in batches]
        unpacked = found[arch, shape, sparsity, batches[0]]["unpacked"]
        lines.append(f"| {arch} | {shape} | {sparsity:.0%} | {unpacked} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio_text(row: dict[str, Any], key: str, spread: str) -> str:
    return f"{row[key]:.2f} ({row[spread][0]:.2f} to {row[spread][1]:.2f})" if key in row else "-"


def families_table(results: dict[str, Any]) -> str:
    """What works with which family of models."""
    families = results["families"]
    capabilities = list(dict.fromkeys(c for outcomes in families.values() for c in outcomes))
    versions = results["environment"]["versions"]
    lines = [
        f"torch {versions['torch']}, transformers {versions['transformers']}.",
        "",
        f"| family | {' | '.join(capabilities)} |",
        "|---|" + "---|" * len(capabilities),
    ]
    lines += [
        f"| {family} | {' | '.join(outcomes.get(c, 'not run') for c in capabilities)} |"
        for family, outcomes in families.items()
    ]
    return "\n".join(lines)


def versions_table(results: dict[str, Any]) -> str:
    """Which sets of versions the tests were run with, and what came of it."""
    sets = results["sets"]
    packages = list(dict.fromkeys(package for each in sets.values() for package in each["versions"]))
    lines = [
        f"| | {' | '.join(sets)} |",
        "|---|" + "---|" * len(sets),
    ]
    lines += [
        f"| {package} | {' | '.join(each['versions'].get(package, '-') for each in sets.values())} |"
        for package in packages
    ]
    lines += [
        f"| tests {which} | {' | '.join(str(each[which]) for each in sets.values())} |"
        for which in ("passed", "failed", "skipped")
    ]
    lines.append(f"| tests left out | {' | '.join(str(len(each['without'])) for each in sets.values())} |")
    lines.append(f"| on | {' | '.join(each['date'] for each in sets.values())} |")
    return "\n".join(lines)


TABLES = {
    "estimates": estimates_table,
    "accuracy": accuracy_table,
    "moves": moves_table,
    "shrunk": shrunk_table,
    "runtimes": runtimes_table,
    "rounded": rounded_table,
    "ablation": ablation_table,
    "ablation_moves": ablation_table,
    "scale": scale_table,
    "kernels": kernels_table,
    "cases": cases_table,
    "end_to_end": end_to_end_table,
    "small": small_table,
    "families": families_table,
    "systolic": systolic_table,
    "promise": promise_table,
    "versions": versions_table,
}
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{page}.md" for page in ("compatibility", "hardware", "kernels", "method", "scale")),
)


def fill(text: str) -> str:
    """Replace what stands between `<!-- name: path of a result file -->` and `<!-- /name -->`."""

    def table(match: re.Match[str]) -> str:
        results = json.loads((ROOT / match["file"]).read_text(encoding="utf-8"))
        return f"{match['start']}{TABLES[match['name']](results)}\n{match['end']}"

    pattern = r"(?P<start><!-- (?P<name>\w+): (?P<file>\S+) -->\n).*?(?P<end><!-- /(?P=name) -->)"
    return re.sub(pattern, table, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the pages, or fail where one is out of date."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        if filled == text:
            continue
        if "--check" in sys.argv:
            sys.exit(f"{page.name} is out of date; run python benchmarks/tables.py")
        page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
