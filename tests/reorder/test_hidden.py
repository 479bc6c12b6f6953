"""Permutations keep the function; coupling sees what the neighbours lost."""

import pytest
import torch

from hf_blockprune.choose.coupling import correct
from hf_blockprune.config import BlockPruneConfig
from hf_blockprune.errors import ConfigError
from hf_blockprune.model.structure import find_transformer_layers
from hf_blockprune.model.targets import find_targets
from hf_blockprune.reorder.hidden import apply_moves, block_saliency_kept, packing_moves, sorting_moves
from hf_blockprune.score.statistics import LayerStatistics
from tests.conftest import TINY_MODELS, tiny_model


def statistics_of(linears, seed=0):
    """Made-up statistics of a full-rank covariance for each Linear."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, linear in linears.items():
        x = torch.randn(4 * linear.in_features, linear.in_features, generator=generator, dtype=torch.float64) + 0.3
        f = torch.rand(linear.out_features, generator=generator, dtype=torch.float64) ** 4
        made[name] = LayerStatistics(len(x), 4, mean=x.mean(0), second_moment=x.t() @ x / len(x), output_weight=f)
    return made


@pytest.fixture(params=TINY_MODELS)
def setting(request):
    model = tiny_model(request.param)
    targets = find_targets(model, BlockPruneConfig(block_shape=(8, 8)))
    return model, targets, statistics_of(targets), find_transformer_layers(model, targets)


def test_every_layer_is_found(setting):
    _, targets, _, layers = setting
    assert len(layers) == 2
    assert {name for layer in layers for name in list(vars(layer).values())[:6]} == set(targets)


def test_logits_stay_and_weights_move(setting):
    model, targets, statistics, layers = setting
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = {name: linear.weight.detach().clone() for name, linear in targets.items()}
    with torch.no_grad():
        dense = model(pixel_values=pixels).logits
        moves = sorting_moves(layers, targets, statistics)
        apply_moves(moves, targets, statistics)
        torch.testing.assert_close(model(pixel_values=pixels).logits, dense, atol=1e-5, rtol=1e-5)
    assert not any(torch.equal(before[name], linear.weight) for name, linear in targets.items())
    for move in moves:
        assert sorted(move.order.tolist()) == list(range(len(move.order)))


def test_heads_move_whole_and_keep_their_features(setting):
    _, targets, statistics, layers = setting
    orders = {}
    for move in sorting_moves(layers, targets, statistics):
        for name in move.producers:
            orders[name] = (move.order // 16).view(-1, 16) if len(move.order) == 48 else None
    for layer in layers:
        heads = orders[layer.value]
        assert (heads == heads[:, :1]).all()
        assert torch.equal(heads, orders[layer.query])
        assert torch.equal(heads, orders[layer.key])


def test_the_head_worth_most_comes_first(setting):
    _, targets, statistics, layers = setting
    layer = layers[0]
    for name in (layer.query, layer.key, layer.value):
        targets[name].weight.data[32:] *= 100  # the last of three heads
    moves = sorting_moves(layers, targets, statistics)
    assert all((move.order[:16] >= 32).all() for move in moves if layer.query in move.producers)
    assert all((move.order[:16] >= 32).all() for move in moves if layer.value in move.producers)


def test_statistics_move_with_the_weights(setting):
    """Moved statistics describe the moved model: each Linear's loss of losing everything is unchanged."""
    _, targets, statistics, layers = setting

    def loss(name, linear, s):
        weight = linear.weight.detach().double()
        covariance = s.second_moment - torch.outer(s.mean, s.mean)
        return float((s.output_weight * ((weight @ covariance) * weight).sum(1)).sum())

    before = {name: loss(name, linear, statistics[name]) for name, linear in targets.items()}
    moved = apply_moves(sorting_moves(layers, targets, statistics), targets, statistics)
    for name, linear in targets.items():
        assert loss(name, linear, moved[name]) == pytest.approx(before[name], rel=1e-6)


def test_sorting_packs_saliency_into_blocks(setting):
    _, targets, statistics, layers = setting
    before = block_saliency_kept(targets, statistics, (8, 8), 0.5)
    moved = apply_moves(sorting_moves(layers, targets, statistics), targets, statistics)
    assert block_saliency_kept(targets, moved, (8, 8), 0.5) > before


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (16, 1)])
def test_packing_leaves_the_function_and_the_heads(setting, shape):
    model, targets, statistics, layers = setting
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = block_saliency_kept(targets, statistics, shape, 0.5)
    with torch.no_grad():
        dense = model(pixel_values=pixels).logits
        moves = packing_moves(layers, targets, statistics, shape)
        moved = apply_moves(moves, targets, statistics)
        torch.testing.assert_close(model(pixel_values=pixels).logits, dense, atol=1e-5, rtol=1e-5)
    assert block_saliency_kept(targets, moved, shape, 0.5) > before
    for move in moves:
        assert sorted(move.order.tolist()) == list(range(len(move.order)))
        if len(move.order) == 48:
            assert (move.order // 16).tolist() == [i // 16 for i in range(48)]


def test_nothing_removed_corrects_nothing(setting):
    _, targets, statistics, layers = setting
    masks = {n: torch.ones(-(-t.out_features // 8), t.in_features // 8, dtype=torch.bool) for n, t in targets.items()}
    for name, s in correct(layers, targets, statistics, masks, (8, 8)).items():
        torch.testing.assert_close(s.output_weight, statistics[name].output_weight)
        torch.testing.assert_close(s.second_moment, statistics[name].second_moment)


def test_a_unit_without_reader_or_writer_is_worth_nothing(setting):
    _, targets, statistics, layers = setting
    masks = {n: torch.ones(-(-t.out_features // 8), t.in_features // 8, dtype=torch.bool) for n, t in targets.items()}
    layer = layers[0]
    masks[layer.fc2][:, 2] = False  # units 16 to 23 are read by nobody
    masks[layer.fc1][5] = False  # units 40 to 47 are computed by nobody
    masks[layer.key][1] = False  # features 8 to 15 of query meet nothing
    corrected = correct(layers, targets, statistics, masks, (8, 8))
    assert (corrected[layer.fc1].output_weight[16:24] == 0).all()
    assert (corrected[layer.fc1].output_weight[:16] > 0).all()
    s = corrected[layer.fc2]
    covariance = s.second_moment - torch.outer(s.mean, s.mean)
    assert covariance[40:48].abs().max() == 0
    assert covariance[:40, :40].diagonal().min() > 0
    assert (corrected[layer.query].output_weight[8:16] == 0).all()
    assert (corrected[layer.query].output_weight[:8] > 0).all()


def test_permute_needs_obs():
    with pytest.raises(ConfigError, match="permute"):
        BlockPruneConfig(method="taylor", permute=True)
    assert BlockPruneConfig().permutes
    assert not BlockPruneConfig(method="taylor").permutes
    assert not BlockPruneConfig(permute=False).permutes
    for changes in ({"method": "taylor"}, {"permute": False}):
        with pytest.raises(ConfigError, match="permute_stream"):
            BlockPruneConfig(permute_stream=True, **changes)
        assert not BlockPruneConfig(**changes).permutes_stream
    assert BlockPruneConfig().permutes_stream
    assert not BlockPruneConfig(permute_stream=False).permutes_stream
