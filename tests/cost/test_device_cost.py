"""The cost model: consistent at its ends, monotone between them, and profiles that are checked key by key."""

from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_blockprune.cost.profile_names import profile_names
from hf_blockprune.cost.profiles import load_profile
from hf_blockprune.errors import ConfigError
from hf_blockprune.hub.blockprune_cost import (
    Cost,
    Linear,
    VisionTransformer,
    attention_cost,
    layer_cost,
    model_cost,
    other_cost,
)
from hf_blockprune.hub.blockprune_profiles import CpuProfile, GpuProfile, SystolicProfile
from hf_blockprune.hub.blockprune_systolic import block_sparse_cycles, dense_cycles

PROFILES = profile_names()
DEIT_TINY = VisionTransformer(196, 768, 197, 192, 3, 12, 1000)
WHOLE = (3, 64)  # heads of DeiT-Ti, and features of each


def test_the_promised_profiles_are_there_and_name_their_sources():
    wanted = {"h100-sxm", "a100-sxm", "rtx4090", "cpu-avx512", "cpu-avx2", "vitcod"}
    assert wanted | {f"systolic-{size}" for size in (16, 32, 64)} <= set(PROFILES)
    assert all(load_profile(name).source and load_profile(name).name == name for name in PROFILES)


def masked(seed, density, grid=(24, 24), block_shape=(32, 32), tokens=197):
    mask = np.random.default_rng(seed).permutation(grid[0] * grid[1]) < round(density * grid[0] * grid[1])
    rows, cols = block_shape
    return Linear(tokens, grid[0] * rows, grid[1] * cols, "float32", mask.reshape(grid), block_shape)


@pytest.mark.parametrize("name", PROFILES)
def test_keeping_everything_costs_what_a_dense_layer_does(name):
    profile, work = load_profile(name), masked(0, 1.0)
    assert layer_cost(profile, work) == profile.dense(work._replace(mask=None))


@pytest.mark.parametrize("profile", [*map(load_profile, PROFILES), CpuProfile("slow", 1, 1e3, 64, dram_gb_s=1e-3)])
def test_a_dense_product_costs_the_same_whatever_the_mask(profile):
    work = masked(0, 0.3)
    assert profile.dense(work) == profile.dense(work._replace(mask=None))


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("block_shape", [(32, 32), (16, 16), (64, 1)])
def test_more_blocks_never_cost_less(name, block_shape):
    profile = load_profile(name)
    last = Cost()
    for density in np.linspace(0, 1, 13):
        cost = layer_cost(profile, masked(3, density, (12, 12), block_shape, 200))
        for before, now, quantity in zip(last, cost, Cost._fields, strict=True):
            # A dense product in place of a sparse one may move other bytes, and take other energy.
            if quantity == "latency_ms":
                assert now >= before - 1e-12
        last = cost


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300),
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.tuples(st.sampled_from([1, 16, 32, 64]), st.sampled_from([1, 3, 16, 32])),
    st.floats(0, 1),
    st.integers(0, 1 << 30),
)
def test_counts_are_those_of_the_matrix(tokens, shape, block_shape, density, seed):
    grid = -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])
    mask = np.random.default_rng(seed).random(grid) < density
    kept = mask.repeat(block_shape[0], 0).repeat(block_shape[1], 1)[: shape[0], : shape[1]]
    work = Linear(tokens, *shape, "float32", mask, block_shape)
    assert work.weights == kept.sum()
    assert work.flops == 2 * tokens * kept.sum()
    assert work._replace(mask=None).weights == shape[0] * shape[1]
    indices = 0 if mask.all() else 4 * (mask.sum() + grid[0] + 1)
    assert work.size_bytes == 4 * (tokens * sum(shape) + kept.sum()) + indices


def test_systolic_latency_is_the_arrays_cycles():
    profile = SystolicProfile("mine", 32, 32, ghz=0.5, dram_gb_s=1e9, dataflow="os", overlap=False)
    work = masked(1, 0.5)
    cycles = block_sparse_cycles(197, work.mask, rows=32, cols=32, dataflow="os")
    assert profile.sparse(work).latency_ms == pytest.approx((cycles + 1) / 0.5e6)
    whole = dense_cycles(197, 768, 768, rows=32, cols=32, dataflow="os")
    assert profile.dense(work).latency_ms == pytest.approx((whole + 1) / 0.5e6)
    slow = SystolicProfile("mine", 32, 32, ghz=0.5, dram_gb_s=1e-3, dataflow="os")
    assert slow.sparse(work).latency_ms == pytest.approx(slow.sparse(work).size_bytes / 1e3)


def test_a_gpu_waits_for_its_longest_block_rows():
    profile = GpuProfile("mine", 10, {"float32": 1.0}, 1e9, 1e9, 50, 1e6, 0, launch_us=1e-9)
    balanced, uneven = np.zeros((10, 10), dtype=bool), np.zeros((10, 10), dtype=bool)
    balanced[:, :5] = True
    uneven[:5] = True
    works = [Linear(128, 640, 640, "float32", mask, (64, 64)) for mask in (balanced, uneven)]
    fast, slow = (profile.sparse(work).latency_ms for work in works)
    assert slow == pytest.approx(2 * fast, rel=1e-3)  # ten multiprocessors, ten tiles, but five with all the work


def test_energy_is_clamped_at_the_power_limit():
    hungry = GpuProfile("mine", 10, {"float32": 1.0}, 1e3, 1e3, 50, 100, 10, pj_per_mac=1e6)
    cost = hungry.dense(Linear(128, 640, 640))
    assert cost.energy_mj == pytest.approx(100 * cost.latency_ms)


def test_unknown_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"h100-sxm: no peak for int8.*bfloat16"):
        load_profile("h100-sxm").dense(Linear(1, 1, 1, "int8"))


@pytest.mark.parametrize("name", PROFILES)
def test_a_model_is_its_linears_and_the_rest(name):
    profile = load_profile(name)
    linears = [Linear(197, 192, 192)] * 48 + [Linear(197, 768, 192), Linear(197, 192, 768)] * 12
    total = model_cost(profile, DEIT_TINY, linears)
    rest = other_cost(profile, DEIT_TINY)
    parts = [layer_cost(profile, work) for work in linears]
    for quantity in Cost._fields:
        expected = getattr(rest, quantity) + sum(getattr(part, quantity) for part in parts)
        assert getattr(total, quantity) == pytest.approx(expected)
    # DeiT-Ti has 1.26 GFLOPs a multiply-add counted as one (Touvron et al., 2021, table 5: 1.3 B).
    assert total.flops / 2 == pytest.approx(1.26e9, rel=0.02)
    assert model_cost(profile, DEIT_TINY, linears, batch=8).flops == pytest.approx(8 * total.flops)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, r"mine.yaml: unknown key 'colour'.*ghz"),
        ({"kind": "abacus"}, r"mine.yaml.kind: expected one of cpu, gpu, systolic"),
        ({"kind": ["cpu"]}, r"mine.yaml.kind: expected one of cpu, gpu, systolic, got \['cpu'\]"),
        ({"cores": 0}, r"mine.yaml.cores: expected a whole number from 1"),
        ({"cores": "two"}, r"mine.yaml.cores: expected a whole number"),
        ({"ghz": float("inf")}, r"mine.yaml.ghz: expected a number above 0"),
        ({"name": 3}, r"mine.yaml.name: expected a text"),
        ({"ghz": None}, r"mine.yaml.ghz: expected a number"),
    ],
    ids=str,
)
def test_files_with_a_wrong_key_are_refused_by_its_name(tmp_path, change, message):
    values = {"kind": "cpu", "name": "mine", "cores": 2, "ghz": 3.0, "flops_per_cycle": 32, **change}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=message):
        load_profile(path)


def test_what_is_missing_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("kind: cpu\nname: mine\ncores: 2\n")
    with pytest.raises(ConfigError, match="ghz"):
        load_profile(path)
    path.write_text("kind: [")
    with pytest.raises(ConfigError, match="no YAML"):
        load_profile(path)
    with pytest.raises(ConfigError, match=r"no profile 'abacus'.*cpu-avx512.*calibrate"):
        load_profile("abacus")


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("kind: cpu\nname: mine\ncores: 4\nghz: 2.5\nflops_per_cycle: 16\nheld_out_error: 0\n")
    assert load_profile(path) == CpuProfile("mine", cores=4, ghz=2.5, flops_per_cycle=16, held_out_error=0)


@pytest.mark.parametrize("name", PROFILES)
def test_attentions_cost_what_is_left_of_them(name):
    profile = load_profile(name)
    whole = other_cost(profile, DEIT_TINY, batch=4)
    told = replace(DEIT_TINY, attentions=(WHOLE,) * 12)
    assert other_cost(profile, told, batch=4) == whole
    for kept in ((2, 64), (3, 40), (1, 1)):
        cut = other_cost(profile, replace(DEIT_TINY, attentions=(kept, *(WHOLE,) * 11)), batch=4)
        before, after = (attention_cost(profile, 197, *heads, batch=4) for heads in (WHOLE, kept))
        saved = [a - b for a, b in zip(before, after, strict=True)]
        assert [a - b for a, b in zip(whole, cut, strict=True)] == pytest.approx(saved)
        assert all(value >= 0 for value in saved)
        assert saved[0] == 2 * 2 * 4 * 197**2 * (3 * 64 - kept[0] * kept[1])
