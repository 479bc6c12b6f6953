"""Runs that are interrupted at any point: nothing is lost in silence, and what goes on ends as if nothing had been."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_blockprune import BlockPruneConfig, BlockPruner, CheckpointError, ConfigError
from hf_blockprune.jobs.finetune import FinetuneJob, run_finetune
from hf_blockprune.jobs.prune import PruneJob, run_prune
from hf_blockprune.runs.interruption import Interrupted, interruptible
from hf_blockprune.runs.resume import RunState
from hf_blockprune.runs.unfinished import kept_in, state_folder
from tests.conftest import ROOT, tiny_model

SCRIPT = ROOT / "tests/interrupting.py"
RECOVERY = {"samples": 24, "batch_size": 8, "reconstruction_epochs": 1, "epochs": 2}
SETTINGS = {
    "block_shape": (8, 8),
    "budget": {"metric": "flops", "ratio": 0.6},
    "calibration": {"samples": 20, "batch_size": 4},
    "recovery": RECOVERY,
}
# (beginning of a part's name, how often it is written): a run's stages in their order.
POINTS = [
    ("calibrating", 2),
    ("moves-packing", 1),
    ("trace-0", 7),
    ("loss-0", 2),
    ("selection", 1),
    ("layer-0", 1),
    ("recovery-running", 3),
    ("recovery-running", 4),
]


@pytest.fixture
def often(monkeypatch):
    """What changes all the time is kept each time."""
    monkeypatch.setattr("hf_blockprune.runs.resume.SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr("hf_blockprune.runs.resume.LARGEST_SHARE", float("inf"))


def same(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def without_times(report):
    """A report but for what a clock decides."""
    report = json.loads(json.dumps(report))
    for values in (report, report["recovery"] or {}, *report["layers"]):
        values.pop("seconds", None)
    return report


def pruned_and_recovered(processor, images, work_dir, **settings):
    config = BlockPruneConfig.from_dict({**SETTINGS, **settings})
    dense = tiny_model()
    pruner = BlockPruner(tiny_model(), processor, config)
    pruner.prune(images, work_dir=work_dir)
    if config.recovery is not None:
        pruner.recover(images, teacher=BlockPruner(dense, processor), work_dir=work_dir)
    return pruner


@pytest.mark.slow
@pytest.mark.parametrize("method", ["obs", "taylor"])
def test_a_run_goes_on_from_every_part_bit_for_bit(processor, images, tmp_path, monkeypatch, often, method):
    """The folder as it is after each write is what a run that is killed there leaves."""
    settings = {"method": method, "recovery": RECOVERY if method == "obs" else None}
    write, parts = RunState.write, []

    def write_and_keep(progress, part, *args, **kwargs):
        write(progress, part, *args, **kwargs)
        shutil.copytree(progress.folder, tmp_path / f"after-{len(parts):03d}")
        parts.append(part)

    monkeypatch.setattr(RunState, "write", write_and_keep)
    whole = pruned_and_recovered(processor, images, tmp_path / "work", **settings)
    monkeypatch.setattr(RunState, "write", write)
    plain = pruned_and_recovered(processor, images, None, **settings)
    same(plain.model.state_dict(), whole.model.state_dict())
    last = {re.sub(r"(-\d+|-vit.*)$", "", part): i for i, part in enumerate(parts)}
    assert {"calibrating-0-of", "calibration", "trace-0", "selection"} <= last.keys()
    for at in sorted({0, *last.values(), *(i for i, part in enumerate(parts) if part == "recovery-running")}):
        folder = tmp_path / f"after-{at:03d}"
        resumed = pruned_and_recovered(processor, images, folder, **settings)
        same(resumed.model.state_dict(), whole.model.state_dict())
        assert without_times(resumed.report()) == without_times(whole.report()), parts[at]


def test_parts_that_nobody_will_ask_for_are_gone(processor, images, tmp_path, often):
    pruned_and_recovered(processor, images, tmp_path / "work")
    names = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert names == [f"{part}.safetensors" for part in ("layer-0", "layer-1", "recovery-best", "selection")]


def test_what_was_kept_is_not_done_again(processor, images, tmp_path, often, monkeypatch):
    """Without, a resumed run would be right and as slow as a new one."""
    pruned_and_recovered(processor, images, tmp_path / "work")

    def never(*_, **__):
        raise AssertionError("was done again")

    for name in (
        "pruner.pruning.collect",
        "refit.layerwise.first_inputs",
        "recover.recovery._Run.reconstruct",
        "recover.recovery._Run.distil",
    ):
        monkeypatch.setattr(f"hf_blockprune.{name}", never)
    pruned_and_recovered(processor, images, tmp_path / "work")


def test_a_stream_goes_on_in_the_middle_of_calibration(processor, images, tmp_path, often, monkeypatch):
    from hf_blockprune import DataSource

    source = DataSource(str(images), streaming=True)
    whole = pruned_and_recovered(processor, source, None, recovery=None)
    write = RunState.write

    def write_and_stop(progress, part, *args, **kwargs):
        write(progress, part, *args, **kwargs)
        if kwargs["done"] == "calibration, batch 3":
            raise KeyboardInterrupt

    monkeypatch.setattr(RunState, "write", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        pruned_and_recovered(processor, source, tmp_path / "work", recovery=None)
    monkeypatch.setattr(RunState, "write", write)
    decoded, decode = [], "hf_blockprune.data.batches._Collate.__call__"
    from hf_blockprune.data.batches import _Collate

    collate = _Collate.__call__

    def counted(self, records):
        decoded.extend(position for position, _ in records)
        return collate(self, records)

    monkeypatch.setattr(decode, counted)
    resumed = pruned_and_recovered(processor, source, tmp_path / "work", recovery=None)
    assert decoded[:8] == list(range(12, 20))  # three batches of four are not even decoded
    same(resumed.model.state_dict(), whole.model.state_dict())


def test_recovery_of_another_run_is_refused(processor, images, tmp_path, often):
    pruner = pruned_and_recovered(processor, images, tmp_path / "work")
    pruner.config = pruner.config.replace(recovery={**RECOVERY, "epochs": 3})
    with pytest.raises(CheckpointError, match="another model, data set or settings"):
        pruner.recover(images, teacher=BlockPruner(tiny_model(), processor), work_dir=tmp_path / "work")


@pytest.fixture
def left(small_folder, images, tmp_path, monkeypatch):
    """(settings of a job, its state's folder) after it was interrupted in its refit."""
    settings = {**SETTINGS, "recovery": None, "model": str(small_folder), "dataset": str(images)}
    settings["output"] = str(tmp_path / "out")
    write = RunState.write

    def write_and_stop(progress, part, *args, **kwargs):
        write(progress, part, *args, **kwargs)
        if part == "layer-0":
            raise KeyboardInterrupt

    monkeypatch.setattr(RunState, "write", write_and_stop)
    with pytest.raises(Interrupted) as stopped:
        run_prune(PruneJob.read(None, **settings))
    monkeypatch.setattr(RunState, "write", write)
    assert re.fullmatch(
        r"kept is refit, layer 1 of 2 \(\d{4}-\d\d-\d\d \d\d:\d\d, \d+\.\d MB in .*/\.out\.unfinished\); "
        r"the same command with --resume goes on",
        str(stopped.value),
    )
    return settings, tmp_path / ".out.unfinished"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_state_is_neither_overwritten_nor_thrown_away_unasked(left, processor, images):
    settings, folder = left
    before = contents(folder)
    for other in ({}, {"damping": 0.02}, {"method": "magnitude", "refit": False}):
        with pytest.raises(CheckpointError, match=r"kept up to refit, layer 1 of 2 .* --resume.* --restart") as refused:
            run_prune(PruneJob.read(None, **{**settings, **other}))
        assert "\n" not in str(refused.value)
    job = {key: settings[key] for key in ("model", "dataset", "output")}
    with pytest.raises(CheckpointError, match="kept up to refit, layer 1 of 2"):
        run_finetune(FinetuneJob.read(None, **job))
    with pytest.raises(CheckpointError, match="another model, data set or settings"):
        run_prune(PruneJob.read(None, **settings, damping=0.02), resume=True)
    with pytest.raises(ConfigError, match="exclude each other"):
        run_prune(PruneJob.read(None, **settings), resume=True, restart=True)
    assert contents(folder) == before
    run_prune(PruneJob.read(None, **settings), restart=True)
    assert not folder.exists()


def test_resume_starts_where_nothing_is_kept(small_folder, tmp_path):
    job = {"model": str(small_folder), "output": str(tmp_path / "out"), "method": "magnitude", "refit": False}
    run_prune(PruneJob.read(None, **job, block_shape=(8, 8), budget={"ratio": 0.9}), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_kept_state_that_is_damaged_is_told_and_stays(tmp_path):
    folder = state_folder(tmp_path / "out")
    assert kept_in(folder) is None
    folder.mkdir()
    (folder / "selection.safetensors").write_bytes(b"short")
    kept = kept_in(folder)
    assert kept is not None
    assert (kept.done, kept.num_bytes) == ("selection, damaged", 5)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_one_line(number, code):
    said, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, interruptible(said.append):
        signal.raise_signal(number)
    assert (ended.value.code, said) == (code, ["interrupted"])
    assert signal.getsignal(signal.SIGTERM) == before


def test_work_that_is_not_interrupted_leaves_signals_alone():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interruptible(pytest.fail):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


class Runs:
    """Jobs in processes of their own."""

    def __init__(self, folder, settings, forks):
        self.folder, self.settings, self.forks = folder, settings, forks
        self.file = folder / "job.json"

    def write(self, output, stop=None, **options):
        settings = {**self.settings, "output": str(self.folder / output)}
        self.file.write_text(json.dumps({"settings": settings, "options": options, "stop": stop}))

    def run(self, *args, **options):
        self.write(*args, **options)
        return self.forks.run(SCRIPT, self.file)

    def weights(self, output):
        return load_file(self.folder / output / "model.safetensors")


@pytest.fixture
def runs(small_folder, images, tmp_path, forks):
    return Runs(tmp_path, {**SETTINGS, "model": str(small_folder), "dataset": str(images)}, forks)


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_stage_ends_as_one_that_is_not(runs):
    whole = runs.run("whole")
    assert whole.returncode == 0, whole.stderr
    for point in POINTS:
        killed = runs.run("out", [*point, "SIGKILL"], resume=True)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
    assert not (runs.folder / "out").exists()
    done = runs.run("out", resume=True)
    assert done.returncode == 0, done.stderr
    same(runs.weights("out"), runs.weights("whole"))
    assert not state_folder(runs.folder / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_process_says_what_is_kept(runs, name, code):
    stopped = runs.run("out", ["recovery-running", 2, name])
    assert stopped.returncode == code, stopped.stderr
    line = stopped.stderr.strip().splitlines()[-1]
    assert re.match(r"interrupted: kept is reconstruction of vit\.\S+, step 2 of 2 \(", line)
    assert line.endswith("the same command with --resume goes on")
    assert "Traceback" not in stopped.stderr
    refused = runs.run("out")
    assert refused.returncode == 1
    assert "an unfinished run is kept up to reconstruction of" in refused.stderr
    done = runs.run("out", resume=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_go_on_together_and_refuse_together(launch, runs):
    runs.write("whole")
    launch([SCRIPT, runs.file], processes=2)
    for point in (("calibrating-0", 2), ("trace-0", 2), ("recovery-running", 3)):
        runs.write("out", [*point, "SIGKILL"], resume=True)
        launch([SCRIPT, runs.file], processes=2, succeeds=False)
        assert kept_in(state_folder(runs.folder / "out")) is not None
    before = contents(state_folder(runs.folder / "out"))
    runs.write("out")
    refused = launch([SCRIPT, runs.file], processes=2, succeeds=False)
    assert refused.stderr.count("error: an unfinished run is kept up to") == 2
    assert contents(state_folder(runs.folder / "out")) == before
    runs.write("out", resume=True)
    launch([SCRIPT, runs.file], processes=2)
    same(runs.weights("out"), runs.weights("whole"))
    assert sorted(path.name for path in Path(runs.folder).iterdir()) == ["job.json", "out", "whole"]
