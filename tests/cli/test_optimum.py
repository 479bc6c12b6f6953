"""`optimum-cli blockprune` is `blockprune`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_blockprune import BlockPruneConfig, BlockPruner
from tests.conftest import ROOT, tiny_model

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


def run(*command, **environment):
    """A program as it is installed."""
    arguments = [BIN / command[0], *map(str, command[1:])]
    env = {**os.environ, **environment}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=env)


def test_it_does_and_says_what_blockprune_does(processor, tmp_path):
    config = BlockPruneConfig(method="magnitude", block_shape=(8, 8), budget={"metric": "flops", "ratio": 0.5})
    pruner = BlockPruner(tiny_model(), processor, config)
    pruner.prune()
    pruner.save_pretrained(tmp_path / "pruned")
    ours, theirs = (run(*command, "inspect", tmp_path / "pruned", "--json") for command in COMMANDS)
    assert ours.returncode == theirs.returncode == 0, theirs.stderr
    assert theirs.stdout == ours.stdout


COMMANDS = (["blockprune"], ["optimum-cli", "blockprune"])


@pytest.mark.parametrize(("arguments", "code"), [(["inspect", "/no/such/folder"], 1), (["prune", "--no-such"], 2)])
def test_errors_end_it_alike(forks, arguments, code):
    ours = forks.run("-m", "hf_blockprune.cli", *arguments)
    theirs = run("optimum-cli", "blockprune", *arguments)
    assert ours.returncode == theirs.returncode == code
    assert theirs.stderr.splitlines()[-1] == ours.stderr.splitlines()[-1]


def test_help_lists_every_command():
    commands = ("prune", "evaluate", "inspect", "benchmark", "export", "push", "simulate")
    shown = run("optimum-cli", "blockprune", "--help").stdout
    assert all(f" {name} " in shown for name in commands)
    assert "--block-shape" in run("optimum-cli", "blockprune", "prune", "--help").stdout


def test_a_second_copy_on_the_path_does_no_harm(tmp_path):
    shutil.copytree(ROOT / "optimum", tmp_path / "optimum")
    done = run("optimum-cli", "blockprune", "--help", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "prune" in done.stdout
