"""An interrupted run goes on with the layer it was at, and ends with the same weights."""

import json
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from hf_blockprune import BlockPruneConfig, BlockPruner, CheckpointError
from hf_blockprune.calibration.collect import collect
from hf_blockprune.runs.resume import weights_fingerprint
from tests.conftest import tiny_model

CONFIG = BlockPruneConfig(block_shape=(8, 8), budget={"metric": "flops", "ratio": 0.6}, calibration={"samples": 20})


def pruner_of(processor, config=CONFIG, **changes):
    return BlockPruner(tiny_model(num_hidden_layers=3, **changes), processor, config)


@pytest.fixture(scope="module")
def once(processor, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("once") / "work"
    pruner = pruner_of(processor)
    model = pruner.prune(images, work_dir=folder)
    return pruner, model.state_dict(), folder


@pytest.fixture
def finished(once, tmp_path):
    """(pruner of an uninterrupted run, its weights, a folder with its parts)."""
    return *once[:2], shutil.copytree(once[2], tmp_path / "work")


def test_a_work_dir_changes_nothing(processor, images, finished):
    plain = pruner_of(processor).prune(images).state_dict()
    assert plain.keys() == finished[1].keys()
    assert all(torch.equal(value, finished[1][name]) for name, value in plain.items())


@pytest.mark.parametrize("left", [[], ["layer-0"], ["layer-0", "layer-1"], ["layer-0", "layer-1", "layer-2"]])
def test_a_run_goes_on_from_any_layer_with_the_same_result(processor, images, finished, left, monkeypatch):
    first, expected, folder = finished
    for path in folder.iterdir():
        if path.stem not in ["selection", *left]:
            path.unlink()

    def never(*_, **__):
        raise AssertionError("the images ran through calibration again")

    monkeypatch.setattr("hf_blockprune.pruner.pruning.collect", never)
    pruner = pruner_of(processor)
    got = pruner.prune(images, work_dir=folder).state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in got.items())
    for layer, before in zip(pruner.report()["layers"], first.report()["layers"], strict=True):
        assert {**layer, "seconds": 0} == {**before, "seconds": 0}
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"layer-{i}.safetensors" for i in range(3)),
        "selection.safetensors",
    ]


def test_a_choice_of_tokens_is_kept(processor, images, tmp_path, monkeypatch):
    config = CONFIG.replace(tokens="auto")
    whole = pruner_of(processor, config)
    expected = whole.prune(images).state_dict()

    def interrupted(*args, state, **options):
        if state is not None:  # a trial keeps nothing
            raise KeyboardInterrupt
        return collect(*args, state=state, **options)

    with monkeypatch.context() as patch:
        patch.setattr("hf_blockprune.pruner.pruning.collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pruner_of(processor, config).prune(images, work_dir=tmp_path)
    assert [path.stem for path in tmp_path.glob("*.safetensors")] == ["tokens"]

    def never(*_, **__):
        raise AssertionError("schedules were looked for again")

    monkeypatch.setattr("hf_blockprune.pruner.tokens.TokenChoice.choose", never)
    pruner = pruner_of(processor, config)
    got = pruner.prune(images, work_dir=tmp_path).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in got.items())
    assert pruner.report()["tokens"] == whole.report()["tokens"]
    assert not (tmp_path / "tokens.safetensors").exists()


@pytest.mark.parametrize("other", ["weights", "config", "images"])
def test_the_state_of_another_run_is_refused(processor, images, finished, tmp_path, other):
    pruner = {
        "weights": pruner_of(processor, seed=1),
        "config": pruner_of(processor, CONFIG.replace(damping=0.02)),
        "images": pruner_of(processor),
    }[other]
    if other == "images":
        images = shutil.copytree(images, tmp_path / "others")
    with pytest.raises(CheckpointError, match="holds the state of a run with another model, data set or settings"):
        pruner.prune(images, work_dir=finished[2])


def test_damaged_state_is_refused(processor, images, finished):
    part = finished[2] / "layer-1.safetensors"
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"layer-1\.safetensors: is damaged .*start again with --restart"):
        pruner_of(processor).prune(images, work_dir=finished[2])


def test_recovery_settings_may_change_between_runs(processor, images, finished):
    again = pruner_of(processor, CONFIG.replace(recovery={"epochs": 3}))
    got = again.prune(images, work_dir=finished[2]).state_dict()
    assert all(torch.equal(value, finished[1][name]) for name, value in got.items())


def test_fingerprints_tell_weights_apart():
    model = tiny_model()
    before = weights_fingerprint(model)
    assert weights_fingerprint(tiny_model()) == before
    model.vit.embeddings.cls_token.data[0, 0, 3] += 1e-6
    assert weights_fingerprint(model) != before


def test_a_killed_command_is_resumed_and_one_without_resume_is_refused(forks, vit_folder, images, tmp_path):
    recipe = tmp_path / "recipe.json"
    # Many images in single batches: the refit takes long enough to be killed in.
    settings = {**CONFIG.to_dict(), "calibration": {"samples": 24, "batch_size": 1}}
    recipe.write_text(json.dumps(settings))
    command = ["-m", "hf_blockprune.cli", "prune", vit_folder, "--config", recipe]
    command += ["--dataset", images, "--quiet", "--json", "--output"]
    whole = forks.run(*command, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    state = tmp_path / ".out.unfinished"
    process = forks.start(*command, tmp_path / "out")
    deadline = time.monotonic() + 120
    while not (state / "layer-0.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    done = (state / "layer-0.safetensors").stat().st_mtime_ns
    refused = forks.run(*command, tmp_path / "out", "--resume", "--seed", "5")
    assert refused.returncode == 1
    assert "another model, data set or settings" in refused.stderr
    assert (state / "layer-0.safetensors").stat().st_mtime_ns == done
    refused = forks.run(*command, tmp_path / "out")
    assert refused.returncode == 1
    assert "an unfinished run is kept up to refit, layer" in refused.stderr
    assert (state / "layer-0.safetensors").stat().st_mtime_ns == done
    resumed = forks.run(*command, tmp_path / "out", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.json", "whole"]
