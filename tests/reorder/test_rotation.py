"""Rotations of heads keep the function, and leave to the last features what costs least to drop."""

import pytest
import torch

from hf_blockprune.config import BlockPruneConfig
from hf_blockprune.model.structure import find_transformer_layers
from hf_blockprune.model.targets import find_targets
from hf_blockprune.reorder.changes import Changes
from hf_blockprune.reorder.folding import fold_scales
from hf_blockprune.reorder.rotation import apply_rotation, choose_rotation
from hf_blockprune.score.statistics import LayerStatistics
from tests.conftest import ALL_FAMILIES, tiny_model


def seen_statistics(model, targets, images=16):
    """Statistics of real inputs and outputs, float64, with random importances of outputs; and outputs by name."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = {}, {}

    def hook(name):
        def record(module, args, output):
            inputs[name] = args[0].reshape(-1, args[0].shape[-1]).double()
            outputs[name] = output.reshape(-1, output.shape[-1]).double()

        return record

    handles = [linear.register_forward_hook(hook(name)) for name, linear in targets.items()]
    with torch.no_grad():
        model(pixel_values=torch.randn(images, 3, 32, 32, generator=generator))
    for handle in handles:
        handle.remove()
    statistics = {}
    for name, x in inputs.items():
        gradient = torch.randn(len(x), targets[name].out_features, generator=generator, dtype=torch.float64)
        gradient = gradient @ torch.randn(gradient.shape[1], gradient.shape[1], generator=generator).double()
        moment = gradient.t() @ gradient / len(x)
        statistics[name] = LayerStatistics(
            len(x),
            images,
            mean=x.mean(0),
            second_moment=x.t() @ x / len(x),
            output_weight=moment.diagonal(),
            gradient_moment=moment,
        )
    return statistics, inputs, outputs


@pytest.fixture(params=ALL_FAMILIES)
def setting(request):
    model = tiny_model(request.param)
    fold_scales(model)
    targets = find_targets(model, BlockPruneConfig(block_shape=(8, 8)))
    statistics, _, _ = seen_statistics(model, targets)
    return model, targets, statistics, find_transformer_layers(model, targets)


def rotated(layers, targets, statistics, changes=None):
    for layer in layers:
        statistics = statistics | apply_rotation(
            layer, choose_rotation(layer, targets, statistics), targets, statistics, changes
        )
    return statistics


def test_logits_stay(setting):
    model, targets, statistics, layers = setting
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = {layer.query: targets[layer.query].weight.detach().clone() for layer in layers}
    with torch.no_grad():
        dense = model(pixel_values=pixels).logits
        rotated(layers, targets, statistics)
        torch.testing.assert_close(model(pixel_values=pixels).logits, dense, atol=1e-5, rtol=1e-5)
    assert layers
    assert not any(torch.allclose(weight, targets[name].weight, atol=1e-2) for name, weight in before.items())


def test_statistics_are_those_of_the_rotated_model(setting):
    model, targets, statistics, layers = setting
    moved = rotated(layers, targets, statistics)
    fresh, _, _ = seen_statistics(model, targets)
    for layer in layers:
        for part in ("mean", "second_moment"):
            have, want = getattr(moved[layer.out], part), getattr(fresh[layer.out], part)
            torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
        for name in (layer.query, layer.key, layer.value):
            # Gradient times output is the same in any features.
            weight = targets[name].weight.detach().double()
            worth = (moved[name].gradient_moment @ weight @ weight.t()).trace()
            assert worth > 0
            torch.testing.assert_close(moved[name].gradient_moment.diagonal(), moved[name].output_weight)


def test_gradients_of_rotated_outputs(setting):
    """dLoss/dy' of y' = T y is T^-T dLoss/dy, so that y'^T dLoss/dy' stays what it was."""
    _, targets, statistics, layers = setting
    before = {n: (statistics[n].gradient_moment, targets[n].weight.detach().double()) for n in targets}
    moved = rotated(layers, targets, statistics)
    for layer in layers:
        for name in (layer.query, layer.key, layer.value):
            moment, weight = before[name]
            now = targets[name].weight.detach().double()
            # W^T G W, the gradient's moment at the input, does not know of the outputs' features.
            torch.testing.assert_close(
                now.t() @ moved[name].gradient_moment @ now,
                weight.t() @ moment @ weight,
                rtol=1e-3,
                atol=1e-4 * float(moment.abs().max()),
            )


def test_products_of_fewer_features_are_the_best_of_their_rank():
    """Against the singular values of all logits, which no product of fewer features can beat."""
    model = tiny_model("vit", hidden_size=48, num_attention_heads=3)
    targets = find_targets(model, BlockPruneConfig(block_shape=(8, 8)))
    statistics, _, _ = seen_statistics(model, targets)
    layer = find_transformer_layers(model, targets)[0]
    rotated([layer], targets, statistics)
    _, _, outputs = seen_statistics(model, targets)
    query, key = outputs[layer.query], outputs[layer.key]
    key = key - key.mean(0)
    for head in range(3):
        q, k = (values[:, 16 * head : 16 * head + 16] for values in (query, key))
        wanted = torch.linalg.svdvals(q @ k.t())[:16].square()
        for kept in (4, 8, 12):
            error = (q[:, kept:] @ k[:, kept:].t()).square().sum()
            torch.testing.assert_close(error, wanted[kept:].sum(), rtol=1e-2, atol=1e-6 * float(wanted.sum()))


def test_values_are_sorted_by_what_they_cost_the_loss(setting):
    _, targets, statistics, layers = setting
    moved = rotated(layers, targets, statistics)
    for layer in layers:
        weight, s = targets[layer.out].weight.detach().double(), moved[layer.out]
        cost = (weight.t() * s.output_weight) @ weight
        size = len(cost) // layer.heads
        for start in range(0, len(cost), size):
            part = slice(start, start + size)
            worth = cost[part, part].diagonal() * s.variance[part]
            largest = float(worth[0])
            assert (worth[1:] <= worth[:-1] * (1 + 1e-2) + 1e-6 * largest).all()


def test_it_can_be_undone(setting):
    model, targets, statistics, layers = setting
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changes = Changes()
    rotated(layers, targets, statistics, changes)
    changes.undo()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_features_that_never_vary_stay_finite():
    model = tiny_model("vit")
    targets = find_targets(model, BlockPruneConfig(block_shape=(8, 8)))
    layer = find_transformer_layers(model, targets)[0]
    with torch.no_grad():
        for name in (layer.query, layer.value):
            targets[name].weight[:20] = 0
            targets[name].bias[:20] = 0
    statistics, _, _ = seen_statistics(model, targets)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        dense = model(pixel_values=pixels).logits
        rotated([layer], targets, statistics)
        torch.testing.assert_close(model(pixel_values=pixels).logits, dense, atol=1e-4, rtol=1e-4)
