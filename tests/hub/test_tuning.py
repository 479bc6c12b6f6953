"""Choosing a configuration of the GPU kernel, and keeping the choice."""

import json
import os
import stat
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from hf_blockprune.hub.blockprune_backends import LayerArguments
from hf_blockprune.hub.blockprune_triton_backend import TritonBackend
from hf_blockprune.hub.blockprune_tuning import Choice, Config, Problem, Tuner, cache_folder, candidates
from tests.hub.test_ops import assert_matches, make_case, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBLEM = Problem("bfloat16", 2, "ieee", 64, 32, 12608, 3072, 768, 0.5)
CONFIGS = [Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(16, 32, 4, 2)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BLOCKPRUNE_AUTOTUNE", "1")
    return tmp_path / "cache"


def refuse(*args):
    raise AssertionError("measured again")


def fastest(block_m):
    """A measurement by which tiles of so many tokens win and others do not run at all."""
    return lambda config: {block_m: 1.0, 64: 2.0}.get(config.block_m)


def test_the_fastest_is_chosen_and_kept_on_disk(cache):
    choice = Tuner("GPU X").choose(PROBLEM, CONFIGS, fastest(16), lambda: 3.0)
    assert choice == Choice(CONFIGS[2], 1.0, 3.0)
    assert [path.name for path in cache.iterdir()] == ["triton-gpu-x.json"]
    assert Tuner("GPU X").choose(PROBLEM, CONFIGS, refuse, refuse) == choice


def test_similar_problems_share_a_choice_and_others_do_not():
    keys = {
        PROBLEM._replace(**change).key
        for change in ({}, {"density": 0.51}, {"tokens": 12000}, {"tokens": 16384}, {"density": 0.47})
    }
    assert len(keys) == 1
    different = (
        {"density": 0.4},
        {"tokens": 197},
        {"rows": 32},
        {"cols": 16},
        {"in_features": 3072},
        {"dtype": "float16"},
        {"precision": "tf32"},
    )
    assert len({PROBLEM._replace(**change).key for change in different} | keys) == 1 + len(different)


def test_no_configuration_that_runs_is_an_error():
    with pytest.raises(RuntimeError, match=r"no configuration .* runs here for bfloat16 ieee 64x32"):
        Tuner("GPU X").choose(PROBLEM, CONFIGS, lambda config: None, refuse)


def test_another_processes_choices_are_kept():
    ours, theirs = Tuner("GPU X"), Tuner("GPU X")
    other = PROBLEM._replace(rows=32)
    assert ours.choose(PROBLEM, CONFIGS, fastest(64), lambda: 3.0).config.block_m == 64
    theirs.choose(other, CONFIGS, fastest(32), lambda: 3.0)
    ours.choose(PROBLEM._replace(rows=16), CONFIGS, fastest(16), lambda: 3.0)
    assert Tuner("GPU X").choose(other, CONFIGS, refuse, refuse).config.block_m == 32
    assert Tuner("GPU X").choose(PROBLEM, CONFIGS, refuse, refuse).config.block_m == 64


def written(cache, change):
    """A cache file with one change made to its only choice's configuration."""
    Tuner("GPU X").choose(PROBLEM, CONFIGS, fastest(64), lambda: 3.0)
    path = cache / "triton-gpu-x.json"
    content = json.loads(path.read_text())
    content["choices"][PROBLEM.key]["config"].update(change)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"block_m": 48},
        {"block_m": 8},
        {"block_k": 1 << 20},
        {"warps": 0},
        {"stages": 99},
        {"group": 0},
        {"per_sm": -1},
        {"block_m": "64"},
        {"block_m": True},
        {"color": "red"},
    ],
    ids=str,
)
def test_configurations_that_no_kernel_could_take_are_not_believed(cache, change, caplog):
    written(cache, change)
    assert Tuner("GPU X").choose(PROBLEM, CONFIGS, fastest(16), lambda: 3.0).config.block_m == 16
    assert "measured anew" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "choices": [1]}', "\0\0"])
def test_files_that_are_no_choices_are_measured_anew(cache, text, caplog):
    written(cache, {}).write_text(text)
    assert Tuner("GPU X").choose(PROBLEM, CONFIGS, fastest(16), lambda: 3.0).config.block_m == 16
    assert "measured anew" in caplog.text
    assert Tuner("GPU X").choose(PROBLEM, CONFIGS, refuse, refuse).config.block_m == 16


def test_files_of_another_format_are_left_out_silently(cache, caplog):
    path = written(cache, {})
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    Tuner("GPU X").choose(PROBLEM, CONFIGS, fastest(16), lambda: 3.0)
    assert not caplog.text


def test_a_folder_that_cannot_be_written_costs_time_alone(cache, caplog):
    cache.parent.joinpath("cache").write_text("a file where the folder should be")
    assert Tuner("GPU X").choose(PROBLEM, CONFIGS, fastest(16), lambda: 3.0).config.block_m == 16
    assert "cannot be written" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_costs_time_alone(cache, caplog):
    cache.mkdir()
    cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    Tuner("GPU X").choose(PROBLEM, CONFIGS, fastest(16), lambda: 3.0)
    assert "cannot be written" in caplog.text


def test_where_files_lie(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("BLOCKPRUNE_CACHE")
    assert cache_folder().name == "blockprune"
    monkeypatch.setenv("BLOCKPRUNE_CACHE", "~/kernels")
    assert "~" not in str(cache_folder())


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("cols", [1, 4, 16, 32, 64])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("tokens", [1, 197, 12608])
@pytest.mark.parametrize("shared_memory", [48 * 1024, 99 * 1024, 227 * 1024])
def test_candidates_fit_and_are_few(rows, cols, element_bytes, tokens, shared_memory):
    problem = PROBLEM._replace(rows=rows, cols=cols, element_bytes=element_bytes, tokens=tokens)
    found = candidates(problem, shared_memory)
    assert 1 <= len(found) == len(set(found)) <= 8
    for config in found:
        assert (config.block_m + rows) * config.block_k * element_bytes * config.stages <= shared_memory
        assert not config.strips or config.group == 1
    if cols * element_bytes < 16:
        assert found[0].k_major


def timed_case():
    case = make_case((16, 16), (24,))
    layer = LayerArguments(*(t.to(DEVICE) for t in case.packed), case.bias.to(DEVICE), len(case.dense))
    return case, case.x.to(DEVICE), layer


def test_a_call_measures_once_and_gives_the_same_result(cache):
    case, x, layer = timed_case()
    backend = TritonBackend()
    assert_matches(backend.forward(x, layer).cpu(), reference(case), torch.float32)
    (path,) = cache.iterdir()
    (choice,) = json.loads(path.read_text())["choices"].values()
    assert choice["sparse_ms"] > 0
    assert choice["dense_ms"] > 0
    stamp = path.stat().st_mtime_ns
    assert_matches(TritonBackend().forward(x, layer).cpu(), reference(case), torch.float32)
    assert path.stat().st_mtime_ns == stamp


def test_calls_without_tokens_say_nothing_about_others(cache):
    case, x, layer = timed_case()
    assert TritonBackend().forward(x[:0], layer).shape == (0, len(case.dense))
    assert not cache.exists()


def test_graphs_are_recorded_with_what_is_known_and_nothing_is_timed_meanwhile(cache, monkeypatch):
    from hf_blockprune.hub import blockprune_triton_backend

    _, x, layer = timed_case()
    known, unknown = TritonBackend(), TritonBackend()
    choice = known.choose(x, layer)
    monkeypatch.setattr(blockprune_triton_backend, "_recording", lambda device: True)
    monkeypatch.setattr(blockprune_triton_backend, "_milliseconds", refuse)
    assert known.choose(x, layer) == choice
    assert unknown.choose(x, layer).sparse_ms is None


def test_without_tuning_the_choice_is_fixed_and_leaves_no_file(cache, monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_AUTOTUNE", "0")
    _, x, layer = timed_case()
    choices = {TritonBackend().choose(x, layer) for _ in range(2)}
    assert len(choices) == 1
    assert choices.pop().sparse_ms is None
    assert not cache.exists()


WRITER = """
import sys
from hf_blockprune.hub.blockprune_tuning import Config, Problem, Tuner
for number in range(20):
    problem = Problem("bfloat16", 2, "ieee", 16, 16, 64, 1000 + number, int(sys.argv[1]), 0.5)
    Tuner("GPU X").choose(problem, [Config(64, 32, 4, 2)], lambda config: 1.0, lambda: 2.0)
"""


@pytest.mark.slow
def test_processes_that_write_at_the_same_time_leave_a_whole_file(cache):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(100 + i)]) for i in range(3)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    (path,) = cache.iterdir()
    choices = json.loads(path.read_text())["choices"]
    assert len(choices) >= 20  # the last one to write has at least all of its own
    assert Tuner("GPU X").choose(PROBLEM, CONFIGS, fastest(64), lambda: 3.0)
