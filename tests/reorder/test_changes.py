"""Choosing blocks changes the model only where it succeeds: what fails or is interrupted leaves each bit as it was."""

import pytest
import torch

from hf_blockprune import BlockPruneConfig, BlockPruner, ModelError
from hf_blockprune.calibration.collect import collect
from hf_blockprune.choose.budgets import model_budgets
from hf_blockprune.choose.selection import Selector
from hf_blockprune.cost.flops import count_flops
from hf_blockprune.data.batches import load_images
from hf_blockprune.model.targets import find_targets
from hf_blockprune.reorder.changes import Changes, undone_on_failure
from tests.conftest import tiny_model


def values_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_changes_are_undone_last_first():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 8, generator=generator))
    before, changes = weight.detach().clone(), Changes()
    changes.permute(weight, 0, torch.randperm(6, generator=generator))
    changes.overwrite(weight, weight * 3)
    changes.permute(weight, 1, torch.randperm(8, generator=generator))
    assert not torch.equal(weight, before)
    changes.undo()
    assert torch.equal(weight, before)
    changes.undo()  # nothing is left to undo
    assert torch.equal(weight, before)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interruption_within_a_change_is_undone(monkeypatch, when):
    weight = torch.arange(6.0)
    real = torch.Tensor.copy_

    def interrupted(self, value):
        if when == "after":
            real(self, value)
        monkeypatch.setattr(torch.Tensor, "copy_", real)
        raise KeyboardInterrupt

    def change():
        with undone_on_failure() as changes:
            changes.permute(weight, 0, torch.tensor([5, 4, 3, 2, 1, 0]))
            monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
            changes.permute(weight, 0, torch.tensor([1, 0, 3, 2, 5, 4]))

    with pytest.raises(KeyboardInterrupt):
        change()
    assert torch.equal(weight, torch.arange(6.0))


CONFIG = BlockPruneConfig(block_shape=(8, 8), budget={"ratio": 0.6}, calibration={"samples": 12})


@pytest.mark.parametrize("family", ["vit", "dinov2"])  # the second has scales that are folded
@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("reorder.reordering.packing_moves", KeyboardInterrupt),
        ("choose.true_loss.solve", ModelError),
        ("choose.selection.drop_unused", ModelError),
    ],
)
def test_a_choice_that_fails_leaves_the_model_as_it_was(processor, images, monkeypatch, family, where, error):
    def fails(*_, **__):
        raise error("no")

    monkeypatch.setattr(f"hf_blockprune.{where}", fails)
    model = tiny_model(family)
    before = values_of(model)
    with pytest.raises(error):
        BlockPruner(model, processor, CONFIG).prune(images)
    same(values_of(model), before)


def test_selecting_changes_nothing(processor, images, accelerator):
    model = tiny_model()
    flops = count_flops(model)
    targets = find_targets(model, CONFIG, flops.linear_tokens)
    found = load_images(images).sample(12, 0)
    statistics, _ = collect(model, found, processor, targets, accelerator=accelerator, fisher=True)
    before, pixels = values_of(model), torch.randn(4, 3, 32, 32)
    budgets = model_budgets(CONFIG, model, targets, flops)
    selector = Selector(model, targets, statistics, flops, budgets, CONFIG, accelerator, pixels)
    first, second = selector.select(), selector.select()
    same(values_of(model), before)
    same(first.allocation.masks, second.allocation.masks)
    assert first.loss_factors == second.loss_factors
