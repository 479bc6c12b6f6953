"""The lower bounds that the package declares are the versions it was tested with."""

import json
import re

import pytest
from packaging.version import Version

from benchmarks.tables import versions_table
from scripts.test_versions import MATRIX, count, read_matrix, write
from tests.conftest import ROOT

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_fine" />
<testcase classname="tests.test_a" name="test_wrong[1]"><failure message="no" /></testcase>
<testcase classname="tests.test_a" name="test_wrong[1]"><error message="nor its teardown" /></testcase>
<testcase classname="tests.test_a" name="test_not_here"><skipped message="no GPU" /></testcase>
</testsuite></testsuites>"""


def pins(name):
    """Version by package of a set, for those that have one."""
    return dict(each.split("==") for each in read_matrix(MATRIX)[name].requirements if "==" in each)


def declared():
    """Lower bound by package in pyproject.toml; read as text, for Python 3.10 has no reader of TOML."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed[1]))


def test_the_oldest_set_is_the_declared_lower_bounds():
    bounds = declared()
    assert {"torch", "transformers", "numpy"} <= set(bounds)
    oldest = {name: Version(version) for name, version in pins("oldest").items()}
    assert {name: oldest.get(name) for name in bounds} == {name: Version(bound) for name, bound in bounds.items()}


@pytest.mark.parametrize("name", list(read_matrix(MATRIX)))
def test_the_results_are_of_these_sets_and_nothing_failed(name):
    found = json.loads((ROOT / "benchmarks/results/versions.json").read_text(encoding="utf-8"))["sets"][name]
    assert found["failed"] == 0
    assert found["passed"] > 0
    assert found["without"] == read_matrix(MATRIX)[name].without
    installed = {package: Version(version) for package, version in found["versions"].items()}
    for package, pin in pins(name).items():
        if package in installed:
            assert installed[package].public == pin, package


def test_tests_are_counted_once_each(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    assert count(tmp_path / "report.xml") == {
        "passed": 1,
        "failed": 1,
        "skipped": 1,
        "failures": ["tests.test_a.test_wrong[1]"],
    }


def test_a_set_tested_alone_leaves_what_is_known_of_the_others(tmp_path):
    def found(passed):
        return {
            "date": "2030-01-01",
            "versions": {"torch": "3.0"},
            "passed": passed,
            "failed": 0,
            "skipped": 0,
            "without": [],
        }

    path = tmp_path / "versions.json"
    write(path, {"newest": found(5)}, order=["oldest", "newest"])
    write(path, {"oldest": found(4)}, order=["oldest", "newest"])
    write(path, {"newest": found(6)}, order=["oldest", "newest"])
    assert [file.name for file in tmp_path.iterdir()] == ["versions.json"]
    table = versions_table(json.loads(path.read_text())).splitlines()
    assert table[0] == "| | oldest | newest |"
    assert "| tests passed | 4 | 6 |" in table
