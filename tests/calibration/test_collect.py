"""Collected statistics against one autograd call an image, and one process against two."""

import datasets
import pytest
import torch
import torch.nn.functional as F

from hf_blockprune import DataError
from hf_blockprune.calibration import accumulator as calibration
from hf_blockprune.calibration.collect import collect
from hf_blockprune.data.batches import decode_image, load_images
from hf_blockprune.model.tasks import SingleLabel
from tests.conftest import tiny_model, write_images

BLOCK_SHAPE = (16, 32)  # does not divide the 48 and 96 wide matrices evenly
NUM_TOKENS = 17
STATISTICS = ("mean", "second_moment", "output_weight", "gradient")


def double_model(**changes):
    return tiny_model(**changes).double()


def targets_of(model):
    """One matrix of each shape."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("vit.")}
    by_shape = {tuple(m.weight.shape): n for n, m in linears.items()}
    assert set(by_shape) == {(48, 48), (96, 48), (48, 96)}
    return {name: linears[name] for name in by_shape.values()}


def collected(model, images, processor, accelerator, *, targets=None, **settings):
    wanted = {"moments": True, "gradients": True, "block_shape": BLOCK_SHAPE, "batch_size": 7, **settings}
    statistics, corrupt = collect(
        model, images, processor, targets or targets_of(model), accelerator=accelerator, **wanted
    )
    assert corrupt.files == []
    return statistics


def watched(model, targets, pixels, label):
    """What each target reads and its gradients, for one image: {name: (x, dLoss/dy, dLoss/dW)}."""
    seen = {}
    handles = [
        linear.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
        for name, linear in targets.items()
    ]
    loss = F.cross_entropy(model(pixel_values=pixels).logits, torch.tensor([label]))
    for handle in handles:
        handle.remove()
    outputs, weights = [seen[name][1] for name in targets], [linear.weight for linear in targets.values()]
    grads = torch.autograd.grad(loss, [*outputs, *weights])
    return {name: (seen[name][0].detach()[0], grads[i][0], grads[len(targets) + i]) for i, name in enumerate(targets)}


def one_by_one(model, images, processor, targets):
    """Per target a list over images of (x, dLoss/dy, dLoss/dW), each image alone and in float64."""
    result = {name: [] for name in targets}
    for record in images.dataset:
        pixels = processor(images=decode_image(record["image"]), return_tensors="pt")["pixel_values"].double()
        for name, values in watched(model, targets, pixels, record["label"]).items():
            result[name].append(values)
    return result


def block_products(gradient, weight):
    """<dLoss/dW, W> over each block, by loops."""
    product, (rows, cols) = gradient * weight, BLOCK_SHAPE
    return torch.tensor(
        [
            [float(product[i : i + rows, j : j + cols].sum()) for j in range(0, product.shape[1], cols)]
            for i in range(0, product.shape[0], rows)
        ],
        dtype=torch.float64,
    )


def between_blocks(rows):
    """Mean over rows of the outer product of a row with itself."""
    rows = rows.double().flatten(1)
    return rows.t() @ rows / len(rows)


def assert_close_at_scale(got, expected, relative):
    """Entries may lose digits to cancellation; the largest one sets the scale."""
    torch.testing.assert_close(got.double(), expected, rtol=relative, atol=relative * float(expected.abs().max()))


@pytest.fixture(scope="module")
def model():
    return double_model()


@pytest.fixture(scope="module")
def reference(model, found, processor):
    return one_by_one(model, found, processor, targets_of(model))


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_moments_against_brute_force(model, found, processor, accelerator, reference, batch_size):
    got = collected(model, found, processor, accelerator, batch_size=batch_size, gradients=False)
    for name, images in reference.items():
        tokens = torch.cat([x for x, _, _ in images])
        assert (got[name].num_tokens, got[name].num_images) == (len(tokens), 24) == (24 * NUM_TOKENS, 24)
        assert got[name].mean.dtype == got[name].second_moment.dtype == torch.float64
        assert_close_at_scale(got[name].mean, tokens.mean(0), 1e-10)
        assert_close_at_scale(got[name].second_moment, tokens.t() @ tokens / len(tokens), 1e-10)


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_gradients_against_brute_force(model, found, processor, accelerator, reference, batch_size):
    """The loss is taken in float32 whatever the model's dtype."""
    got = collected(model, found, processor, accelerator, batch_size=batch_size, moments=False)
    for name, images in reference.items():
        weight = model.get_submodule(name).weight.detach()
        output_grads = torch.cat([dy for _, dy, _ in images])
        assert_close_at_scale(got[name].output_weight, output_grads.square().mean(0), 1e-5)
        assert_close_at_scale(got[name].gradient, torch.stack([dw for _, _, dw in images]).mean(0), 1e-5)
        products = torch.stack([block_products(dw, weight) for _, _, dw in images])
        assert_close_at_scale(between_blocks(got[name].block_gradients), between_blocks(products), 1e-5)


def test_only_what_was_asked_for_is_collected(model, found, processor, accelerator):
    moments = collected(model, found, processor, accelerator, gradients=False)
    gradients = collected(model, found, processor, accelerator, moments=False)
    for name in moments:
        assert moments[name].gradient is moments[name].block_gradients is moments[name].output_weight is None
        assert gradients[name].mean is gradients[name].second_moment is None


def test_large_layers_are_taken_a_few_images_at_a_time(model, found, processor, accelerator, monkeypatch):
    whole = collected(model, found, processor, accelerator)
    monkeypatch.setattr(calibration, "GRADIENT_BYTES_AT_ONCE", 2 * 48 * 48 * 8)
    assert_same_statistics(collected(model, found, processor, accelerator), whole, 1e-6)


def assert_same_statistics(got, expected, relative):
    assert set(got) == set(expected)
    for name in expected:
        assert (got[name].num_tokens, got[name].num_images) == (expected[name].num_tokens, expected[name].num_images)
        for key in STATISTICS:
            assert_close_at_scale(getattr(got[name], key), getattr(expected[name], key), relative)
        assert_close_at_scale(got[name].block_gradients, expected[name].block_gradients.double(), relative)


def test_images_beyond_the_rows_share_them_with_signs(model, found, processor, accelerator, reference, monkeypatch):
    monkeypatch.setattr(calibration, "FISHER_ROWS", 5)
    got = collected(model, found, processor, accelerator)
    signs = calibration._signs(torch.arange(24))
    assert signs[:5].tolist() == [1] * 5
    assert set(signs.tolist()) == {-1, 1}
    for name, images in reference.items():
        weight = model.get_submodule(name).weight.detach()
        rows = torch.zeros(5, 3 if weight.shape[0] == 48 else 6, 2 if weight.shape[1] == 48 else 3, dtype=torch.float64)
        for i, (_, _, dw) in enumerate(images):
            rows[i % 5] += signs[i] * block_products(dw, weight)
        assert got[name].block_gradients.shape == rows.shape
        assert_close_at_scale(got[name].block_gradients, rows * (5 / 24) ** 0.5, 1e-5)


def test_number_of_rows_does_not_grow_with_the_images(model, found, processor, accelerator):
    for statistics in collected(model, found, processor, accelerator).values():
        assert len(statistics.block_gradients) == calibration.FISHER_ROWS


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_signs_of_images_in_one_row_are_uncorrelated(lag):
    """Products of two images in a row must average out, or the folded Fisher is biased."""
    rows, times = calibration.FISHER_ROWS, 20
    signs = calibration._signs(torch.arange(rows * times)).view(times, rows)[1:]
    assert abs(float(signs.mean())) < 0.05
    assert abs(float((signs[lag:] * signs[:-lag]).mean())) < 0.05


def test_model_is_left_as_it_was(found, processor, accelerator):
    model = double_model()
    frozen = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collected(model, found, processor, accelerator)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_model_in_training_mode_is_left_in_it(found, processor, accelerator):
    model = double_model().train()
    collected(model, found, processor, accelerator)
    assert model.training


def test_model_is_left_as_it_was_after_an_error(found, processor, accelerator):
    model = double_model(id2label={i: str(i) for i in range(3)})
    with pytest.raises(DataError, match=r"label 3 lies outside the model's 3 classes"):
        collected(model, found, processor, accelerator)
    assert all(p.requires_grad for p in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())


def test_dropout_is_off_even_in_training_mode(found, processor, accelerator):
    model = double_model(hidden_dropout_prob=0.5).train()
    first, second = (collected(model, found, processor, accelerator) for _ in range(2))
    assert_same_statistics(first, second, 1e-12)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    return load_images(write_images(tmp_path_factory.mktemp("unlabelled"), 12, labels=False))


def test_sampled_labels_do_not_depend_on_batches(model, unlabelled, processor, accelerator):
    one, several = (collected(model, unlabelled, processor, accelerator, batch_size=size) for size in (1, 5))
    assert_same_statistics(one, several, 1e-5)


def test_sampled_labels_depend_on_the_seed(model, unlabelled, processor, accelerator):
    name = next(iter(targets_of(model)))
    grads = [collected(model, unlabelled, processor, accelerator, seed=seed)[name].gradient for seed in (0, 0, 1)]
    assert torch.equal(grads[0], grads[1])
    assert (grads[0] - grads[2]).norm() > 0.1 * grads[0].norm()


def test_sampled_labels_follow_the_prediction():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().repeat(3000, 1)
    labels = SingleLabel(3).sample(logits, torch.arange(3000), seed=0)
    shares = torch.bincount(labels, minlength=3) / 3000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.03)


def test_a_certain_prediction_is_its_own_label(found, processor, accelerator):
    """With one possible label, images without labels and images with that label agree."""
    model = double_model()
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([-60.0, 60.0, -60, -60, -60, -60, -60]).double()
    with_label = found.dataset.map(lambda record: {"label": 1})
    without = found.dataset.remove_columns("label")
    first, second = (collected(model, load_images(d), processor, accelerator) for d in (with_label, without))
    for name in first:
        assert torch.equal(first[name].block_gradients, second[name].block_gradients)


@pytest.mark.parametrize("batch_size", [5, 24])
def test_stream_gives_the_same_statistics(model, found, processor, accelerator, batch_size):
    stream = load_images(found.dataset.to_iterable_dataset())
    assert isinstance(stream.dataset, datasets.IterableDataset)
    expected = collected(model, found, processor, accelerator, batch_size=batch_size)
    assert_same_statistics(collected(model, stream, processor, accelerator, batch_size=batch_size), expected, 1e-12)


def test_loss_that_is_not_finite_is_refused(found, processor, accelerator):
    model = double_model()
    model.classifier.bias.data[2] = float("nan")
    expected = r"^the predictions for calibration image picture_000\.png are not finite; check the image, the model"
    with pytest.raises(DataError, match=expected):
        collected(model, found, processor, accelerator)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named_by_layer_and_image(found, processor, accelerator, value):
    model = double_model()
    seen = []

    def spoil(module, args):
        images = range(len(seen), len(seen) + len(args[0]))
        seen.extend(images)
        if 13 in images:
            args[0][13 - images[0], 2, 5] = value

    second = next(name for name in targets_of(model) if ".1." in name)
    model.get_submodule(second).register_forward_pre_hook(spoil)
    expected = rf"^{second}: its inputs for calibration image picture_013\.png are not finite"
    with pytest.raises(DataError, match=expected):
        collected(model, found, processor, accelerator)


def test_corrupt_images_are_left_out_of_the_statistics(model, processor, accelerator, tmp_path):
    images = load_images(write_images(tmp_path, 101, size=8))
    targets = dict(list(targets_of(model).items())[:1])
    (tmp_path / "picture_013.png").write_bytes(b"not a picture")
    got, corrupt = collect(
        model,
        images,
        processor,
        targets,
        accelerator=accelerator,
        gradients=True,
        moments=True,
        block_shape=BLOCK_SHAPE,
    )
    assert [path.rsplit("/", 1)[-1] for path in corrupt.files] == ["picture_013.png"]
    assert corrupt.seen == 101
    rest = load_images(images.dataset.select([i for i in range(101) if i != 13]))
    expected = collected(model, rest, processor, accelerator, targets=targets, batch_size=16)
    for name in targets:
        assert got[name].num_images == 100
        for key in STATISTICS:
            assert_close_at_scale(getattr(got[name], key), getattr(expected[name], key), 1e-5)
        blocks = (between_blocks(s[name].block_gradients) for s in (got, expected))
        assert_close_at_scale(*blocks, 1e-5)


def test_too_many_corrupt_images_are_refused(model, processor, accelerator, tmp_path):
    write_images(tmp_path, 10, size=8)
    (tmp_path / "picture_003.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"1 of 10 images cannot be decoded.*picture_003\.png"):
        collected(model, load_images(tmp_path), processor, accelerator)


def test_half_precision_models_are_summed_in_float64(found, processor, accelerator, model):
    """bfloat16 keeps 8 bits; sums over hundreds of tokens must not lose more."""
    got = collected(tiny_model().bfloat16(), found, processor, accelerator)
    expected = collected(model, found, processor, accelerator)
    for name in expected:
        assert got[name].mean.dtype == torch.float64
        assert_close_at_scale(got[name].mean, expected[name].mean, 0.05)
        assert_close_at_scale(got[name].second_moment, expected[name].second_moment, 0.05)


SCRIPT = """
import sys

import torch
from accelerate import Accelerator
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_blockprune.calibration.collect import collect
from hf_blockprune.data.batches import load_images

model_folder, images, batch_size, out = sys.argv[1:]
accelerator = Accelerator()
model = AutoModelForImageClassification.from_pretrained(model_folder).double()
targets = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".1." in n}
statistics, corrupt = collect(
    model,
    load_images(images),
    AutoImageProcessor.from_pretrained(model_folder),
    targets,
    accelerator=accelerator,
    batch_size=int(batch_size),
    moments=True,
    gradients=True,
    block_shape=(16, 32),
)
everywhere = accelerator.gather(torch.tensor([accelerator.num_processes, corrupt.seen]))
if accelerator.is_main_process:
    torch.save((everywhere, {name: vars(s) for name, s in statistics.items()}), out)
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "num_batches"), [(8, 3), (5, 5)])
def test_two_processes_give_what_one_gives(launch, vit_folder, images, tmp_path, batch_size, num_batches):
    """An odd number of batches: one process has one more, and no image may be repeated to even them out."""
    assert -(-24 // batch_size) == num_batches
    assert num_batches % 2 == 1
    script = tmp_path / "collect.py"
    script.write_text(SCRIPT)
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        launch([script, vit_folder, images, batch_size, out], processes=processes)
        results.append(torch.load(out))
    (alone, one), (together, two) = results
    assert alone.tolist() == [1, 24]
    assert together.tolist() == [2, 24, 2, 24]
    assert set(one) == set(two) != set()
    for name in one:
        assert two[name]["num_images"] == one[name]["num_images"] == 24
        assert two[name]["num_tokens"] == one[name]["num_tokens"] == 24 * NUM_TOKENS
        for key in (*STATISTICS, "block_gradients"):
            assert_close_at_scale(two[name][key], one[name][key].double(), 1e-6)


def test_small_variances_beside_large_means_are_not_rounded_off(accelerator):
    """As of a class token in the first layer, which hardly differs from image to image."""
    linear = torch.nn.Linear(24, 3)
    accumulator = calibration.Accumulator("linear", linear, moments=True, fisher=False, block_shape=None)
    generator = torch.Generator().manual_seed(0)
    x = 100 + 1e-2 * torch.randn(6, 5, 24, generator=generator)
    for part in x.split(4):
        accumulator.index = torch.arange(len(part))
        accumulator.hook(linear, (part,), linear(part).detach())
    found = accumulator.finish(accelerator)
    tokens = x.double().flatten(0, 1)
    expected = torch.cov(tokens.t(), correction=0)
    torch.testing.assert_close(found.covariance, expected, rtol=0, atol=1e-4 * float(expected.diagonal().mean()))
    torch.testing.assert_close(found.mean, tokens.mean(0))
    torch.linalg.cholesky(found.covariance + 1e-3 * torch.diag(found.covariance.diagonal()))
