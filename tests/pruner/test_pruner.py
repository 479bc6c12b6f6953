"""The main job: prune, evaluate, save, load."""

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageClassification

from hf_blockprune import (
    BlockPruneConfig,
    BlockPruner,
    BlockSparseLinear,
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
)
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from hf_blockprune.score.blocks import expand_mask
from tests.conftest import NUM_LABELS, tiny_model, write_images


def config(method="taylor", ratio=0.75, metric="flops", **changes):
    changes = {"block_shape": (16, 16), "calibration": {"samples": 20, "batch_size": 6}, **changes}
    return BlockPruneConfig(method=method, budget={"metric": metric, "ratio": ratio}, **changes)


def pixels(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def kept_blocks(model):
    return {name: module.mask() for name, module in block_sparse_layers(model)}


KEPT_SHARE = {"flops": "flops_ratio", "params": "params_ratio", "density": "density"}


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
@pytest.mark.parametrize("metric", KEPT_SHARE)
def test_budget_is_met_from_below_within_half_a_percent(family, processor, images, method, metric):
    fine = config(method, 0.6, metric, block_shape=(8, 4))
    pruner = BlockPruner(tiny_model(family), processor, fine)
    pruner.prune(images)
    reached = pruner.report()[KEPT_SHARE[metric]]
    assert 0.6 * 0.995 <= reached <= 0.6


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
def test_pruned_model_equals_the_dense_one_with_removed_blocks_zeroed(family, processor, images, method):
    pruner = BlockPruner(tiny_model(family), processor, config(method, block_shape=(20, 12)))
    model = pruner.prune(images)
    assert any(isinstance(module, BlockSparseLinear) for module in model.modules())
    masked = tiny_model(family)
    for name, mask in kept_blocks(model).items():
        weight = masked.get_submodule(name).weight
        for row, col in (~mask).nonzero().tolist():
            weight.data[row * 20 : (row + 1) * 20, col * 12 : (col + 1) * 12] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(pixels()).logits, masked(pixels()).logits, atol=1e-5, rtol=1e-5)


def test_params_count_every_weight_that_is_left(family, processor, images):
    dense = sum(parameter.numel() for parameter in tiny_model(family).parameters())
    pruner = BlockPruner(tiny_model(family), processor, config(block_shape=(20, 12)))
    pruner.prune(images)
    left = dense
    for module in pruner.model.modules():
        if isinstance(module, BlockSparseLinear):
            entries = expand_mask(module.mask(), (module.out_features, module.in_features), (20, 12))
            left -= int((~entries).sum())
    assert pruner.report()["params_ratio"] == pytest.approx(left / dense)


def test_two_budgets_are_both_met(processor, images):
    both = config("taylor", 0.8, block_shape=(8, 4), second_budget={"metric": "params", "ratio": 0.7})
    pruner = BlockPruner(tiny_model(), processor, both)
    pruner.prune(images)
    report = pruner.report()
    assert report["flops_ratio"] <= 0.8
    assert report["params_ratio"] <= 0.7
    assert report["flops_ratio"] >= 0.796 or report["params_ratio"] >= 0.6965


def test_balance_keeps_as_many_blocks_in_every_block_row(processor, images):
    pruner = BlockPruner(tiny_model(), processor, config("obs", 0.7, block_shape=(8, 4), balance=True))
    masks = kept_blocks(pruner.prune(images))
    assert all(len(mask.sum(dim=1).unique()) == 1 for mask in masks.values())
    assert len({float(mask.float().mean()) for mask in masks.values()}) > 1


def test_report_and_inspect_agree(family, processor, images, tmp_path):
    pruner = BlockPruner(tiny_model(family), processor, config(block_shape=(20, 12)))
    pruner.prune(images)
    pruner.save_pretrained(tmp_path / "out")
    stored, report = inspect_checkpoint(tmp_path / "out"), pruner.report()
    for key in ("flops_ratio", "linear_flops_ratio", "density", "dense_flops", "size_bytes", "dense_size_bytes"):
        assert stored[key] == pytest.approx(report[key]), key
    by_module = {layer["module"]: layer for layer in stored["layers"]}
    for layer in report["layers"]:
        assert by_module[layer["name"]]["kept_blocks"] == layer["kept_blocks"]
        assert by_module[layer["name"]]["shape"] == layer["shape"]
    assert json.loads((tmp_path / "out/blockprune_report.json").read_text())["size_bytes"] == stored["size_bytes"]


def test_file_holds_little_more_than_kept_blocks_and_dense_tensors(processor, tmp_path):
    wide = tiny_model("vit", hidden_size=384, intermediate_size=1536, num_attention_heads=6)
    pruner = BlockPruner(wide, processor, config("magnitude", 0.5))
    model = pruner.prune()
    pruner.save_pretrained(tmp_path / "out")
    stored = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert (tmp_path / "out/model.safetensors").stat().st_size <= 1.02 * stored
    assert inspect_checkpoint(tmp_path / "out")["dense_size_bytes"] > 1.5 * stored


def test_saved_folder_is_complete_and_loads_with_equal_logits(family, processor, images, tmp_path):
    pruner = BlockPruner(tiny_model(family), processor, config(), name="someone/model")
    model = pruner.prune(images)
    pruner.save_pretrained(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= names
    assert {"blockprune_config.json", "blockprune_report.json", "modeling_blockprune.py"} <= names
    assert BlockPruneConfig.from_file(tmp_path / "out/blockprune_config.json") == pruner.config
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels()).logits, model(pixels()).logits, atol=1e-5, rtol=1e-5)
    assert not list(tmp_path.glob(".*"))


def test_pruning_twice_gives_the_same_masks(processor, images):
    first, second = (kept_blocks(BlockPruner(tiny_model(), processor, config()).prune(images)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unlabelled_images_are_fine_for_pruning_and_refused_for_evaluation(processor, tmp_path):
    folder = write_images(tmp_path / "plain", 8, labels=False)
    pruner = BlockPruner(tiny_model(), processor, config())
    pruner.prune(folder)
    with pytest.raises(DataError, match="no labels"):
        pruner.evaluate(folder)


def test_evaluation_against_the_dense_model_goes_into_report_and_card(vit_folder, images, tmp_path):
    pruner = BlockPruner.from_pretrained(vit_folder, config())
    pruner.prune(images)
    result = pruner.evaluate(images, against=vit_folder)
    assert result.num_images == 24
    assert result.delta == pytest.approx(result.top1 - result.baseline_top1)
    assert result.flipped_to_right - result.flipped_to_wrong == round(24 * result.delta)
    assert result.interval[0] <= result.delta <= result.interval[1]
    pruner.save_pretrained(tmp_path / "out")
    report = json.loads((tmp_path / "out/blockprune_report.json").read_text())
    assert report["evaluation"]["num_images"] == 24
    card = (tmp_path / "out/README.md").read_text()
    assert "On 24 images" in card
    assert "model-index" in card
    assert str(tmp_path) not in card


def test_card_without_evaluation_says_not_measured(vit_folder, tmp_path):
    pruner = BlockPruner.from_pretrained(vit_folder, config("magnitude"))
    pruner.prune()
    pruner.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "## Accuracy\n\nNot measured." in card
    assert str(vit_folder.parent) not in card


@pytest.mark.parametrize("name", ["no/such-model-anywhere", "./no-such-folder"])
def test_unknown_model_is_named(name):
    with pytest.raises(ModelError, match=name):
        BlockPruner.from_pretrained(name)


def test_model_without_a_trained_head_is_refused(vit_folder, processor, tmp_path):
    model = tiny_model()
    headless = {name: value for name, value in model.state_dict().items() if "classifier" not in name}
    model.save_pretrained(tmp_path, state_dict=headless)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no trained weights for classifier"):
        BlockPruner.from_pretrained(tmp_path)


def test_pruned_model_is_not_pruned_again(processor, images):
    pruner = BlockPruner(tiny_model(), processor, config("magnitude"))
    pruner.prune()
    with pytest.raises(ModelError, match="already"):
        pruner.prune()


def test_taylor_without_images_says_what_to_pass(processor):
    with pytest.raises(ModelError, match="calibration images"):
        BlockPruner(tiny_model(), processor, config()).prune()


def test_block_larger_than_the_matrix_names_the_layer(processor):
    with pytest.raises(ConfigError, match=r"64x64 is larger than vit\.\S+ \(48x48\)"):
        BlockPruner(tiny_model(), processor, config("magnitude", block_shape=(64, 64))).prune()


def test_budget_below_what_ignored_layers_cost(processor):
    with pytest.raises(BudgetError, match="lies outside the target layers"):
        BlockPruner(tiny_model(), processor, config("magnitude", 0.3, ignore=("*.mlp.*",))).prune()


def test_labels_outside_the_model_are_refused(vit_folder, tmp_path):
    folder = write_images(tmp_path / "pictures", 4)
    (folder / "metadata.csv").write_text(f"file_name,label\npicture_000.png,{NUM_LABELS}\n")
    for other in range(1, 4):
        (folder / f"picture_{other:03d}.png").unlink()
    with pytest.raises(DataError, match=f"label {NUM_LABELS} lies outside"):
        BlockPruner.from_pretrained(vit_folder).evaluate(folder)


def test_reporting_or_saving_before_pruning_is_refused(processor, tmp_path):
    pruner = BlockPruner(tiny_model(), processor, config())
    with pytest.raises(ModelError, match="call prune"):
        pruner.report()
    with pytest.raises(ModelError, match="call prune"):
        pruner.save_pretrained(tmp_path / "out")


class TestSavingIsAllOrNothing:
    @pytest.fixture
    def pruner(self, processor):
        pruner = BlockPruner(tiny_model(), processor, config("magnitude"))
        pruner.prune()
        return pruner

    def test_existing_checkpoint_needs_overwrite(self, pruner, tmp_path):
        pruner.save_pretrained(tmp_path / "out")
        before = (tmp_path / "out/model.safetensors").read_bytes()
        with pytest.raises(CheckpointError, match="overwrite"):
            pruner.save_pretrained(tmp_path / "out")
        pruner.save_pretrained(tmp_path / "out", overwrite=True)
        assert (tmp_path / "out/model.safetensors").read_bytes() == before

    def test_folder_that_is_no_checkpoint_is_never_replaced(self, pruner, tmp_path):
        (tmp_path / "thesis.txt").write_text("five years of work")
        with pytest.raises(CheckpointError, match="no saved model"):
            pruner.save_pretrained(tmp_path, overwrite=True)
        assert (tmp_path / "thesis.txt").exists()

    def test_file_in_the_way(self, pruner, tmp_path):
        (tmp_path / "out").write_text("")
        with pytest.raises(CheckpointError, match="is a file"):
            pruner.save_pretrained(tmp_path / "out")

    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    def test_failure_half_way_leaves_the_old_checkpoint_and_nothing_else(self, pruner, tmp_path, error):
        pruner.save_pretrained(tmp_path / "out")
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

        class Failing:
            def save_pretrained(self, folder):
                raise error

        pruner.processor = Failing()
        with pytest.raises(error):
            pruner.save_pretrained(tmp_path / "out", overwrite=True)
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.slow
    def test_full_disk_in_a_real_process(self, forks, vit_folder, tmp_path):
        """A file-size limit makes the operating system refuse the weights, as a full disk does."""

        script = """
import resource, signal, sys
from hf_blockprune.cli import app
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
app(sys.argv[1:])
"""
        arguments = ["prune", vit_folder, "--method", "magnitude", "--block-shape", "16x16", "--budget", "flops=0.9"]
        done = forks.run("-c", script, *arguments, "--output", tmp_path / "out", "--quiet")
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert "could not be written" in done.stderr
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("method", ["magnitude", "obs"])
def test_the_report_prints_as_tables(processor, images, method):
    pruner = BlockPruner(tiny_model(), processor, config(method, block_shape=(8, 8)))
    pruner.prune(images)
    pruner.evaluate(images)
    console = Console(width=200, file=io.StringIO())
    console.print(pruner.report())
    text = console.file.getvalue()
    for layer in pruner.report()["layers"]:
        row = next(line for line in text.splitlines() if layer["name"] in line)
        assert f"{layer['blocks'] - layer['kept_blocks']}/{layer['blocks']}" in row
        assert (f"{layer['error_after_refit']:.3g}" in row) if method == "obs" else "-" in row
        assert layer["seconds"] > 0 or method == "magnitude"  # which takes less than a millisecond
    assert "FLOPs kept, whole model" in text
    assert f"{pruner.report()['evaluation']['top1']:.2%}" in text


def test_fewer_tokens_than_inputs_work_and_are_reported(processor, images):
    """2 images of 17 tokens; fc2 has 96 inputs, the others 48."""
    pruner = BlockPruner(tiny_model(), processor, config("obs", block_shape=(8, 8), calibration={"samples": 2}))
    model = pruner.prune(images)
    assert len(pruner.report()["calibration"]["fewer_tokens_than_inputs"]) == 12
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    again = BlockPruner(tiny_model(), processor, config("obs", block_shape=(8, 8), calibration={"samples": 4}))
    again.prune(images)
    few = again.report()["calibration"]["fewer_tokens_than_inputs"]
    assert [name.rpartition(".")[2] for name in few] == ["fc2", "fc2"]
