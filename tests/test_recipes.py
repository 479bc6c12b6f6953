"""The recipes load, and one and two processes choose the same masks."""

import pytest
from safetensors.torch import load_file

from hf_blockprune.jobs import PruneJob

from .conftest import RECIPE, ROOT, launch

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_is_named_after_what_it_does(recipe):
    job = PruneJob.read(recipe)
    rows, cols = job.config.block_shape
    assert recipe.stem.endswith(f"{rows}x{cols}")
    assert job.config.budget.metric == "flops"
    assert job.model.startswith(("facebook/deit-", "google/vit-"))


@pytest.mark.slow
def test_two_processes_choose_the_masks_of_one(vit_folder, images, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {vit_folder}\ndataset: {images}\noutput: out\nblock_shape: [8, 8]\nmethod: taylor\n"
        "budget: {metric: flops, ratio: 0.6}\ncalibration: {samples: 21, batch_size: 4}\n"
    )
    for processes in (1, 2):
        output = tmp_path / f"out{processes}"
        arguments = ["--config", recipe, "--output", output, "--evaluate-on", images, "--quiet", "--json"]
        done = launch([RECIPE, *arguments], processes=processes)
        assert done.stdout.count('"flops_ratio"') == 1  # the main process alone reports
    one, two = (load_file(tmp_path / f"out{processes}/model.safetensors") for processes in (1, 2))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
