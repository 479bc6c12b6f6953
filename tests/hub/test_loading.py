"""The three ways a saved checkpoint loads, each in a process of its own.

With the package imported; without it, by the code beside the checkpoint; and without either, which must fail.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_blockprune import BlockPruneConfig, BlockPruner
from tests.conftest import WITHOUT_THE_PACKAGE, tiny_model
from tests.hub.saved_models import run

pytestmark = pytest.mark.slow

CHILD = """
import json, sys

source, folder, kwargs = json.loads(sys.argv[1])

import torch
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(source, **kwargs)
with torch.no_grad():
    logits = model(torch.load(f"{folder}/pixels.pt")).logits
sparse = {type(m).__module__ for m in model.modules() if type(m).__name__.endswith("BlockSparseLinear")}
torch.save({"logits": logits, "class": type(model).__name__, "sparse": sorted(sparse)}, f"{folder}/result.pt")
"""


class Loader:
    """Loads a source in a process of its own and hands back what the model there answered."""

    def __init__(self, folder, pixels):
        self.folder = folder
        torch.save(pixels, folder / "pixels.pt")

    def arguments(self, source, **kwargs):
        return json.dumps([str(source), str(self.folder), kwargs])

    def run(self, source, *, package=False, **kwargs):
        return run(CHILD, self.folder, self.arguments(source, **kwargs), package=package)

    def run_offline(self, source, home, **kwargs):
        """Where everything is imported anew, and no Hub may be asked: HF_HOME is all there is."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        env |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE + CHILD, self.arguments(source, **kwargs)]
        return subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True, timeout=120)

    def result(self, done):
        assert done.returncode == 0, done.stderr
        return torch.load(self.folder / "result.pt")


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def loader(tmp_path, pixels):
    return Loader(tmp_path, pixels)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, processor):
    """(folder, model) by family: a pruned model and where it was saved."""
    config = BlockPruneConfig(method="magnitude", block_shape=(16, 16), budget={"metric": "density", "ratio": 0.5})

    def save(family, *, int8=False):
        folder = tmp_path_factory.mktemp("saved") / f"tiny-{family}"
        pruner = BlockPruner(tiny_model(family), processor, config, name="tiny")
        pruner.prune()
        model = pruner.quantize() if int8 else pruner.model
        pruner.save_pretrained(folder)
        return folder, model

    return {**{family: save(family) for family in ("vit", "deit-distilled")}, "int8": save("vit", int8=True)}


def assert_same_answers(result, model, pixels):
    with torch.no_grad():
        torch.testing.assert_close(result["logits"], model(pixels).logits, rtol=1e-5, atol=1e-5)


def test_with_the_package_imported_no_flag_is_needed(loader, saved, pixels):
    folder, model = saved["vit"]
    result = loader.result(loader.run(folder, package=True))
    assert_same_answers(result, model, pixels)
    assert result["class"] == "ViTForImageClassification"
    assert result["sparse"] == ["hf_blockprune.hub.blockprune_linear"]


def test_with_the_package_and_the_checkpoints_own_code_both_present(loader, saved, pixels):
    folder, model = saved["vit"]
    result = loader.result(loader.run(folder, package=True, trust_remote_code=True))
    assert_same_answers(result, model, pixels)
    assert result["class"] == "BlockPruneViTForImageClassification"


def test_without_the_package_a_folder_loads_by_its_own_code(loader, saved, pixels):
    folder, model = saved["vit"]
    result = loader.result(loader.run_offline(folder, loader.folder / "home", trust_remote_code=True))
    assert_same_answers(result, model, pixels)
    assert result["class"] == "BlockPruneViTForImageClassification"
    assert [name.partition(".")[0] for name in result["sparse"]] == ["transformers_modules"]


@pytest.mark.parametrize("trust", [False, True])
def test_weights_in_int8_load_with_the_package(loader, saved, pixels, trust):
    folder, model = saved["int8"]
    result = loader.result(loader.run(folder, package=True, trust_remote_code=trust))
    assert_same_answers(result, model, pixels)
    if not trust:
        assert result["sparse"] == ["hf_blockprune.hub.blockprune_int8_linear"]


def test_weights_in_int8_load_by_the_code_beside_them(loader, saved, pixels):
    folder, model = saved["int8"]
    result = loader.result(loader.run_offline(folder, loader.folder / "home", trust_remote_code=True))
    assert [name.partition(".")[0] for name in result["sparse"]] == ["transformers_modules"]
    # Without compiled kernels: numbers that lie between two steps may go either way.
    with torch.no_grad():
        expected = model(pixels).logits
    torch.testing.assert_close(result["logits"], expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def client(online, saved):
    """Of a Hub with both models."""
    for family, (folder, _) in saved.items():
        online[0].add(f"someone/{family}", folder)
    return online[1]


def test_without_the_package_a_repository_loads_by_its_own_code(loader, online, client, saved, pixels):
    hub = online[0]
    arguments = loader.arguments("someone/deit-distilled", trust_remote_code=True)
    result = loader.result(client.start(WITHOUT_THE_PACKAGE + CHILD, arguments))
    assert_same_answers(result, saved["deit-distilled"][1], pixels)
    assert result["class"] == "BlockPruneDeiTForImageClassificationWithTeacher"
    assert [hub.commit("someone/deit-distilled") in name for name in result["sparse"]] == [True]
    asked = [request for request in hub.requests if request.startswith("GET") and "/deit-distilled/resolve/" in request]
    fetched = {Path(request).name for request in asked}
    assert {"config.json", "model.safetensors", "modeling_blockprune.py", "blockprune_quantizer.py"} <= fetched


def assert_refused_with_a_remedy(loader, done):
    assert done.returncode != 0
    assert not (loader.folder / "result.pt").exists()
    assert "`import hf_blockprune` before loading it, or pass trust_remote_code=True" in done.stderr.splitlines()[-1]


def test_without_the_package_and_without_trust_there_is_an_error_and_no_model(loader, saved):
    assert_refused_with_a_remedy(loader, loader.run(saved["vit"][0]))


def test_a_repository_gives_no_random_weights_either(loader, client):
    another_head = {"num_labels": 3, "ignore_mismatched_sizes": True}
    refused = client.start(WITHOUT_THE_PACKAGE + CHILD, loader.arguments("someone/vit", **another_head))
    assert_refused_with_a_remedy(loader, refused)
    arguments = loader.arguments("someone/vit", trust_remote_code=True)
    loader.result(client.start(WITHOUT_THE_PACKAGE + CHILD, arguments))
    (loader.folder / "result.pt").unlink()
    assert_refused_with_a_remedy(loader, loader.run_offline("someone/vit", client.home, **another_head))
