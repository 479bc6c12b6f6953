"""Benchmarks that cannot run here for real: every step of them, at sizes that mean nothing."""

import json

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton")
SUITE = ROOT / "benchmarks" / "gpu_suite.py"


@pytest.mark.slow
def test_gpu_suite_walks_through_every_step(forks, tmp_path):
    run = forks.run(SUITE, "--dry-run", "--output", tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads((tmp_path / "dry-run.json").read_text())
    assert {"environment", "correctness", "kernels", "end_to_end", "fit"} <= set(results)
    assert all(row["correct"] for row in results["correctness"])
    keys = {"arch", "op", "batch", "m", "k", "n", "block_shape", "sparsity", "dtype", "ratio_to_dense"}
    assert all(keys <= set(row) for row in results["kernels"] if "elsewhere" not in row["op"])
    assert all(keys | {"ratio_to_graph", "peak_memory_bytes"} <= set(row) for row in results["end_to_end"])
    assert any("energy_mj_per_image" in row and "ratio_to_compiled" in row for row in results["end_to_end"])
    assert results["fit"][0]["held_out_error"] is not None
    assert (tmp_path / "dry-run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--dry-run"], "--output"), (["--sections", "poetry"], "invalid choice")]
)
def test_gpu_suite_refuses_what_makes_no_sense(forks, arguments, message):
    run = forks.run(SUITE, *arguments)
    assert run.returncode == 2
    assert message in run.stderr
