"""The table of families comes from what really passed."""

import json
import subprocess
import sys

from tests.conftest import ROOT

TESTS = """
import pytest

@pytest.mark.parametrize("family", ["vit", "deit-distilled"])
def test_load_without_the_package(family):
    assert family == "vit"

@pytest.mark.parametrize("family", ["vit"])
def test_onnx(family):
    pytest.skip()

def test_of_no_family():
    pass
"""


def test_outcomes_are_read_from_a_run(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, ROOT / "scripts/compatibility.py", "--tests", tmp_path / "test_some.py"]
    subprocess.run([*command, "--output", tmp_path / "out.json"], check=True, capture_output=True)
    assert json.loads((tmp_path / "out.json").read_text())["families"] == {
        "vit": {"load without the package": "works", "onnx": "not run"},
        "deit-distilled": {"load without the package": "fails"},
    }
