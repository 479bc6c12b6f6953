"""Regressions and several labels an image: losses, the true Fisher, divergences and scores against brute force."""

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_blockprune import BlockPruneConfig, BlockPruner, ConfigError, DataError, FinetuneConfig
from hf_blockprune.calibration.collect import collect
from hf_blockprune.data.batches import load_images
from hf_blockprune.evaluate.metrics import mean_average_precision, micro_f1, r_squared
from hf_blockprune.model.tasks import MULTI, REGRESSION, MultiLabel, Regression, SingleLabel
from hf_blockprune.report.tables import evaluation_table, summary_table
from tests.conftest import tiny_model

NAMES = {"multi": {i: f"class {i}" for i in range(4)}, "numbers": {i: f"number {i}" for i in range(4)}}
TASKS = {"multi": (MULTI, MultiLabel(4)), "numbers": (REGRESSION, Regression(4))}


def made(kind):
    return tiny_model(problem_type=TASKS[kind][0], id2label=NAMES[kind])


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(24)]


def answers(model, processor, pictures):
    with torch.no_grad():
        return model(pixel_values=processor(images=pictures, return_tensors="pt")["pixel_values"]).logits


def answered(kind, processor, pictures):
    """A data set whose labels are the model's own answers."""
    outputs = answers(made(kind), processor, pictures)
    values = (outputs > 0).float() if kind == "multi" else outputs
    return datasets.Dataset.from_dict({"image": pictures, "label": values.tolist()})


@pytest.mark.parametrize("kind", TASKS)
def test_sampled_labels_make_the_true_fisher(kind, processor, pictures, accelerator):
    """The mean over many draws of the squared gradient is that of the expected one, from the outputs' Jacobian."""
    model = made(kind).double()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".1." in n}
    name = next(n for n in linears if n.endswith("fc2"))
    few = load_images(datasets.Dataset.from_dict({"image": pictures[:2]}))
    found = [
        collect(model, few, processor, {name: linears[name]}, accelerator=accelerator, fisher=True, seed=seed)[0]
        for seed in range(300)
    ]
    got = torch.stack([statistics[name].output_weight for statistics in found]).mean(0)
    kept = []
    handle = linears[name].register_forward_hook(lambda _, inputs, output: kept.append(output))
    pixels = processor(images=pictures[:2], return_tensors="pt")["pixel_values"].double()
    outputs = model(pixel_values=pixels).logits
    handle.remove()
    expected = torch.zeros_like(got)
    for output in range(4):
        gradient = torch.autograd.grad(outputs[:, output].sum(), kept[0], retain_graph=True)[0]
        share = outputs[:, output].sigmoid()
        variance = share * (1 - share) if kind == "multi" else torch.ones_like(share)
        expected += (gradient.square() * variance[:, None, None]).sum((0, 1))
    expected = expected.detach() / (kept[0].shape[0] * kept[0].shape[1])
    assert float(got.sum() / expected.sum()) == pytest.approx(1, abs=0.2)
    assert torch.corrcoef(torch.stack([got, expected]))[0, 1] > 0.95


def test_losses_and_divergences_against_formulas():
    torch.manual_seed(0)
    wanted, have, labels = torch.randn(3, 5, 4, dtype=torch.float64)
    share, other = wanted.sigmoid(), have.sigmoid()
    bernoulli = share * (share / other).log() + (1 - share) * ((1 - share) / (1 - other)).log()
    torch.testing.assert_close(MultiLabel(4).divergence(wanted, have), bernoulli.sum(-1))
    torch.testing.assert_close(
        MultiLabel(4).losses(have, (labels > 0).double()),
        F.binary_cross_entropy(other, (labels > 0).double(), reduction="none").sum(-1),
    )
    torch.testing.assert_close(Regression(4).losses(have, labels), ((have - labels) ** 2).sum(-1) / 2)
    scaled = Regression(4).scaled(wanted)
    # A shift by the answers' own spread is half a nat, whatever unit they come in.
    for unit in (1.0, 1e3):
        task = Regression(1).scaled(unit * wanted[:, :1])
        shift = unit * wanted[:, :1].std(unbiased=False)
        torch.testing.assert_close(task.divergence(wanted[:, :1] * unit, wanted[:, :1] * unit + shift)[0].item(), 0.5)
    assert scaled.variance == pytest.approx(float(wanted.var(0, unbiased=False).sum()))
    for task in (SingleLabel(4), MultiLabel(4), scaled):
        assert float(task.divergence(wanted, wanted).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", TASKS)
def test_the_models_own_answers_are_perfect_and_are_compared(kind, processor, pictures):
    data = answered(kind, processor, pictures)
    other = tiny_model(seed=1, problem_type=TASKS[kind][0], id2label=NAMES[kind])
    found = BlockPruner(made(kind), processor).evaluate(data, against=BlockPruner(other, processor))
    assert not hasattr(found, "top1")
    worse = BlockPruner(other, processor).evaluate(data)
    assert found.scores[found.main] == pytest.approx(1, abs=1e-6)
    assert found.delta == pytest.approx(1 - worse.scores[worse.main], abs=1e-6)
    assert found.delta > 0
    if kind == "numbers":
        assert found.mean_squared_error < 1e-9
        assert found.interval[0] < found.delta < found.interval[1]
    else:
        assert found.f1 == 1
    assert evaluation_table(found.to_dict()).row_count >= 5
    labelled = datasets.Dataset.from_dict({"image": pictures, "label": [0] * 24})
    classes = BlockPruner(tiny_model(id2label=NAMES[kind]), processor).predictions(labelled)
    with pytest.raises(DataError, match="two tasks cannot be compared"):
        BlockPruner(made(kind), processor).evaluate(data, against=classes)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("method", ["obs", "taylor"])
def test_pruning_recovery_and_training_in_the_models_own_task(kind, method, processor, pictures, tmp_path):
    data = answered(kind, processor, pictures)
    plain = {"method": method, "block_shape": [8, 8], "budget": {"metric": "density", "ratio": 0.7}}
    recovery = {"epochs": 4, "reconstruction_epochs": 1, "batch_size": 8}
    dense = BlockPruner(made(kind), processor)
    pruner = BlockPruner(made(kind), processor, BlockPruneConfig.from_dict({**plain, "recovery": recovery}))
    pruner.prune(data)
    before = pruner.evaluate(data, against=dense)
    pruner.recover(data, teacher=dense)
    steps = pruner.report()["recovery"]["divergence"]
    assert steps[pruner.report()["recovery"]["kept"]] <= steps["pruned"]
    after = pruner.evaluate(data, against=dense)
    # A chance for all, with room for what the held-back images chose.
    assert after.scores[after.main] > before.scores[before.main] - 0.2
    augment = {"mixup": 0.8, "cutmix": 0.0, "operations": 1}
    options = {"epochs": 2, "batch_size": 8, "micro_batch": 4, "warmup_epochs": 0, "augment": augment}
    pruner.finetune(data, FinetuneConfig.from_dict(options), teacher=dense, evaluation=data)
    history = pruner.report()["finetuning"]
    assert all(np.isfinite(history["losses"]))
    assert set(history["evaluations"][0]) == {"epoch", "num_images", *after.scores}
    pruner.evaluate(data, against=dense)
    assert summary_table(pruner.report()).row_count > 5
    pruner.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved/README.md").read_text()
    assert ("mean average precision" if kind == "multi" else "R2") in card
    assert "top-1" not in card.split("## Speed")[0]


def test_hard_labels_of_numbers_are_refused(processor, pictures):
    pruner = BlockPruner(
        made("numbers"),
        processor,
        BlockPruneConfig.from_dict({"method": "magnitude", "refit": False, "block_shape": [8, 8]}),
    )
    pruner.prune()
    data, teacher = answered("numbers", processor, pictures), BlockPruner(made("numbers"), processor)
    for distillation, expected in (({"kind": "hard"}, "no likeliest class"), ({"temperature": 2.0}, "has none")):
        settings = FinetuneConfig.from_dict({"epochs": 1, "warmup_epochs": 0, "distillation": distillation})
        with pytest.raises(ConfigError, match=expected):
            pruner.finetune(data, settings, teacher=teacher)


@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(-3, 3), min_size=3, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3)
        ),
        min_size=1,
        max_size=12,
    )
)
def test_scores_against_loops(rows):
    scores, truth = (np.array(side) for side in zip(*rows, strict=True))
    precisions = []
    for score, here in zip(scores.T, truth.T, strict=True):
        if here.any():
            each = [here[score >= score[i]].mean() for i in np.flatnonzero(here)]
            precisions.append(np.mean(each))
    expected = np.mean(precisions) if precisions else 0.0
    assert mean_average_precision(scores.astype(float), truth.astype(float)) == pytest.approx(expected)
    right = sum(bool(a and b) for a, b in zip((scores > 0).flat, truth.flat, strict=True))
    said = (scores > 0).sum() + truth.sum()
    assert micro_f1(scores > 0, truth) == pytest.approx(2 * right / said if said else 0)


def test_explained_variance_by_hand():
    labels = np.array([[0.0, 5], [2, 5], [4, 5]])
    assert r_squared(labels, labels) == 1
    assert r_squared(np.full_like(labels, 2.0), labels) == 0  # the second output does not vary
    assert r_squared(labels[::-1], labels) == pytest.approx(1 - 4)
