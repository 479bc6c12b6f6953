"""Latencies are those of both models on one machine, and reach report and card."""

import json

import pytest
import torch
from transformers import DeiTImageProcessorPil
from typer.testing import CliRunner

from hf_blockprune import BlockPruneConfig, BlockPruner, ModelError
from hf_blockprune.cli import app
from tests.conftest import tiny_model


@pytest.fixture
def pruner(processor):
    config = BlockPruneConfig(method="magnitude", block_shape=(16, 16), budget={"metric": "density", "ratio": 0.5})
    pruner = BlockPruner(tiny_model(), processor, config, name="tiny")
    pruner.prune()
    return pruner


def test_every_batch_size_is_a_row_of_consistent_numbers(pruner):
    seen = []
    handle = pruner.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["pixel_values"].shape)), with_kwargs=True
    )
    values = pruner.benchmark(batch_sizes=(1, 3), seconds=0.0)
    handle.remove()
    assert set(seen) == {(1, 3, 32, 32), (3, 3, 32, 32)}
    assert [row["batch"] for row in values["rows"]] == [1, 3]
    for row in values["rows"]:
        assert row["throughput_img_s"] == pytest.approx(1000 * row["batch"] / row["latency_ms"], rel=1e-3, abs=0.01)
        low, high = row["speedup_quartiles"]
        assert low <= row["speedup"] <= high
    assert sum(values["backends"].values()) == 12
    json.dumps(values)


def test_the_slower_model_is_told_from_the_faster_one(pruner, processor):
    """The median of many turns, against a dense model of many more layers."""
    large = BlockPruner(tiny_model(num_hidden_layers=24), processor)
    row = pruner.benchmark(against=large, seconds=1.0)["rows"][0]
    assert row["speedup"] > 1
    assert row["dense_latency_ms"] > row["latency_ms"]


def test_measuring_changes_nothing(pruner):
    pixels = torch.ones(1, 3, 32, 32)
    with torch.no_grad():
        before = pruner.model(pixels).logits
        pruner.benchmark(seconds=0.0)
        assert torch.equal(pruner.model(pixels).logits, before)


def test_card_and_report_tell_measured_from_predicted(pruner, tmp_path):
    pruner.save_pretrained(tmp_path / "before")
    card = (tmp_path / "before/README.md").read_text()
    assert "Not measured." in card
    assert "Predicted by the cost model, not measured" in card
    values = pruner.benchmark(batch_sizes=(1, 2), seconds=0.0)
    pruner.save_pretrained(tmp_path / "after")
    stored = json.loads((tmp_path / "after/blockprune_report.json").read_text())
    assert stored["latency"] == values
    assert [row["device"] for row in stored["predicted"]] == ["cpu-avx512", "h100-sxm", "systolic-32"]
    card = (tmp_path / "after/README.md").read_text()
    for row in values["rows"]:
        assert f"| {row['batch']} | {row['dense_latency_ms']:.2f} ms | {row['latency_ms']:.2f} ms |" in card


def test_models_of_unknown_cost_have_no_predictions(processor, tmp_path):
    config = BlockPruneConfig(method="magnitude", block_shape=(8, 8), budget={"metric": "flops", "ratio": 0.5})
    pruner = BlockPruner(tiny_model("swin"), processor, config)
    pruner.prune()
    pruner.save_pretrained(tmp_path / "swin")
    assert json.loads((tmp_path / "swin/blockprune_report.json").read_text())["predicted"] == []
    assert "Predicted" not in (tmp_path / "swin/README.md").read_text()


def test_dense_models_are_not_measured(processor):
    with pytest.raises(ModelError, match="no block-sparse layers"):
        BlockPruner(tiny_model(), processor).benchmark()


def test_both_models_are_timed_on_pictures_as_they_reach_them(pruner):
    """By what processors make of pictures: of these, one says what size it resizes to, and nothing of its crop."""

    class Silent(DeiTImageProcessorPil):
        def to_dict(self):
            return {key: value for key, value in super().to_dict().items() if "crop" not in key}

    sizes = {"size": {"height": 48, "width": 48}, "crop_size": {"height": 32, "width": 32}}
    pruner.processor, seen = Silent(**sizes), []
    dense = BlockPruner(tiny_model(), DeiTImageProcessorPil(**sizes), name="dense")
    for model in (pruner.model, dense.model):
        model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(tuple(kwargs["pixel_values"].shape[-2:])), with_kwargs=True
        )
    pruner.benchmark(against=dense, seconds=0.0)
    assert set(seen) == {(32, 32)}


def test_models_that_take_pictures_of_different_sizes_do_not_compare(pruner):
    sizes = {"size": {"height": 24, "width": 24}, "do_center_crop": False}
    other = BlockPruner(tiny_model(image_size=24), DeiTImageProcessorPil(**sizes), name="other")
    with pytest.raises(ModelError, match=r"tiny takes pictures of 32x32, other of 24x24 .*name the dense model"):
        pruner.benchmark(against=other)
    assert pruner.report()["latency"] is None


def test_the_command(pruner, tmp_path):
    pruner.save_pretrained(tmp_path / "pruned")
    arguments = ["benchmark", str(tmp_path / "pruned"), "--batch-size", "1", "--batch-size", "2", "--seconds", "0"]
    done = CliRunner().invoke(app, [*arguments, "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    assert [row["batch"] for row in json.loads(done.stdout)["rows"]] == [1, 2]
    done = CliRunner().invoke(app, [*arguments, "--quiet"])
    assert "speed-up" in done.stdout
