"""Methods to compare with, by brute force: what they solve in closed form is the optimum that they name."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import corp, dvbp
from benchmarks.moments import Hidden, Moments, by_head, collect
from benchmarks.narrow import narrow_attention, unit_flops, units_within
from hf_blockprune.cost.flops import count_flops
from hf_blockprune.model.layers import linear_in
from hf_blockprune.model.structure import find_transformer_layers
from tests.conftest import ROOT, tiny_model, write_images

SETTINGS = {
    corp: {"dimensions": 0.5, "rank": "active energy", "ridge": 1e-3, "logit_ridge": 1e-3},
    dvbp: {"covariance": "sample", "damping": 1e-3},
}
METHODS = pytest.mark.parametrize("method", [corp, dvbp])


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.fixture(scope="module")
def dense():
    return tiny_model("vit")


@pytest.fixture(scope="module")
def layers(dense):
    return find_transformer_layers(dense, linears(dense))


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def moments(dense, layers, pixels):
    return collect(dense, layers, pixels, heads=True)


@pytest.fixture
def inputs():
    """Correlated inputs [tokens, 12], and which of them go."""
    torch.manual_seed(1)
    x = torch.randn(200, 5, dtype=torch.float64) @ torch.randn(5, 12, dtype=torch.float64)
    x = x + 0.3 * torch.randn(200, 12, dtype=torch.float64) + torch.randn(12, dtype=torch.float64)
    return x, torch.tensor([1, 4, 5, 10])


def others(removed, size):
    return torch.tensor([i for i in range(size) if i not in removed.tolist()])


def moments_of(x):
    return x.mean(0), torch.cov(x.T, correction=0)


def affine_least_squares(x, y):
    """(slope [inputs], offset) of the affine map with the least squared error."""
    found = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], 1), y).solution
    return found[:-1], found[-1]


def test_ob2c_is_the_least_squares_optimum_of_the_remaining_weights(inputs):
    x, removed = inputs
    kept = others(removed, 12)
    weight, bias = torch.randn(7, 12, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    have, have_bias = dvbp.ob2c(weight, bias, *moments_of(x), removed, 0.0)
    slope, offset = affine_least_squares(x[:, kept], x @ weight.T + bias)
    torch.testing.assert_close(have[:, kept], slope.T)
    torch.testing.assert_close(have_bias, offset)
    assert not have[:, removed].any()


def test_ob2c_without_anything_removed_changes_nothing(inputs):
    x, _ = inputs
    weight, bias = torch.randn(7, 12, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    have = dvbp.ob2c(weight, bias, *moments_of(x), torch.tensor([], dtype=torch.long), 1e-3)
    torch.testing.assert_close(have, (weight, bias))


def test_corp_regresses_removed_units_on_kept_ones(inputs):
    x, removed = inputs
    kept = others(removed, 12)
    mean, covariance = moments_of(x)
    slope, offset = corp.regression(covariance, mean, kept, removed, 0.0)
    wanted, wanted_offset = affine_least_squares(x[:, kept], x[:, removed])
    torch.testing.assert_close(slope, wanted.T)
    torch.testing.assert_close(offset, wanted_offset)


def test_corp_shrinks_slopes_as_a_ridge_does(inputs):
    x, removed = inputs
    kept = others(removed, 12)
    mean, covariance = moments_of(x)
    ridge = 0.1 * covariance.diagonal()[kept].mean()
    # A ridge is more rows: one for each slope, that want it to be zero.
    centred = x - mean
    rows = torch.cat([centred[:, kept], (len(x) * ridge).sqrt() * torch.eye(len(kept), dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, torch.cat([centred[:, removed], torch.zeros(len(kept), 4)])).solution
    torch.testing.assert_close(corp.regression(covariance, mean, kept, removed, 0.1)[0], wanted.T)


def heads(images=4, tokens=9, size=6):
    """Queries and keys [images, tokens, size] that depend on each other, and their moments."""
    torch.manual_seed(2)
    both = torch.randn(images, tokens, size, dtype=torch.float64), torch.randn(images, tokens, size).double()
    q, k = (part @ torch.randn(size, size, dtype=torch.float64) + torch.randn(size) for part in both)
    one, centred = torch.cat([q, torch.ones_like(q[..., :1])], -1), k - k.mean(1, keepdim=True)
    return q, k, one.mT @ one, centred.mT @ centred


def test_corp_regresses_removed_logits_on_kept_dimensions():
    q, k, queries, keys = heads()
    removed = torch.tensor([0, 3])
    kept = others(removed, 6)
    have = corp.logit_regression(queries, keys, kept, removed, 0.0)
    centred = k - k.mean(1, keepdim=True)
    one = torch.cat([q[..., kept], torch.ones_like(q[..., :1])], -1)
    # One row for each pair of tokens of an image, one column for each entry of M.
    design = torch.einsum("nta,nsb->ntsab", one, centred[..., kept]).flatten(3).flatten(0, 2)
    wanted = (q[..., removed] @ centred[..., removed].mT).flatten()
    torch.testing.assert_close(have.flatten(), torch.linalg.lstsq(design, wanted[:, None]).solution[:, 0])


def test_corp_shrinks_what_meets_queries_and_not_the_offset():
    _, _, queries, keys = heads()
    kept, removed = torch.arange(4), torch.tensor([4, 5])
    free, shrunk = (corp.logit_regression(queries, keys, kept, removed, ridge) for ridge in (0.0, 1e9))
    assert shrunk[:-1].abs().max() < 1e-6 < free[:-1].abs().max()
    assert shrunk[-1].abs().max() > 1e-3


def test_folded_queries_give_the_logits_that_were_fitted():
    q, k, queries, keys = heads()
    kept, removed = torch.tensor([1, 2, 4, 5]), torch.tensor([0, 3])
    fitted = corp.logit_regression(queries, keys, kept, removed, 1e-3)
    x, weight, bias = q, torch.eye(6, dtype=torch.float64)[kept], torch.zeros(4, dtype=torch.float64)
    query, query_bias, key, key_bias = corp.fold(fitted, weight, bias, weight, bias)
    have = (x @ query.T + query_bias) @ (k @ key.T + key_bias).mT
    one = torch.cat([q[..., kept], torch.ones_like(q[..., :1])], -1)
    wanted = q[..., kept] @ k[..., kept].mT + one @ fitted @ k[..., kept].mT
    torch.testing.assert_close(have, wanted)


@pytest.mark.parametrize(("units", "samples"), [(300, 1200), (300, 200)])
def test_noise_alone_is_all_removed_and_its_median_is_the_laws(units, samples):
    torch.manual_seed(3)
    x = torch.randn(samples, units, dtype=torch.float64)
    values = torch.linalg.eigvalsh(x.T @ x / samples)
    assert dvbp.marchenko_pastur_median(units / samples) == pytest.approx(
        float(values[-min(units, samples) :].median()), rel=0.03
    )


def test_denoising_keeps_what_stands_out():
    torch.manual_seed(4)
    signal = torch.randn(60, dtype=torch.float64)
    x = torch.randn(2000, 1, dtype=torch.float64) * signal + 0.1 * torch.randn(2000, 60, dtype=torch.float64)
    left = dvbp.denoised(torch.cov(x.T), 2000)
    assert torch.linalg.matrix_rank(left) == 1
    torch.testing.assert_close(left, torch.outer(signal, signal), rtol=0.1, atol=0.05)


def test_a_layer_keeps_a_unit_whatever_its_score():
    masks = dvbp.best([torch.tensor([0.1, 0.2, 0.0]), torch.tensor([9.0, 8.0, 7.0])], 3)
    assert [mask.tolist() for mask in masks] == [[False, True, False], [True, True, False]]


def test_moments_are_those_of_all_tokens(dense, layers, pixels, moments):
    seen = {}
    layer = layers[1]
    hooks = [
        dense.get_submodule(layer.fc2).register_forward_pre_hook(lambda m, x: seen.update(hidden=x[0])),
        dense.get_submodule(layer.query).register_forward_hook(lambda m, x, y: seen.update(query=y)),
        dense.get_submodule(layer.key).register_forward_hook(lambda m, x, y: seen.update(key=y)),
    ]
    with torch.no_grad():
        dense(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    hidden, have = seen["hidden"].flatten(0, 1).double(), moments[1]
    torch.testing.assert_close(have.hidden.mean, hidden.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(have.hidden.covariance, torch.cov(hidden.T, correction=0), rtol=1e-4, atol=1e-4)
    query, key = by_head(seen["query"], layer.heads), by_head(seen["key"], layer.heads)
    torch.testing.assert_close(have.queries[..., -1, :-1].double(), query.sum(-2), rtol=1e-4, atol=1e-4)
    centred = key - key.mean(-2, keepdim=True)
    torch.testing.assert_close(have.keys.double(), centred.mT @ centred, rtol=1e-4, atol=1e-3)


def test_moments_of_parts_add_up(dense, layers, pixels, moments):
    parts = [collect(dense, layers, part, heads=True)[0] for part in (pixels[:2], pixels[2:])]
    both = parts[0] + parts[1]
    assert isinstance(both, Moments)
    assert isinstance(both.hidden, Hidden)
    assert (both.hidden.images, both.hidden.tokens) == (6, 6 * 17)
    torch.testing.assert_close(both.hidden.second, moments[0].hidden.second, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.queries, moments[0].queries, rtol=1e-4, atol=1e-4)
    assert torch.equal(both.hidden.active, moments[0].hidden.active)


@METHODS
def test_nothing_removed_gives_the_same_answers(method, dense, layers, pixels, moments):
    settings = {**SETTINGS[method], **({"dimensions": 1.0} if method is corp else {})}
    whole = method.prune(dense, layers, moments, count_flops(dense).total, (32, 32), settings)
    with torch.no_grad():
        torch.testing.assert_close(whole(pixels).logits, dense(pixels).logits, rtol=1e-4, atol=1e-4)


@METHODS
def test_a_pruned_model_has_the_flops_that_were_asked_for(method, dense, layers, pixels, moments):
    total = count_flops(dense).total
    pruned = method.prune(dense, layers, moments, 0.7 * total, (32, 32), SETTINGS[method])
    have = count_flops(pruned).total
    most_rounding = len(layers) * unit_flops(count_flops(dense), dense, layers[0])
    assert 0.7 * total - most_rounding < have <= 0.7 * total
    assert torch.isfinite(pruned(pixels).logits).all()
    assert linear_in(dense, layers[0].fc1).out_features == 96  # the dense model stays as it was
    again = method.prune(dense, layers, moments, 0.7 * total, (32, 32), SETTINGS[method])
    assert torch.equal(again(pixels).logits, pruned(pixels).logits)


def test_corp_leaves_as_many_dimensions_in_each_head(dense, layers, moments):
    pruned = corp.prune(dense, layers, moments, 0.8 * count_flops(dense).total, (32, 32), SETTINGS[corp])
    assert {linear_in(pruned, layer.query).out_features for layer in layers} == {24}
    assert {pruned.get_submodule(layer.query.rpartition(".")[0]).head_dim for layer in layers} == {8}
    assert {linear_in(pruned, layer.value).out_features for layer in layers} == {48}
    assert len({linear_in(pruned, layer.fc1).out_features for layer in layers}) == 1


def test_narrow_attention_of_full_width_is_the_models_own(dense, layers, pixels):
    other = tiny_model("vit")
    for layer in layers:
        query, key = linear_in(other, layer.query), linear_in(other, layer.key)
        narrow_attention(other, layer, (query.weight, query.bias), (key.weight, key.bias))
    with torch.no_grad():
        torch.testing.assert_close(other(pixels).logits, dense(pixels).logits, rtol=1e-5, atol=1e-5)


def test_a_budget_that_mlps_cannot_meet_is_refused(dense, layers):
    flops = count_flops(dense)
    with pytest.raises(ValueError, match="no hidden units"):
        units_within(0.1 * flops.total, flops, dense, layers)


@pytest.mark.slow
def test_the_script_writes_rows_and_goes_on_where_it_stopped(vit_folder, tmp_path):
    calibration = write_images(tmp_path / "calibration", 24, labels=False, seed=1)
    evaluation = write_images(tmp_path / "evaluation", 8)
    output = tmp_path / "rows.json"
    known = {"method": "dvbp-ob2c", "block_shape": None, "budget": "flops=0.8", "seed": 0, "samples": 16}
    output.write_text(json.dumps({"environment": {}, "rows": [known]}))
    command = [sys.executable, str(ROOT / "benchmarks" / "baselines.py"), "--model", str(vit_folder)]
    command += ["--calibration", str(calibration), "--evaluation", str(evaluation), "--budgets", "0.8"]
    command += ["--samples", "16", "--output", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    old, new = json.loads(output.read_text())["rows"]
    assert old == known
    assert (new["method"], new["block_shape"], new["budget"], new["num_images"]) == ("corp", None, "flops=0.8", 8)
    assert 0.79 < new["flops_ratio"] <= 0.8
    assert new["settings"] == min(new["tried"], key=lambda each: each["divergence"])["settings"]
    assert "--model $SHARED/" in new["command"]
    assert str(tmp_path) not in new["command"]
