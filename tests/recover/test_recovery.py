"""Recovery: what it may change, what it must not, and that it learns."""

import json
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Image
from torch.distributions import Beta
from transformers import AutoModelForImageClassification

from hf_blockprune import BlockPruneConfig, BlockPruner, ConfigError, ModelError, RecoveryConfig, sparsify
from hf_blockprune.data.batches import decode_image, load_images
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from hf_blockprune.recover.recovery import _Run, recover
from hf_blockprune.recover.student import dense_copy
from hf_blockprune.recover.views import _beta, views
from hf_blockprune.score.blocks import expand_mask
from tests.conftest import RECIPE, tiny_model, write_images
from tests.refit.test_layerwise import random_masks

QUICK = {"samples": 24, "batch_size": 8, "reconstruction_epochs": 1, "epochs": 2}


def pruned(family="vit", share=0.5, **changes):
    model = tiny_model(family, **changes)
    return sparsify(model, random_masks(model, share=share), (8, 8))


def recovered(found, processor, accelerator, family="vit", **settings):
    model = pruned(family)
    result = recover(
        model, tiny_model(family), found, processor, RecoveryConfig(**{**QUICK, **settings}), accelerator=accelerator
    )
    return model, result


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_student_computes_what_the_pruned_model_does(family):
    model = pruned(family)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(dense_copy(model)(pixel_values=x).logits, model(pixel_values=x).logits)


@pytest.mark.parametrize("step", ["reconstruct", "distil"])
def test_removed_weights_stay_exactly_zero_while_the_others_learn(found, processor, accelerator, monkeypatch, step):
    model, steps = pruned(), []
    masks = {name: module.mask() for name, module in block_sparse_layers(model)}
    optimizer_step = torch.optim.Adam.step

    def checked(self, *args, **kwargs):
        optimizer_step(self, *args, **kwargs)
        for name, mask in masks.items():
            weight = run.student.get_submodule(name).weight
            assert not weight[~expand_mask(mask, tuple(weight.shape), (8, 8))].any()
        steps.append(1)

    monkeypatch.setattr(torch.optim.Adam, "step", checked)
    pixels, held = torch.randn(24, 3, 32, 32).half(), torch.arange(24) % 8 == 7
    run = _Run(model, tiny_model(), pixels, held, RecoveryConfig(**QUICK), accelerator, 0)
    before = {name: run.student.get_submodule(name).weight.detach().clone() for name in masks}
    getattr(run, step)(2)
    assert len(steps) == (8 if step == "reconstruct" else 4)  # 21 images, 2 batches of 8 an epoch; 2 layers
    for name, weight in before.items():
        assert not torch.equal(weight, run.student.get_submodule(name).weight)


def test_held_back_images_say_that_the_model_became_better(found, processor, accelerator, family):
    settings = {"epochs": 20, "lr": 3e-3, "weight_lr": 3e-3, "reconstruction_epochs": 8}
    model, result = recovered(found, processor, accelerator, family, **settings)
    start, end = result.divergence["pruned"], result.divergence[result.kept]
    assert result.kept != "pruned"
    assert end < 0.7 * start
    assert (result.num_images, result.num_held_back) == (21, 3)
    # What is reported is what the block-sparse model does.
    pixels = processor(images=_held_back_pictures(found), return_tensors="pt")["pixel_values"].half().float()
    with torch.no_grad():
        wanted, have = (m(pixel_values=pixels).logits.log_softmax(-1) for m in (tiny_model(family), model))
    by_hand = F.kl_div(have, wanted, reduction="batchmean", log_target=True)
    assert float(by_hand) == pytest.approx(end, rel=1e-4)


def _held_back_pictures(found):
    return [decode_image(found.dataset[i]["image"]) for i in range(7, 24, 8)]


def test_a_model_that_only_becomes_worse_stays_as_it_was(found, processor, accelerator):
    before = weights(pruned())
    model, result = recovered(found, processor, accelerator, lr=5.0, weight_lr=5.0, reconstruction_epochs=0)
    assert result.divergence["distillation"] > result.divergence["pruned"]
    assert result.kept == "pruned"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_masks_embeddings_and_the_teacher_do_not_change(found, processor, accelerator):
    teacher, model = tiny_model(), pruned()
    before, dense = weights(model), weights(teacher)
    recover(model, teacher, found, processor, RecoveryConfig(**QUICK, lr=1e-3), accelerator=accelerator)
    after = weights(model)
    fixed = [name for name in before if "indices" in name or "embeddings" in name]
    assert len(fixed) > 20
    assert all(torch.equal(before[name], after[name]) for name in fixed)
    assert all(torch.equal(dense[name], value) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_the_same_seed_gives_the_same_weights_and_another_does_not(found, processor, accelerator):
    models = [pruned() for _ in range(3)]
    settings = RecoveryConfig(**QUICK, lr=1e-3)
    for model, seed in zip(models, (0, 0, 1), strict=True):
        recover(model, tiny_model(), found, processor, settings, accelerator=accelerator, seed=seed)
    first, same, other = (weights(model) for model in models)
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_labels_do_not_matter(images, processor, accelerator, found):
    unlabelled = load_images(
        Dataset.from_dict({"image": found.dataset["image"]}).cast_column("image", Image(decode=False))
    )
    assert unlabelled.label_column is None
    (one, _), (other, _) = (recovered(source, processor, accelerator) for source in (found, unlabelled))
    assert all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(other).values(), strict=True))


def test_half_precision_models_stay_in_half_precision(found, processor, accelerator):
    dense = tiny_model()
    model = sparsify(tiny_model().bfloat16(), random_masks(dense), (8, 8))
    result = recover(model, dense, found, processor, RecoveryConfig(**QUICK, lr=1e-3), accelerator=accelerator)
    assert result.kept != "pruned"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("step", ["reconstruction", "distillation"])
def test_a_loss_that_is_not_finite_is_refused_and_nothing_changes(found, processor, accelerator, step):
    model, settings = pruned(), {**QUICK, "lr": 1e30, "weight_lr": 1e30}
    settings["epochs" if step == "reconstruction" else "reconstruction_epochs"] = 0
    before = weights(model)
    with pytest.raises(ModelError, match=f"^{step}.*, step [23]: the loss is not finite; lower recovery"):
        recover(model, tiny_model(), found, processor, RecoveryConfig(**settings), accelerator=accelerator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_teacher_that_predicts_no_numbers_is_refused(found, processor, accelerator):
    teacher = tiny_model()
    teacher.classifier.bias.data[0] = torch.inf
    with pytest.raises(ModelError, match="the teacher's predictions are not finite"):
        recover(pruned(), teacher, found, processor, RecoveryConfig(**QUICK), accelerator=accelerator)


@pytest.mark.parametrize("teacher", [{"num_hidden_layers": 3}, {"share": 0.5}])
def test_another_model_is_no_teacher(found, processor, accelerator, teacher):
    other = pruned(**teacher) if "share" in teacher else tiny_model(**teacher)
    with pytest.raises(ModelError, match="not the dense model that this one was pruned from"):
        recover(pruned(), other, found, processor, RecoveryConfig(**QUICK), accelerator=accelerator)


def test_views_are_as_large_differ_and_are_drawn_by_the_generator():
    pixels = torch.rand(6, 3, 20, 24)
    first, again, other = (views(pixels, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == pixels.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert pixels.min() - 1e-5 <= first.min() <= first.max() <= pixels.max() + 1e-5


def test_pictures_are_mixed_by_shares_of_a_beta_distribution():
    shares = _beta(0.8, 20_000, torch.Generator().manual_seed(0)).double()
    expected = Beta(torch.tensor(0.8).double(), torch.tensor(0.8).double())
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(shares.var()) == pytest.approx(float(expected.variance), abs=0.003)
    assert float((shares < 0.1).double().mean()) == pytest.approx(0.1318, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "recovery.samples: expected a whole number from 2"),
        ({"epochs": -1}, "recovery.epochs"),
        ({"lr": -1}, "recovery.lr: expected a number from 0"),
        ({"lr": "1e-3"}, "write 1.0e-3"),
        ({"hidden_weight": -1}, "recovery.hidden_weight"),
        ({"token_weights": 1}, "recovery.token_weights: expected a share"),
        ({"steps": 3}, "recovery: unknown key steps; known keys are samples"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BlockPruneConfig(recovery=settings)


def quick_config(**recovery):
    return BlockPruneConfig(
        block_shape=(16, 16),
        method="magnitude",
        budget={"metric": "flops", "ratio": 0.7},
        recovery={**QUICK, **recovery},
    )


def test_one_shot_and_recovered_accuracy_are_kept_apart(vit_folder, images):
    pruner = BlockPruner.from_pretrained(vit_folder, quick_config())
    pruner.prune(images)
    one_shot = pruner.evaluate(images, against=vit_folder)
    assert pruner.report()["recovery"] is None
    assert pruner.recover(images) is pruner.model
    report = pruner.report()
    assert report["evaluation"] is None
    assert report["recovery"]["evaluation_before"]["top1"] == one_shot.top1
    assert report["recovery"]["settings"]["epochs"] == QUICK["epochs"]
    pruner.evaluate(images, against=vit_folder)
    assert pruner.report()["evaluation"]["baseline_top1"] == one_shot.baseline_top1
    json.dumps(pruner.report())


def test_a_saved_model_is_recovered_and_saved_again(vit_folder, images, tmp_path):
    pruner = BlockPruner.from_pretrained(vit_folder, quick_config())
    pruner.prune(images)
    pruner.save_pretrained(tmp_path / "pruned")
    again = BlockPruner.from_pretrained(tmp_path / "pruned")
    assert again.config == pruner.config
    assert again.report()["layers"] == pruner.report()["layers"]
    with pytest.raises(ModelError, match="pruned: name the dense model it was pruned from as teacher"):
        again.recover(images)
    again.recover(images, teacher=vit_folder)
    again.save_pretrained(tmp_path / "recovered")
    pruner.recover(images)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "recovered")
    stored = weights(loaded)
    assert all(torch.equal(value, stored[name]) for name, value in pruner.model.state_dict().items())
    assert "learned to behave like the dense model" in (tmp_path / "recovered" / "README.md").read_text()
    assert BlockPruner.from_pretrained(tmp_path / "recovered").report()["recovery"]["num_images"] == 21


def test_a_dense_model_has_nothing_to_recover(vit_folder, images):
    with pytest.raises(ModelError, match=r"no block-sparse layers to recover; call prune\(\) first"):
        BlockPruner.from_pretrained(vit_folder).recover(images)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(launch, vit_folder, images, tmp_path):
    recipe = tmp_path / "recipe.json"
    gentle = quick_config(lr=1e-4, batch_size=7)
    values = {**gentle.to_dict(), "model": str(vit_folder), "dataset": str(images)}
    recipe.write_text(json.dumps(values))
    for processes in (1, 2):
        arguments = [RECIPE, "--config", recipe, "--output", tmp_path / str(processes), "--quiet"]
        launch(arguments, processes=processes)
    one, two = (weights(AutoModelForImageClassification.from_pretrained(tmp_path / str(n))) for n in (1, 2))
    for name, value in one.items():  # Adam makes much of single gradients that are next to nothing, so not entrywise
        assert float((value - two[name]).double().norm()) <= 1e-4 * float(value.double().norm()), name


def test_an_interrupted_recovery_leaves_its_state_alone(forks, vit_folder, tmp_path):
    folder = write_images(tmp_path / "many", 24)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(quick_config(epochs=100_000).to_dict()))
    command = ["-m", "hf_blockprune.cli", "prune", vit_folder, "--config", recipe]
    process = forks.start(*command, "--dataset", folder, "--output", tmp_path / "out")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.unfinished/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.unfinished", "many", "recipe.json"]
