"""Numbers in the README come from result files, and its Python is valid."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_tables_are_those_of_the_result_files():
    command = [sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link


def test_python_in_the_readme_names_only_what_exists():
    import hf_blockprune

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "hf_blockprune":
                assert all(hasattr(hf_blockprune, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pruner":
                assert hasattr(hf_blockprune.BlockPruner, node.attr)


@pytest.mark.parametrize("page", ["README.md", "docs/data.md", "docs/report.md"])
def test_command_lines_use_options_that_exist(page):
    from typer.main import get_command

    from hf_blockprune.cli import app

    text = (ROOT / page).read_text(encoding="utf-8")
    lines = re.findall(r"^ *blockprune (\w+) (.*)$", text, re.MULTILINE)
    assert lines
    for command, arguments in lines:
        known = {option for parameter in get_command(app).commands[command].params for option in parameter.opts}
        assert {word for word in arguments.split() if word.startswith("--")} <= known


def test_the_page_on_new_architectures_can_be_followed(forks, tmp_path):
    """In a process of its own, as it registers a family."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/new-architecture.md").read_text(), re.DOTALL))
    done = forks.run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    broken = code.replace('register_family("ijepa", Family())', "")
    assert broken != code
    done = forks.run("-c", broken, cwd=tmp_path)
    assert done.returncode != 0


def test_model_cards_are_those_of_the_result_file():
    command = [sys.executable, str(ROOT / "scripts/model_cards.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
