"""Pruning while training: masks shrink within themselves to the budget, and what stays keeps all its values."""

import copy
from itertools import pairwise

import pytest
import torch

from hf_blockprune import BlockPruneConfig, BlockPruner, FinetuneConfig, ModelError
from hf_blockprune.choose.allocation import CostBudget, allocate
from hf_blockprune.data.batches import load_images
from hf_blockprune.finetune.config import GradualConfig
from hf_blockprune.finetune.gradual import GradualPruning, make_sparse, masks_of, shrink
from hf_blockprune.finetune.training import Finetuning
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from hf_blockprune.runs.training_state import moments_of
from hf_blockprune.score.magnitude import magnitude_trace
from hf_blockprune.score.trace import RemovalTrace, gone_first
from tests.conftest import tiny_model, write_images
from tests.cutting import KEPT, cut_model
from tests.finetuning import check_masks

SETTINGS = {"epochs": 4, "batch_size": 8, "micro_batch": 4, "lr": 1e-3, "warmup_epochs": 1, "ema": 0.9}


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("some") / "images", 22)


def pruned_model(processor, ratio=0.8):
    pruner = BlockPruner(
        tiny_model(), processor, BlockPruneConfig(block_shape=(8, 8), budget={"ratio": ratio}, method="magnitude")
    )
    return pruner.prune()


@pytest.mark.parametrize(
    ("start", "method"), [("dense", "magnitude"), ("dense", "taylor"), ("pruned", "taylor"), ("pruned", "obs")]
)
def test_masks_are_nested_and_reach_the_budget(processor, some, accelerator, start, method):
    model = pruned_model(processor) if start == "pruned" else tiny_model()
    shape = {} if start == "pruned" else {"block_shape": [8, 8]}
    gradual = {"method": method, "budget": {"ratio": 0.5}, "every": 2, "end": 0.75, "samples": 8, **shape}
    settings = FinetuneConfig(**SETTINGS, distillation={"kind": "none"}, gradual=gradual)
    run = Finetuning(model, processor, load_images(some), settings, accelerator)
    seen, step = [masks_of(run.model)], run.student.step

    def watched(*args, **kwargs):
        result = step(*args, **kwargs)
        check_masks(run.student.model, masks_of(run.model))
        seen.append(masks_of(run.student.model))
        return result

    run.student.step = watched
    history = run.run()
    assert len(seen) == 1 + 12
    for before, after in pairwise(seen):
        assert all((before[name] | ~mask).all() for name, mask in after.items())
    counts = [sum(int(mask.sum()) for mask in masks.values()) for masks in seen]
    assert len(set(counts)) == 1 + len(history.pruning) - (history.pruning[-1]["kept"] == history.pruning[-2]["kept"])
    assert [p["step"] for p in history.pruning] == [2, 4, 6, 8, 9]
    begin = run.pruning.begin
    assert begin == pytest.approx(1.0 if start == "dense" else 0.8, abs=0.005)
    for pruning in history.pruning:
        asked = run.pruning.kept_after(pruning["step"])
        assert asked == pytest.approx(0.5 + (begin - 0.5) * (1 - pruning["step"] / 9) ** 3)
        assert asked - 0.006 < pruning["kept"] <= asked + 1e-9


def test_what_stays_keeps_weights_moments_and_average(processor, some, accelerator):
    settings = FinetuneConfig(**SETTINGS, distillation={"kind": "none"})
    run = Finetuning(pruned_model(processor), processor, load_images(some), settings, accelerator)
    student = run.student
    student.wrap()
    for number, batches in enumerate(run.data.epoch(0)):
        student.step(batches, number=number, images=6 if number == 2 else 8, lr=1e-3)
    old = masks_of(student.model)
    torch.manual_seed(0)
    new = {name: mask & (torch.rand(mask.shape) < 0.6) for name, mask in old.items()}

    def values():
        parts = {
            "weight": dict(student.model.named_parameters()),
            "average": student.average.values,
            **{m: {} for m in ("exp_avg", "exp_avg_sq", "step")},
        }
        for key, value in moments_of(student.optimizer, student.parameters).items():
            moment, _, name = key.partition("/")
            parts[moment][name] = value
        return copy.deepcopy(parts)

    alive = [p for group in student.optimizer.param_groups for p in group["params"]]  # so that no id is given again
    before, held = values(), {id(p) for p in alive}
    student.shrink(new)
    after = values()
    assert all(torch.equal(mask, new[name]) for name, mask in masks_of(student.model).items())
    for part, named in before.items():
        assert named.keys() == after[part].keys()
        for name, value in named.items():
            layer = name.removesuffix(".weight")
            keep = new[layer][old[layer]] if layer in new and part != "step" else None
            assert torch.equal(after[part][name], value if keep is None else value[keep])
    current = {id(p) for group in student.optimizer.param_groups for p in group["params"]}
    assert current == {id(p) for p in student.model.parameters()}
    assert len(current - held) == len(new)
    # Weights that are left go on decaying as matrices do.
    for group in student.optimizer.param_groups:
        assert all((p.dim() > 1) is (group["weight_decay"] > 0) for p in group["params"] if p.dim() in (1, 2))


def test_a_mask_may_not_grow(processor):
    model = pruned_model(processor)
    masks = masks_of(model)
    name = next(iter(masks))
    with pytest.raises(ValueError, match=f"{name}: the mask has blocks that are gone"):
        shrink(model, {**masks, name: torch.ones_like(masks[name])})


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_dense_model_made_sparse_answers_alike(family, accelerator):
    model = tiny_model(family)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(pixel_values=pixels).logits
        make_sparse(model, FinetuneConfig(gradual={"block_shape": [8, 8]}).gradual)
        torch.testing.assert_close(model(pixel_values=pixels).logits, before, rtol=0, atol=1e-5)
    assert all(mask.all() for mask in masks_of(model).values())


def test_units_that_were_cut_count_as_removed_and_are_cut_again(processor, some, accelerator, tmp_path):
    pruner = BlockPruner(
        tiny_model(hidden_size=96, intermediate_size=384),
        processor,
        BlockPruneConfig(
            block_shape=(16, 16), budget={"ratio": 0.35}, calibration={"samples": 8}, refit=False, true_loss_rounds=0
        ),
        accelerator=accelerator,
    )
    model = pruner.prune(some)
    cut = {name for name, layer in block_sparse_layers(model) if layer.dense_shape is not None}
    assert cut
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(pixel_values=pixels).logits
    settings = FinetuneConfig(
        **SETTINGS, distillation={"kind": "none"}, gradual={"budget": {"ratio": 0.25}, "every": 4, "samples": 8}
    )
    gradual = GradualPruning(copy.deepcopy(model), processor, load_images(some), settings.gradual, 0, accelerator)
    make_sparse(gradual.model, settings.gradual)
    with torch.no_grad():
        torch.testing.assert_close(gradual.model(pixel_values=pixels).logits, before, rtol=0, atol=1e-5)
    assert gradual.begin_and_goal()[0] == pytest.approx(pruner.report()["flops_ratio"], abs=1e-6)
    pruner.finetune(some, settings)
    report = pruner.report()
    assert report["flops_ratio"] == pytest.approx(0.25, rel=0.02)
    assert report["flops_ratio"] <= 0.25
    assert {name for name, layer in block_sparse_layers(model) if layer.dense_shape is not None} >= cut
    pruner.save_pretrained(tmp_path / "out")
    again = BlockPruner.from_pretrained(tmp_path / "out")
    assert again.report()["finetuning"]["pruning"] == report["finetuning"]["pruning"]
    with torch.no_grad():
        answers = [m.eval()(pixel_values=pixels).logits for m in (model, again.model)]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-5)
    assert again.config.budget.ratio == 0.25


def test_a_dense_model_is_pruned_and_saved_with_a_report(processor, some, accelerator, tmp_path):
    pruner = BlockPruner(tiny_model(), processor, name="tiny", accelerator=accelerator)
    gradual = {"budget": {"metric": "params", "ratio": 0.6}, "block_shape": [8, 8], "method": "magnitude", "every": 3}
    pruner.finetune(some, FinetuneConfig(**SETTINGS, distillation={"kind": "none"}, gradual=gradual), evaluation=some)
    report = pruner.report()
    assert report["base_model"] == "tiny"
    assert report["params_ratio"] == pytest.approx(0.6, rel=0.01)
    assert report["config"]["block_shape"] == [8, 8]
    assert report["finetuning"]["kept_epoch"] >= 2  # not before pruning was done
    pruner.save_pretrained(tmp_path / "out")
    assert "It was trained for 4 epochs on 22 images of" in (tmp_path / "out/README.md").read_text()


def test_what_is_gone_leaves_before_all_that_costs_nothing():
    torch.manual_seed(0)
    weight = torch.randn(8, 8)
    weight[:2, :2] = weight[4:6, 2:4] = 0  # gone
    weight[2:4, :4] = 0  # here, and worth nothing
    gone = torch.zeros(4, 4, dtype=torch.bool)
    gone[0, 0] = gone[2, 1] = True
    trace = gone_first(magnitude_trace(weight, (2, 2)), gone)
    assert set(trace.order[0, :2].tolist()) == {0, 9}
    assert set(trace.order[0, 2:4].tolist()) == {4, 5}
    assert sorted(trace.order[0].tolist()) == list(range(16))
    plain = magnitude_trace(weight, (2, 2))
    torch.testing.assert_close(trace.loss[0, 4:], plain.loss[0, 4:], rtol=0, atol=1e-9)
    costs = {"a": torch.ones(4, 4, dtype=torch.float64), "b": torch.ones(4, 4, dtype=torch.float64)}
    free = RemovalTrace(plain.order, torch.zeros_like(plain.loss), plain.grid)  # all of the other layer is free
    found = allocate({"b": free, "a": trace}, [CostBudget(costs, 1 - 2 / 32)], power_weight=0.0)
    assert torch.equal(~found.masks["a"], gone)
    assert found.masks["b"].all()


def test_models_that_lack_heads_are_refused():
    model = cut_model(tiny_model(), KEPT["vit"])
    with pytest.raises(ModelError, match="heads were cut from the model's attentions"):
        make_sparse(model, GradualConfig(budget={"ratio": 0.25}))
