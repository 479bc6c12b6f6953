"""The built-in demonstration, as a user runs it."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_demo_prunes_and_loads_back(tmp_path):
    command = [sys.executable, "-m", "hf_blockprune.cli", "demo", "--output", str(tmp_path), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["num_images"] == 450
    assert result["dense"]["top1"] > 0.9
    assert result["pruned"]["top1"] > 0.8
    assert result["pruned"]["size_bytes"] < 0.8 * result["dense"]["size_bytes"]
    assert result["loaded_class"] == "ViTForImageClassification"
    assert (tmp_path / "pruned/model.safetensors").stat().st_size == result["pruned"]["size_bytes"]
