"""The recipes load, and one and two processes choose the same masks."""

import dataclasses
import re
import runpy

import pytest
import typer
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from typer.main import get_command

from hf_blockprune import AugmentConfig, DistillationConfig, FinetuneConfig, GradualConfig
from hf_blockprune.jobs.finetune import FinetuneJob
from hf_blockprune.jobs.prune import PruneJob
from tests.conftest import RECIPE, ROOT, accelerate_launch

TRAINING = sorted((ROOT / "recipes").glob("finetune-*.yaml"))
RECIPES = sorted(set((ROOT / "recipes").glob("*.yaml")) - set(TRAINING))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_is_named_after_what_it_does(recipe):
    job = PruneJob.read(recipe)
    rows, cols = job.config.block_shape
    assert recipe.stem.endswith(f"{rows}x{cols}")
    assert job.config.budget.metric == "flops"
    assert job.model.startswith(("facebook/deit-", "google/vit-", "microsoft/swin-"))


@pytest.mark.parametrize("recipe", TRAINING, ids=lambda path: path.stem)
def test_training_recipe_takes_what_a_pruning_recipe_gives(recipe):
    job = FinetuneJob.read(recipe)
    name, _, kept = recipe.stem.removeprefix("finetune-").partition("-flops")
    pruning = PruneJob.read(ROOT / f"recipes/{name}.yaml")
    assert job.model == (pruning.output if not kept else f"{name}-flops{kept}")
    assert job.config.lr == pytest.approx(5e-4 * job.config.batch_size / 512)
    assert job.teacher == (pruning.model if job.config.distillation.needs_teacher else None)
    assert f"| `{recipe.stem}` | {job.config.batch_size} |" in (ROOT / "recipes/README.md").read_text()


@pytest.mark.parametrize(("name", "processes"), [("two-nodes", 16), ("fsdp2", 8)])
def test_settings_for_accelerate_are_ones_that_it_reads(name, processes):
    settings = load_config_from_file(str(ROOT / f"recipes/accelerate/{name}.yaml"))
    assert settings.num_processes == processes
    assert settings.to_dict().get("fsdp_config", {}).get("fsdp_version") == (2 if name == "fsdp2" else None)


@pytest.mark.slow
def test_two_processes_choose_the_masks_of_one(launch, small_folder, images, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {small_folder}\ndataset: {images}\noutput: out\nblock_shape: [8, 8]\nmethod: taylor\n"
        "budget: {metric: flops, ratio: 0.6}\ncalibration: {samples: 21, batch_size: 4}\n"
    )
    for processes in (1, 2):
        output = tmp_path / f"out{processes}"
        arguments = ["--config", recipe, "--output", output, "--evaluate-on", images, "--quiet", "--json"]
        start = accelerate_launch if processes > 1 else launch
        done = start([RECIPE, *arguments], processes=processes)
        assert done.stdout.count('"flops_ratio"') == 1  # the main process alone reports
    one, two = (load_file(tmp_path / f"out{processes}/model.safetensors") for processes in (1, 2))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)


def test_the_page_on_training_names_every_setting_and_options_that_exist():
    text = (ROOT / "docs/finetune.md").read_text()
    configs = (FinetuneConfig, DistillationConfig, AugmentConfig, GradualConfig)
    settings = {field.name for config in configs for field in dataclasses.fields(config)}
    # Those of pruning while training that it shares with pruning are described there.
    described = {"format_version", "min_kept_per_layer", "damping", "targets", "ignore"}
    assert {name for name in settings - described if not re.search(rf"\b{name}\b", text)} == set()
    recipe = typer.Typer()
    recipe.command()(runpy.run_path(str(ROOT / "recipes/finetune.py"))["finetune"])
    known = {option for parameter in get_command(recipe).params for option in parameter.opts}
    commands = re.findall(r"recipes/finetune\.py((?:.|\\\n)*)", text)
    assert len(commands) > 1
    assert {option for command in commands for option in re.findall(r"--[a-z-]+", command)} <= known
