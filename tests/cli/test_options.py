"""Options: what commands share, the defaults and choices that help shows, and the commands that repair a model."""

import json
import typing

import pytest
import torch
from safetensors.torch import load_file
from typer.main import get_command

from hf_blockprune import BlockPruneConfig, BlockPruner, CalibrationConfig, FinetuneConfig, RecoveryConfig, __version__
from hf_blockprune.cli import app, checkpoints, options, pruning, training
from hf_blockprune.cost.profile_names import profile_names
from hf_blockprune.finetune.config import PRECISIONS
from hf_blockprune.hub.blockprune_systolic import DATAFLOWS
from hf_blockprune.jobs.sweep import KEEP
from hf_blockprune.score.methods import METHODS
from hf_blockprune.sources.named import LABELS_BY
from tests.commands import run

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
# Without these something is not done, or the recipe says it: there is nothing that holds instead.
NO_DEFAULT = {"config", "dataset", "dataset_config", "output", "evaluate_on", "teacher", "model_option"}


def options_of(command):
    return [parameter for parameter in COMMANDS[command].params if parameter.param_type_name == "option"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_holds_without_an_option(command):
    for option in options_of(command):
        said = option.default is not None or option.required or isinstance(option.show_default, str)
        assert said or option.name in NO_DEFAULT, option.name


@pytest.mark.parametrize(
    ("shown", "config"),
    [
        ({"samples": "samples", "batch_size": "batch_size", "seed": "seed"}, CalibrationConfig()),
        ({"method": "method"}, BlockPruneConfig()),
    ],
)
def test_defaults_in_help_are_those_of_the_settings(shown, config):
    said = {option.name: option.show_default for option in options_of("prune")}
    assert {key: said[key] for key in shown} == {key: str(getattr(config, key)) for key in shown}


@pytest.mark.parametrize(
    ("command", "config"), [("recover", RecoveryConfig()), ("finetune", FinetuneConfig())], ids=lambda v: str(v)[:8]
)
def test_defaults_of_training_in_help_are_those_of_the_settings(command, config):
    said = {option.name: option.show_default for option in options_of(command)}
    for key in ("epochs", "lr", "batch_size"):
        assert said[key] == str(getattr(config, key))


def literals(hint):
    """Values of the Literal in an annotation."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return next((found for part in typing.get_args(hint) if (found := literals(part))), ())


@pytest.mark.parametrize(
    ("command", "option", "choices"),
    [
        (pruning.prune, "method", METHODS),
        (pruning.prune, "labels_by", LABELS_BY),
        (pruning.sweep, "keep", KEEP),
        (training.finetune, "precision", PRECISIONS),
        (checkpoints.simulate, "dataflow", DATAFLOWS),
    ],
)
def test_choices_are_those_of_the_settings(command, option, choices):
    assert set(literals(command.__annotations__[option])) == set(choices)


def test_devices_are_completed():
    assert options.complete_profile("") == profile_names()
    assert options.complete_profile("cpu-") == ["cpu-avx2", "cpu-avx512"]


def test_a_wrong_choice_is_refused_with_the_choices():
    result = run("prune", "model", "--method", "hessian")
    assert result.exit_code == 2
    assert all(method in result.stderr for method in METHODS)


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, __version__)


def test_a_model_is_named_once():
    result = run("prune", "one", "--model", "two")
    assert result.exit_code == 2
    assert "--model" in result.stderr


@pytest.fixture(scope="module")
def pruned(vit_folder, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("options") / "pruned"
    quick = ["--block-shape", "16x16", "--budget", "flops=0.8", "--method", "magnitude"]
    result = run("prune", vit_folder, "--dataset", images, "--output", folder, *quick, "--quiet")
    assert result.exit_code == 0, result.output
    return folder


def test_recover_is_what_the_api_does(vit_folder, images, pruned, tmp_path):
    settings = {"samples": 20, "epochs": 1, "batch_size": 8}
    arguments = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", value)]
    named = ["--teacher", vit_folder, "--dataset", images, "--evaluate-on", images, "--seed", 3]
    result = run("recover", pruned, *named, *arguments, "--output", tmp_path / "recovered", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["recovery"]["settings"].items() >= settings.items()
    assert report["evaluation"]["num_images"] == 24

    pruner = BlockPruner.from_pretrained(pruned)
    pruner.config = pruner.config.replace(recovery=settings, calibration={"seed": 3})
    pruner.recover(images, teacher=vit_folder)
    pruner.save_pretrained(tmp_path / "api")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("recovered", "api"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_recover_takes_images_teacher_and_settings_of_the_recipe(vit_folder, images, pruned, tmp_path):
    recipe = {"model": str(vit_folder), "dataset": str(images), "output": str(tmp_path / "another")}
    recipe["recovery"] = {"samples": 20, "epochs": 1, "batch_size": 8, "lr": 1e-4}  # type: ignore[assignment]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    arguments = ["--config", tmp_path / "recipe.json", "--output", tmp_path / "out", "--lr", "0.0002"]
    result = run("recover", pruned, *arguments, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)["recovery"]["settings"]
    assert settings.items() >= {"samples": 20, "epochs": 1, "lr": 0.0002}.items()
    assert not (tmp_path / "another").exists()


@pytest.mark.parametrize("missing", ["teacher", "dataset", "output"])
def test_recover_says_what_is_missing(missing, vit_folder, images, pruned, tmp_path):
    named = {"teacher": vit_folder, "dataset": images, "output": tmp_path / "out"}
    arguments = [word for key, value in named.items() if key != missing for word in (f"--{key}", value)]
    result = run("recover", pruned, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {missing}: name one on the command line")


def test_finetune_trains_in_one_command(vit_folder, images, pruned, tmp_path):
    arguments = ["--teacher", vit_folder, "--dataset", images, "--epochs", 1, "--batch-size", 8, "--micro-batch", 4]
    result = run("finetune", pruned, *arguments, "--output", tmp_path / "trained", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["finetuning"]["settings"]["epochs"] == 1
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "trained"))
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_warm_up_is_five_epochs_and_at_most_a_sixth_of_all():
    assert FinetuneConfig(epochs=300).warmup == 5
    assert FinetuneConfig(epochs=3).warmup == 0.5
    assert FinetuneConfig(epochs=3, warmup_epochs=1).warmup == 1
    assert training.DEFAULTS.warmup == 5
