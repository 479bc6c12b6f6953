"""The residual stream's order: the function stays, saliency is packed better, and recovery compares like with like."""

import copy
import io

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModel, ViTModel

from hf_blockprune import BlockPruneConfig, BlockPruner, BudgetError
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.model.structure import find_residual_stream
from hf_blockprune.model.targets import find_targets
from hf_blockprune.reorder.folding import fold_scales
from hf_blockprune.reorder.hidden import block_saliency_kept
from hf_blockprune.reorder.stream import choose_order, permute_statistics, permute_stream
from hf_blockprune.report.tables import inspect_table
from tests.conftest import TINY_MODELS, tiny_model, tiny_settings
from tests.reorder.test_hidden import statistics_of

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", [*TINY_MODELS, "beit", "dinov2"])
def test_logits_stay_and_hidden_states_change_places(family):
    model = tiny_model(family)
    moved, order = copy.deepcopy(model), torch.randperm(48, generator=torch.Generator().manual_seed(1))
    fold_scales(moved)
    permute_stream(moved, find_residual_stream(moved), order)
    with torch.no_grad():
        before = model(pixel_values=PIXELS, output_hidden_states=True)
        after = moved(pixel_values=PIXELS, output_hidden_states=True)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-5, rtol=1e-5)
    for x, y in zip(before.hidden_states, after.hidden_states, strict=True):
        torch.testing.assert_close(y, x[..., order], atol=1e-5, rtol=1e-5)


def test_a_pooler_and_a_mask_token_follow():
    model = ViTModel(TINY_MODELS["vit"][1](**tiny_settings()), use_mask_token=True).eval()
    moved, order = copy.deepcopy(model), torch.arange(48).flip(0)
    stream = find_residual_stream(moved)
    assert stream.axes["embeddings.mask_token"] == 2
    permute_stream(moved, stream, order)
    with torch.no_grad():
        torch.testing.assert_close(
            moved(pixel_values=PIXELS).pooler_output, model(pixel_values=PIXELS).pooler_output, atol=1e-5, rtol=1e-5
        )


def test_models_with_parameters_of_an_unknown_kind_are_left_alone():
    model = tiny_model()
    model.vit.scale = nn.Parameter(torch.ones(48))
    assert find_residual_stream(model) is None
    assert find_residual_stream(tiny_model("swin")) is None


@pytest.mark.parametrize("family", TINY_MODELS)
def test_statistics_are_those_of_the_permuted_model(family):
    """Each Linear's saliency moves with its weights."""
    model = tiny_model(family)
    targets = find_targets(model, BlockPruneConfig(block_shape=(8, 8)))
    statistics, stream = statistics_of(targets), find_residual_stream(model)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    whole = {
        name: statistics[name].output_weight @ (linear.weight.detach().double() @ statistics[name].covariance)
        for name, linear in targets.items()
    }
    permute_stream(model, stream, order)
    moved = permute_statistics(stream, statistics, order)
    for name, linear in targets.items():
        now = moved[name].output_weight @ (linear.weight.detach().double() @ moved[name].covariance)
        before = whole[name][order] if name in stream.readers else whole[name]
        torch.testing.assert_close(now, before)


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (48, 1)])
def test_the_order_packs_saliency_into_blocks(shape):
    model = tiny_model()
    targets = find_targets(model, BlockPruneConfig(block_shape=shape))
    statistics, stream = statistics_of(targets), find_residual_stream(model)
    before = block_saliency_kept(targets, statistics, shape, 0.5)
    order = choose_order(stream, targets, statistics, shape)
    permute_stream(model, stream, order)
    after = block_saliency_kept(targets, permute_statistics(stream, statistics, order), shape, 0.5)
    assert after > before if shape != (48, 1) else after == pytest.approx(before)


def settings(**changes):
    config = {"block_shape": (8, 8), "budget": {"metric": "flops", "ratio": 0.8}, "calibration": {"samples": 24}}
    return BlockPruneConfig(**{**config, **changes})


def test_recovery_sees_a_dense_model_in_the_same_order(processor, images, tmp_path):
    """Nothing is removed, so that nothing is to be learned, unless features are compared with others."""
    config = settings(
        budget={"metric": "flops", "ratio": 1.0},
        refit=False,
        recovery={"samples": 24, "batch_size": 8, "reconstruction_epochs": 4, "epochs": 0},
    )
    dense = BlockPruner(tiny_model(), processor)
    pruner = BlockPruner(tiny_model(), processor, config)
    before = pruner.prune(images)(pixel_values=PIXELS).logits
    assert pruner.report()["permutation"]["residual_order"] != list(range(48))
    pruner.save_pretrained(tmp_path / "out")
    loaded = BlockPruner.from_pretrained(tmp_path / "out")
    for each in (pruner, loaded):
        each.recover(images, teacher=dense)
        torch.testing.assert_close(each.model(pixel_values=PIXELS).logits, before, atol=1e-3, rtol=1e-3)
        assert max(each.report()["recovery"]["divergence"].values()) < 1e-4
    with torch.no_grad():
        torch.testing.assert_close(dense.model(pixel_values=PIXELS).logits, before, atol=1e-5, rtol=1e-5)


def test_a_budget_that_no_mask_meets_leaves_the_model_as_it_was(processor, images):
    pruner = BlockPruner(tiny_model(), processor, settings(min_kept_per_layer=0.9))
    before = {name: value.clone() for name, value in pruner.model.state_dict().items()}
    with pytest.raises(BudgetError):
        pruner.prune(images)
    for name, value in pruner.model.state_dict().items():
        assert torch.equal(value, before[name])


def embeddings_of(folder):
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(pixel_values=PIXELS).last_hidden_state[:, 0]


@pytest.mark.parametrize("permute_stream", [None, False])
def test_who_takes_embeddings_is_told_of_their_order_or_keeps_it(
    vit_folder, processor, images, tmp_path, permute_stream
):
    """Nothing is removed, so that the order alone differs."""
    config = BlockPruneConfig(
        block_shape=(8, 8), refit=False, permute_stream=permute_stream, budget={"metric": "flops", "ratio": 1.0}
    )
    pruner = BlockPruner.from_pretrained(vit_folder, config)
    pruner.prune(images)
    pruner.save_pretrained(tmp_path / "out")
    have, wanted = embeddings_of(tmp_path / "out"), embeddings_of(vit_folder)
    report = pruner.report()
    moved = permute_stream is None
    assert (report["permutation"]["residual_order"] is not None) == moved
    assert report["permutation"]["saliency_kept_after"] > 0.999 * report["permutation"]["saliency_kept_before"]
    if moved:
        assert not torch.allclose(have, wanted, atol=0.1)
        have = have[..., torch.tensor(report["permutation"]["residual_order"]).argsort()]
    torch.testing.assert_close(have, wanted, atol=1e-4, rtol=1e-4)
    values = inspect_checkpoint(tmp_path / "out")
    assert values["stream_reordered"] == moved
    console = Console(width=200, file=io.StringIO())
    console.print(inspect_table(values), report)
    said = " ".join(console.file.getvalue().split())
    assert ("another order than the dense model's" in said) == moved
    assert ("permutation.residual_order" in said) == moved
    assert ("## Hidden states" in (tmp_path / "out/README.md").read_text()) == moved


def test_inspection_without_a_report_does_not_know_the_order(vit_folder, tmp_path):
    config = BlockPruneConfig(method="magnitude", block_shape=(8, 8), budget={"metric": "flops", "ratio": 0.5})
    pruner = BlockPruner.from_pretrained(vit_folder, config)
    pruner.prune()
    pruner.save_pretrained(tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "out")["stream_reordered"] is False
    for damage in ("{", "[]"):
        (tmp_path / "out/blockprune_report.json").write_text(damage)
        assert inspect_checkpoint(tmp_path / "out")["stream_reordered"] is None
    (tmp_path / "out/blockprune_report.json").unlink()
    assert inspect_checkpoint(tmp_path / "out")["stream_reordered"] is None
