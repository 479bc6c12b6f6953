"""Losses and schedules against float64 formulas."""

import math
from itertools import pairwise

import pytest
import torch

from hf_blockprune import ModelError
from hf_blockprune.finetune.loss import hard_distillation, hidden_distance, label_losses, soft_distillation
from hf_blockprune.finetune.schedule import LearningRates, PruningSteps
from hf_blockprune.model.tasks import SingleLabel

CLASSES = SingleLabel(7)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(2, 5, 7, dtype=torch.float64) * 4


def probabilities(logits, temperature=1.0):
    return [[math.exp(v / temperature) for v in row] for row in logits.tolist()]


def shares(row):
    return [v / sum(row) for v in row]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_soft_distillation_is_the_divergence_times_the_squared_temperature(logits, dtype, temperature):
    have, wanted = logits
    expected = []
    for p, q in zip(probabilities(wanted, temperature), probabilities(have, temperature), strict=True):
        pairs = zip(shares(p), shares(q), strict=True)
        expected.append(temperature**2 * sum(a * math.log(a / b) for a, b in pairs))
    got = soft_distillation(CLASSES, have.to(dtype), wanted.to(dtype), temperature)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_hard_distillation_is_the_cross_entropy_with_the_teachers_class(logits):
    have, wanted = logits
    expected = [
        -math.log(shares(q)[max(range(7), key=p.__getitem__)])
        for p, q in zip(wanted.tolist(), probabilities(have), strict=True)
    ]
    torch.testing.assert_close(hard_distillation(CLASSES, have, wanted), torch.tensor(expected, dtype=torch.float64))


def test_cross_entropy_takes_shares_of_classes_and_none(logits):
    have, other = logits
    targets = other.softmax(-1)
    targets[2] = 0
    expected = [
        -sum(t * math.log(v) for t, v in zip(row, shares(q), strict=True))
        for row, q in zip(targets.tolist(), probabilities(have), strict=True)
    ]
    got = label_losses(CLASSES, have, targets)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    assert got[2] == 0


def test_hidden_distance_is_that_of_each_image_alone():
    torch.manual_seed(0)
    have, wanted = ([torch.randn(3, 4, size, dtype=torch.float64) for size in (5, 6)] for _ in range(2))
    expected = [
        sum(float((a[i] - b[i]).square().mean() / b[i].var(unbiased=False)) for a, b in zip(have, wanted, strict=True))
        / 2
        for i in range(3)
    ]
    got = hidden_distance(have, wanted)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(hidden_distance([h[:1] for h in have], [w[:1] for w in wanted]), got[:1])
    with pytest.raises(ModelError, match="the teacher's hidden states have other shapes than the model's"):
        hidden_distance(have, wanted[:1])


def test_rates_rise_on_a_line_and_fall_on_a_cosine():
    rates = LearningRates(peak=1e-3, last=1e-5, first=1e-6, warmup_steps=10, steps=110)
    got = [rates.at(step) for step in range(111)]
    assert got[0] == 1e-6
    assert got[5] == pytest.approx((1e-6 + 1e-3) / 2)
    assert max(got) == got[10] == 1e-3
    assert got[60] == pytest.approx((1e-3 + 1e-5) / 2)
    assert got[110] == pytest.approx(1e-5)
    assert all(a < b for a, b in pairwise(got[:11]))
    assert all(a > b for a, b in pairwise(got[10:]))
    assert LearningRates(peak=2.0, last=0.0, first=0.1, warmup_steps=0, steps=1).at(0) == 2.0


def test_kept_shares_follow_the_cubic_curve():
    steps = PruningSteps(begin=0.9, goal=0.5, first=20, last=121, every=10)
    got = {step: kept for step in range(200) if (kept := steps.kept_after(step)) is not None}
    assert list(got) == [*range(30, 121, 10), 121]
    assert got[121] == 0.5
    assert got[70] == pytest.approx(0.5 + 0.4 * (1 - 50 / 101) ** 3)
    assert sorted(got.values(), reverse=True) == list(got.values())
    assert PruningSteps(begin=1.0, goal=0.5, first=5, last=5, every=2).kept_after(5) == 0.5
