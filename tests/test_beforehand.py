"""What is wrong with a job is said before its work: here the weights are missing, which would be seen next."""

import shutil

import pytest
from typer.testing import CliRunner

from hf_blockprune.cli import app

from .conftest import write_images


@pytest.fixture(scope="module")
def weightless(vit_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weightless") / "model"
    shutil.copytree(vit_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("unlabelled") / "images", 3, labels=False)


def line_of(*arguments):
    """The one line of a command that ends with exit code 1."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    return line


def job(command, weightless, images, tmp_path, **changes):
    """Arguments of a command that would work, if the model had weights."""
    named = {"dataset": images, "evaluate-on": images, "output": tmp_path / "out"}
    if command in ("recover", "finetune"):
        named["teacher"] = weightless
    if command == "sweep":
        named["budgets"] = "0.9"
    named |= changes
    return [command, weightless, "--quiet", *(word for key, value in named.items() for word in (f"--{key}", value))]


COMMANDS = ["prune", "recover", "finetune", "sweep"]


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_weights_are_what_comes_next(command, weightless, images, tmp_path):
    assert "weights" in line_of(*job(command, weightless, images, tmp_path)) or "model.safetensors" in line_of(
        *job(command, weightless, images, tmp_path)
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_labelled_images(command, weightless, images, unlabelled, tmp_path):
    changed = job(command, weightless, images, tmp_path, **{"evaluate-on": unlabelled})
    assert "has no labels, so accuracy cannot be measured" in line_of(*changed)
    changed = job(command, weightless, images, tmp_path, **{"evaluate-on": tmp_path / "nowhere"})
    assert str(tmp_path / "nowhere") in line_of(*changed)


@pytest.mark.parametrize("command", COMMANDS)
def test_output(command, weightless, images, tmp_path):
    (tmp_path / "file").write_text("")
    line = line_of(*job(command, weightless, images, tmp_path, output=tmp_path / "file"))
    assert "is a file; name a folder" in line


@pytest.mark.parametrize("command", ["prune", "recover", "finetune"])
def test_output_that_cannot_be_made(command, weightless, images, tmp_path):
    (tmp_path / "file").write_text("")
    line = line_of(*job(command, weightless, images, tmp_path, output=tmp_path / "file/out"))
    assert "cannot be written" in line


@pytest.mark.parametrize(
    ("command", "option", "value"), [("prune", "budget", "latency=0.5@abacus"), ("sweep", "budgets", "energy=1@abacus")]
)
def test_devices(command, option, value, weightless, images, tmp_path):
    assert "no profile 'abacus'" in line_of(*job(command, weightless, images, tmp_path, **{option: value}))


@pytest.mark.parametrize("command", COMMANDS)
def test_backend(command, weightless, images, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", "abacus")
    assert "abacus" in line_of(*job(command, weightless, images, tmp_path))


@pytest.mark.parametrize("command", ["recover", "finetune"])
def test_teacher(command, weightless, images, tmp_path):
    line = line_of(*job(command, weightless, images, tmp_path, teacher=tmp_path / "nobody"))
    assert str(tmp_path / "nobody") in line


@pytest.mark.parametrize("setting", ["--epochs 1 --warmup-epochs 5", "--lr 1e-9"])
def test_settings_of_training(setting, weightless, images, tmp_path):
    line = line_of(*job("finetune", weightless, images, tmp_path), *setting.split())
    assert "epochs; lower it" in line or "is the peak" in line
