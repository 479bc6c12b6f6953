"""Tables show every name and figure, in files and on terminals too narrow for them."""

import json
import os
import re

import pytest

from hf_blockprune import BlockPruneConfig, BlockPruner
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.checkpoint.simulation import simulate_checkpoint
from tests.conftest import tiny_model
from tests.forking import plain_forks
from tests.terminals import terminal

PRINT = """
import json, sys
from hf_blockprune.report import tables
from hf_blockprune.display.console import table_console
for name, arguments in json.load(open(sys.argv[1])):
    table_console().print(getattr(tables, name)(*arguments))
"""
MODEL = "someone/deit-with-quite-a-long-name-patch16-224-[bold]"
EVALUATION = {
    **{"num_images": 50_000, "top1": 0.71236, "top5": 0.90128, "baseline_top1": 0.7213, "delta": -0.00894},
    **{"interval": [-0.0112, -0.0067], "flipped_to_wrong": 1234, "flipped_to_right": 787},
}
LATENCIES = {
    **{"device": "AMD EPYC 7763 64-Core Processor", "dtype": "float32", "environment": {"threads": 64}},
    "backends": {"cpu": 61, "dense": 11},
    "rows": [
        {"batch": b, "dense_latency_ms": 1234.5 * b, "latency_ms": 678.9 * b, "throughput_img_s": 1472.9}
        | {"speedup": 1.818, "speedup_quartiles": [1.801, 1.835]}
        for b in (1, 128)
    ],
}
SWEEP = {
    "model": MODEL,
    "dense": {"top1": 0.7213, "num_images": 50_000},
    "points": [
        {"name": "obs-32x32-latency-0.6-cpu-avx512", "status": "done", "flops_ratio": 0.6123, "frontier": True}
        | {"evaluation": EVALUATION, "wall_seconds": 12345.6},
        {"name": "taylor-32x32-latency-0.6-cpu-avx512", "status": "failed"},
    ],
}


@pytest.fixture(scope="module")
def printed(processor, tmp_path_factory):
    """A file with the tables to print: (function, arguments) of each."""
    folder = tmp_path_factory.mktemp("console")
    config = BlockPruneConfig(method="magnitude", block_shape=(8, 8), budget={"metric": "flops", "ratio": 0.8})
    pruner = BlockPruner(tiny_model(), processor, config)
    pruner.prune()
    pruner.save_pretrained(folder / "pruned")
    report = {**pruner.report(), "base_model": MODEL, "output": str(folder / "pruned"), "evaluation": None}
    tables = [
        ("inspect_table", [inspect_checkpoint(folder / "pruned")]),
        ("simulation_table", [simulate_checkpoint(folder / "pruned", "systolic-32")]),
        ("summary_table", [report]),
        ("layer_table", [report]),
        ("latency_table", [LATENCIES]),
        ("evaluation_table", [EVALUATION]),
        ("sweep_table", [SWEEP]),
        ("fidelity_table", [{"num_images": 8, "cosine": 0.98765, "least_cosine": 0.9, "relative_squared_error": 0.1}]),
        ("plain_table", ["report", {"output": str(folder / "report.html"), "size bytes": 1234567, "models": 12}]),
        ("environment_table", [{"cpu": LATENCIES["device"], "versions": {"torch": "2.13.0+cpu", "triton": None}}]),
    ]
    (folder / "tables.json").write_text(json.dumps(tables))
    return folder / "tables.json"


def environment(**changes):
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "FORCE_COLOR")}
    return {**kept, "TERM": "xterm", **changes}


def piped(file, **changes):
    """What a process that prints the tables gives to a file."""
    done = plain_forks().run("-c", PRINT, file, env=environment(**changes))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(printed):
    """What a file gets."""
    return piped(printed)


def on_terminal(file, columns):
    """What it shows on a terminal so many columns wide."""
    with terminal(columns) as (name, written):
        process = plain_forks().start("-c", PRINT, file, env=environment(), stdout=name)
        status = process.wait()
    assert status == 0, process.stderr.read_text()
    shown = b"".join(written)
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).replace("\r\n", "\n")


def columns_of(shown):
    """The text of each column of each table, and what stands above and below it, without any spaces."""
    found, width = [], 0
    for line in shown.splitlines():
        cells = [re.sub(r"\s", "", cell) for cell in re.split(r"[│┃]", line)]
        if re.match(r"\s*[┏┡┌├└]", line):
            continue
        if len(cells) != width:
            found.append([""] * len(cells))
            width = len(cells)
        found[-1] = [a + b for a, b in zip(found[-1], cells, strict=True)]
    return found


def test_a_file_gets_a_line_for_every_row(printed, whole):
    assert "…" not in whole
    lines = whole.splitlines()
    values = dict(json.loads(printed.read_text()))
    for layer in values["inspect_table"][0]["layers"]:
        figures = (layer["module"], f"{layer['kept_blocks']}/{layer['blocks']}", f"{layer['size_bytes']:,}")
        assert any(all(figure in line for figure in (*figures, layer["cpu_backend"])) for line in lines)
    assert any(f"{MODEL} -> {printed.parent / 'pruned'}" in line for line in lines)
    assert any(f"{MODEL}, dense top-1 72.1% of 50000 images" in line for line in lines)
    assert any("-0.9 (-1.1 to -0.7)" in line and "12346" in line for line in lines)
    assert any("layers by backend: 61 cpu, 11 dense" in line for line in lines)
    assert any(f"{values['simulation_table'][0]['cycles']:,}" in line for line in lines)


@pytest.mark.parametrize("columns", [80, 40])
def test_a_narrow_terminal_shows_all_that_a_wide_one_does(printed, whole, columns):
    shown = on_terminal(printed, columns)
    assert max(map(len, shown.splitlines())) <= columns
    assert columns_of(shown) == columns_of(whole)


def test_who_sets_the_width_gets_it_in_a_file_too(printed, whole):
    shown = piped(printed, COLUMNS="60")
    assert max(map(len, shown.splitlines())) <= 60
    assert columns_of(shown) == columns_of(whole)
