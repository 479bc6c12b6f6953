"""Tokens on the command line: how many merge in a model that is pruned, and pictures of those that did."""

import json

import pytest

from tests.commands import refused, run

QUICK = ["--block-shape", "16x16", "--budget", "flops=0.75", "--samples", "8", "--quiet"]


@pytest.mark.parametrize("text", ["some", "1,a", "-1,0", "", "1,,2", "1.5"])
def test_what_is_no_schedule_is_a_usage_error(text):
    result = run("prune", "model", "--tokens", text)
    assert result.exit_code == 2
    assert "expected auto, keep," in " ".join(result.stderr.replace("│", " ").split())


def test_numbers_are_patches_that_leave_each_layer(vit_folder, images, tmp_path):
    arguments = ["--dataset", images, "--tokens", "4, 2", "--output", tmp_path / "out", *QUICK]
    result = run("prune", vit_folder, *arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["config"]["tokens"] == [4, 2]
    assert report["tokens"]["leave"] == [4, 2]
    assert json.loads(run("inspect", tmp_path / "out", "--json").stdout)["tokens"] == {"leave": [4, 2], "patches": 16}
    assert "patches left after the last layer: 10 of 16" in run("inspect", tmp_path / "out").stdout
    shown = " ".join(run("prune", vit_folder, *arguments, "--overwrite").stdout.split())
    assert "patches left after the last layer │ 10 of 16" in shown


def test_an_option_overrides_the_recipe(vit_folder, images, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {vit_folder}\ndataset: {images}\noutput: {tmp_path / 'out'}\ntokens: [4, 2]\n")
    result = run("prune", "--config", recipe, "--tokens", "keep", *QUICK, "--json")
    report = json.loads(result.stdout)
    assert report["config"]["tokens"] == "keep"
    assert report["tokens"] is None


def test_numbers_of_another_model_are_one_line(vit_folder, images, tmp_path):
    arguments = ["--dataset", images, "--output", tmp_path / "out", *QUICK]
    assert "the model has 2 layers" in refused("prune", vit_folder, "--tokens", "1,2,3", *arguments)


def test_a_picture_of_what_merged(vit_folder, images, tmp_path):
    picture = images / "picture_000.png"
    arguments = ["tokens", vit_folder, picture, "--output", tmp_path / "out.png", "--quiet"]
    assert "--per-layer" in refused(*arguments)
    result = run(*arguments, "--leave", "4,2", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["tokens_after"] == [13, 11]
    assert values["output"] == str(tmp_path / "out.png")
    assert "exists already" in refused(*arguments, "--per-layer", "3")
    shown = run(*arguments, "--per-layer", "3", "--layer", "1", "--overwrite").stdout
    assert "17 tokens of an image of 32x32" in shown
    assert "drawn after layer 1: 13 groups of 16 patches" in shown


@pytest.mark.parametrize(
    "arguments", [["--leave", "1,x"], ["--per-layer", "0"], ["--leave", "1,1", "--per-layer", "1"]]
)
def test_a_picture_of_no_schedule_is_a_usage_error(arguments):
    assert run("tokens", "model", "picture.png", *arguments).exit_code == 2
