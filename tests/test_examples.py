"""The example scripts run top to bottom."""

import subprocess
import sys

import pytest

from .conftest import ROOT

pytestmark = pytest.mark.slow


def example(name, *arguments):
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_prune_then_classify(vit_folder, images, tmp_path):
    said = example("prune.py", vit_folder, images, tmp_path / "out")
    assert "% of the FLOPs" in said
    answers = example("classify.py", tmp_path / "out", images / "picture_000.png").splitlines()
    assert len(answers) == 3
    assert all("class " in answer for answer in answers)


def test_compare_methods(vit_folder, images):
    lines = example("compare_methods.py", vit_folder, images, images).splitlines()
    assert [line.split()[0] for line in lines] == ["magnitude", "taylor"]
    assert all("on 24 images" in line for line in lines)
