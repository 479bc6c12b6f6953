"""Profiles from measurements: what made the times is found, and this machine can be measured."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from hf_blockprune.cli import app
from hf_blockprune.cost.profiles import load_profile, save_profile
from hf_blockprune.errors import ConfigError
from hf_blockprune.hub.blockprune_backends import available_backends
from hf_blockprune.hub.blockprune_cost import Linear
from hf_blockprune.hub.blockprune_profiles import CpuProfile, GpuProfile
from hf_blockprune.measure.calibrate import Measurement, fit_profile, prediction_error, rank_correlation

SHAPES = [(n, k) for n in (192, 768, 1536) for k in (192, 768, 3072)]


def measurements(profile, dtype, tokens, *, noise=0.0):
    """Times that a profile itself would give, with some noise."""
    random = np.random.default_rng(0)
    found = []
    for m in tokens:
        for n, k in SHAPES:
            for rows, cols in ((64, 32), (16, 16)):
                for density in (0.2, 0.5, 0.8):
                    mask = random.random((n // rows, k // cols)) < density
                    work = Linear(m, n, k, dtype, mask, (rows, cols))
                    factor = np.exp(noise * random.normal(size=2))
                    dense, sparse = profile.dense(work).latency_ms, profile.sparse(work).latency_ms
                    found.append(Measurement(work, dense * factor[0], sparse * factor[1]))
    return found


CPU = CpuProfile(
    "made up",
    cores=2,
    ghz=3.0,
    flops_per_cycle=32,
    dense_efficiency=0.7,
    sparse_efficiency_32=0.6,
    sparse_efficiency_16=0.5,
    dense_call_us=7.0,
    sparse_call_us=30.0,
    input_gb_s=9.0,
    output_gb_s=14.0,
    weight_gb_s=30.0,
    dram_gb_s=1e6,
)
GPU = GpuProfile("made up", 100, {"bfloat16": 300}, 2000, 4000, 40, 400, 50, 0.65, 0.5, 0.8, 7.0)


def test_a_processors_rates_are_found():
    blank = CpuProfile("blank", cores=2, ghz=3.0, flops_per_cycle=32, dram_gb_s=1e6)
    fitted = fit_profile(blank, measurements(CPU, "float32", (64, 197, 788)))
    for key in ("dense_efficiency", "sparse_efficiency_32", "sparse_efficiency_16", "dense_call_us", "sparse_call_us"):
        assert getattr(fitted, key) == pytest.approx(getattr(CPU, key), rel=0.01), key
    for key in ("input_gb_s", "output_gb_s", "weight_gb_s"):
        assert getattr(fitted, key) == pytest.approx(getattr(CPU, key), rel=0.02), key
    assert fitted.held_out_error < 0.001


@pytest.mark.parametrize(("truth", "dtype", "tokens"), [(CPU, "float32", (197, 788)), (GPU, "bfloat16", (3152, 12608))])
def test_noise_is_averaged_out(truth, dtype, tokens):
    blank = (
        replace(truth, dense_efficiency=0.9, sparse_efficiency=0.9, launch_us=20.0)
        if truth is GPU
        else replace(CpuProfile("blank", cores=2, ghz=3.0, flops_per_cycle=32), dram_gb_s=1e6)
    )
    noisy, clean = measurements(truth, dtype, tokens, noise=0.08), measurements(truth, dtype, tokens)
    fitted = fit_profile(blank, noisy)
    assert prediction_error(fitted, clean) < 0.05 < prediction_error(blank, clean)
    assert 0.03 < fitted.held_out_error < 0.12  # an error that says what the noise leaves
    assert rank_correlation(fitted, noisy) > 0.97


def test_a_profile_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "mine.yaml"
    written = save_profile(replace(CPU, held_out_error=0.05), path)
    assert load_profile(path) == replace(CPU, held_out_error=0.05, source=written["source"])
    assert "measured by blockprune calibrate on" in written["source"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_profile_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        save_profile(CPU, tmp_path / "missing" / "mine.yaml")


def test_the_command_refuses_what_it_cannot_do(tmp_path):
    path = tmp_path / "there.yaml"
    path.write_text("mine")
    result = CliRunner().invoke(app, ["calibrate", "--output", str(path)])
    assert result.exit_code == 1
    assert "exists" in result.stderr
    assert path.read_text() == "mine"
    assert CliRunner().invoke(app, ["calibrate", "--device", "abacus", "--output", "x.yaml"]).exit_code == 2


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in available_backends(), reason="no compiled kernels here")
def test_this_machine_is_measured(tmp_path):
    path = tmp_path / "mine.yaml"
    result = CliRunner().invoke(app, ["calibrate", "--output", str(path), "--seconds", "1", "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["measurements"] >= 50
    assert yaml.safe_load(path.read_text())["held_out_error"] == values["held_out_error"]
    profile = load_profile(path)
    mask = np.eye(24, dtype=bool)
    work = Linear(197, 768, 768, "float32", mask, (32, 32))
    assert 0 < profile.sparse(work).latency_ms < profile.dense(work).latency_ms
