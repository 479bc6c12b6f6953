"""Statistics weighted by squared output gradients, against one autograd call an image in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from hf_blockprune.calibration.collect import collect
from hf_blockprune.data.batches import decode_image, load_images
from hf_blockprune.model.tasks import SingleLabel
from tests.conftest import tiny_model

KEYS = ("mean", "second_moment", "output_weight", "token_weight")
SEED = 3


def targets_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}


def collected(model, images, processor, accelerator, **settings):
    settings = {"fisher": True, "batch_size": 7, "seed": SEED, **settings}
    return collect(model, images, processor, targets_of(model), accelerator=accelerator, **settings)[0]


def one_by_one(model, images, processor):
    """Per target (x [images, tokens, in], dLoss/dy [images, tokens, out]), the label drawn from the prediction."""
    targets = targets_of(model)
    result = {name: ([], []) for name in targets}
    for i, record in enumerate(images.dataset):
        seen = {}

        def keep(_, inputs, output, *, name, seen=seen):
            seen[name] = (inputs[0], output)

        handles = [linear.register_forward_hook(partial(keep, name=name)) for name, linear in targets.items()]
        pixels = processor(images=decode_image(record["image"]), return_tensors="pt")["pixel_values"].double()
        logits = model(pixel_values=pixels).logits
        for handle in handles:
            handle.remove()
        label = SingleLabel(logits.shape[-1]).sample(logits, torch.tensor([i]), SEED)
        grads = torch.autograd.grad(F.cross_entropy(logits, label), [seen[name][1] for name in targets])
        for name, grad in zip(targets, grads, strict=True):
            result[name][0].append(seen[name][0].detach()[0])
            result[name][1].append(grad[0])
    return {name: (torch.stack(x), torch.stack(grad)) for name, (x, grad) in result.items()}


def assert_close_at_scale(got, expected, relative):
    """Entries may lose digits to cancellation; the largest one sets the scale."""
    torch.testing.assert_close(got.double(), expected, rtol=relative, atol=relative * float(expected.abs().max()))


@pytest.fixture(scope="module")
def model():
    return tiny_model().double()


@pytest.fixture(scope="module")
def reference(model, found, processor):
    return one_by_one(model, found, processor)


@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_against_brute_force(model, found, processor, accelerator, reference, batch_size):
    """The loss is taken in float32 whatever the model's dtype."""
    got = collected(model, found, processor, accelerator, batch_size=batch_size)
    assert set(got) == set(reference)
    for name, (x, grad) in reference.items():
        weight = grad.square().sum(-1)  # [images, tokens]
        assert (got[name].num_images, got[name].num_tokens) == (24, weight.numel())
        mean = torch.einsum("nt,nti->i", weight, x) / weight.sum()
        second = torch.einsum("nt,nti,ntj->ij", weight, x, x) / weight.sum()
        for key in KEYS:
            assert getattr(got[name], key).dtype == torch.float64
        assert_close_at_scale(got[name].mean, mean, 1e-5)
        assert_close_at_scale(got[name].second_moment, second, 1e-5)
        assert_close_at_scale(got[name].output_weight, grad.square().mean((0, 1)), 1e-5)
        assert_close_at_scale(got[name].token_weight, weight.mean(0) / weight.mean(), 1e-5)
        assert got[name].gradient is got[name].block_gradients is None


def test_weighted_means_are_not_the_plain_ones(model, found, processor, accelerator, reference):
    """Or the test above would not tell them apart."""
    got = collected(model, found, processor, accelerator)
    for name, (x, _) in reference.items():
        assert (got[name].mean - x.mean((0, 1))).norm() > 0.01 * x.mean((0, 1)).norm()


def test_only_tokens_that_the_head_reads_count_in_the_last_layer(family, found, processor, accelerator):
    model = tiny_model(family)
    got = collected(model, found, processor, accelerator)
    read = 2 if family == "deit-distilled" else 1
    last = model.config.num_hidden_layers - 1
    for name, statistics in got.items():
        assert float(statistics.token_weight.mean()) == pytest.approx(1)
        assert (statistics.token_weight >= 0).all()
        assert (statistics.token_weight[:read] > 0).all()
        patches = statistics.token_weight[read:]
        reads_all = name.endswith(("k_proj", "v_proj")) or f".layers.{last}." not in name
        assert (patches > 0).all() if reads_all else (patches == 0).all(), name


def test_labels_in_the_data_set_do_not_matter(model, found, processor, accelerator):
    without = load_images(found.dataset.remove_columns("label"))
    constant = load_images(found.dataset.map(lambda record: {"label": 1}))
    expected = collected(model, found, processor, accelerator)
    for images in (without, constant):
        got = collected(model, images, processor, accelerator)
        for name in expected:
            for key in KEYS:
                assert torch.equal(getattr(got[name], key), getattr(expected[name], key))


def test_seed_draws_other_labels(model, found, processor, accelerator):
    one, same, other = (collected(model, found, processor, accelerator, seed=seed) for seed in (0, 0, 1))
    for name in one:
        assert torch.equal(one[name].output_weight, same[name].output_weight)
        assert not torch.allclose(one[name].output_weight, other[name].output_weight, rtol=1e-3)


def test_model_is_left_as_it_was(found, processor, accelerator):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collected(model, found, processor, accelerator)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_fisher_tokens_weigh_the_same(model, found, processor, accelerator, reference):
    got = collected(model, found, processor, accelerator, fisher=False, moments=True, gradients=True)
    for name, (x, _) in reference.items():
        assert_close_at_scale(got[name].mean, x.mean((0, 1)), 1e-10)
