"""Wheels, with a compiler and without one."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

LIBRARY = "hf_blockprune/_cpu/libblockprune_cpu.so"
PLUGIN = "optimum/commands/register/register_blockprune.py"
NEEDED = ("hf_blockprune", "optimum", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def build_wheel(tmp_path: Path, **environment: str) -> Path:
    """A wheel built from a copy of the sources, without what was built before."""
    source = tmp_path / "source"
    source.mkdir()
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    return next(tmp_path.glob("*.whl"))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="no g++ for Linux here")
def test_one_wheel_for_all_versions_of_python(tmp_path):
    wheel = build_wheel(tmp_path)
    assert "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert LIBRARY in names
    assert {name for name in names if name.endswith(".so")} == {LIBRARY}
    assert [name for name in names if name.startswith("optimum/")] == [PLUGIN]
    assert_optimum_finds_the_plugin(wheel, tmp_path / "installed")


def assert_optimum_finds_the_plugin(wheel: Path, folder: Path) -> None:
    """With the wheel's files alone: without site's start-up, this checkout is not on the path."""
    zipfile.ZipFile(wheel).extractall(folder)
    script = f"""
import sys
sys.path[:0] = [{str(folder)!r}]
sys.path += {[path for path in sys.path if path.endswith("site-packages")]}
sys.argv = ["optimum-cli", "blockprune", "prune", "--no-such"]
from optimum.commands.optimum_cli import main
main()
"""
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "optimum-cli blockprune prune" in done.stderr


@pytest.mark.slow
def test_without_a_compiler_the_package_builds_without_kernels(tmp_path):
    wheel = build_wheel(tmp_path, CC="/bin/false", CXX="/bin/false")
    names = zipfile.ZipFile(wheel).namelist()
    package = ROOT / "hf_blockprune"
    wanted = [path for kind in ("*.py", "*.j2", "*.md", "*.txt", "py.typed") for path in package.rglob(kind)]
    assert {str(path.relative_to(ROOT)) for path in wanted} <= {*names}
    assert LIBRARY not in names


def test_without_kernels_the_package_says_so_once_and_runs(tmp_path):
    """In a copy of the package that was never built."""
    shutil.copytree(ROOT / "hf_blockprune", tmp_path / "hf_blockprune", ignore=shutil.ignore_patterns("*.so"))
    script = """
import logging, torch
logging.basicConfig(level=logging.INFO)
import hf_blockprune
from hf_blockprune.hub.blockprune_backends import available_backends
layer = hf_blockprune.BlockSparseLinear.from_dense(torch.nn.Linear(32, 32), torch.eye(2).bool(), (16, 16))
with torch.no_grad():
    x = torch.ones(3, 32)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
print("cpu" in available_backends())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
    assert done.stderr.count("no compiled kernels") == 1
