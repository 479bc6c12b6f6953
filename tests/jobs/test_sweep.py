"""Sweeps: the points are those of single runs, an interrupted sweep goes on, and errors stay with their point."""

import json
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_blockprune import BlockPruneConfig, BlockPruner, Budget, CheckpointError, ConfigError
from hf_blockprune.calibration.collect import collect
from hf_blockprune.calibration.shared import Last
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.cli import app
from hf_blockprune.evaluate.frontier import frontier
from hf_blockprune.jobs.prune import PruneJob
from hf_blockprune.jobs.sweep import Grid, run_sweep
from tests.conftest import write_images
from tests.page_reader import Page

QUICK = BlockPruneConfig(calibration={"samples": 8}, coupling_rounds=0, true_loss_rounds=0)
GRID = Grid((Budget("flops", 0.9), Budget("flops", 0.6)), ((8, 16), (8, 8)), ("taylor", "obs"))


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def job(small_folder, images):
    return PruneJob(str(small_folder), "nowhere", str(images), evaluation=str(images), config=QUICK)


def job_in(job, folder, **changes):
    return PruneJob(**{**vars(job), "output": str(folder), **changes})


@pytest.fixture(scope="module")
def swept(job, tmp_path_factory):
    """(folder, results, options of every calibration) of a whole sweep that keeps everything."""
    folder, calibrations = tmp_path_factory.mktemp("sweep") / "all", []

    def collect_and_note(*arguments, **options):
        calibrations.append(options)
        return collect(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_blockprune.pruner.pruning.collect", collect_and_note)
        return folder, run_sweep(job_in(job, folder), GRID, keep="all"), calibrations


def test_points_are_those_of_single_runs(swept, job, small_folder, images):
    """Statistics that points share change nothing, whatever the order."""
    folder, values, _ = swept
    assert [p["name"] for p in values["points"]] == list(GRID.points(QUICK))
    for name in ("taylor-8x8-flops-0.6", "obs-8x16-flops-0.6", "obs-8x8-flops-0.9"):
        pruner = BlockPruner.from_pretrained(small_folder, GRID.points(QUICK)[name])
        expected = pruner.prune(images).state_dict()
        stored = load_file(folder / "checkpoints" / name / "model.safetensors")
        assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in expected.values())
        found = BlockPruner.from_pretrained(folder / "checkpoints" / name).model.state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        evaluation = pruner.evaluate(images, against=small_folder).to_dict()
        point = next(p for p in values["points"] if p["name"] == name)
        assert json.loads(json.dumps(evaluation)).items() <= json.loads(json.dumps(point["evaluation"])).items()


def test_calibration_is_shared_where_it_is_the_same(swept):
    """One for each block shape of taylor, and one for obs."""
    calibrated = [options["block_shape"] for options in swept[2]]
    assert calibrated == [(8, 16), (8, 8), (1, 1)]


def test_shared_statistics_are_collected_once_and_only_one_is_held():
    shared, calls = Last(), []
    for key in ("a", "a", "b", "a"):
        shared.get({"key": key}, lambda key=key: calls.append(key))
    assert calls == ["a", "b", "a"]
    with pytest.raises(ZeroDivisionError):
        shared.get({"key": "c"}, lambda: 1 / 0)
    assert shared.get({"key": "c"}, lambda: "whole") == "whole"


def test_results_are_those_of_the_checkpoints(swept):
    folder, values, _ = swept
    assert json.loads((folder / "sweep.json").read_text()) == json.loads(json.dumps(values))
    for point in values["points"]:
        stored = inspect_checkpoint(folder / point["checkpoint"])
        assert {key: point[key] for key in ("flops_ratio", "params_ratio", "size_bytes")}.items() <= stored.items()
    marks = frontier([(p["flops_ratio"], p["evaluation"]["top1"]) for p in values["points"]])
    assert [p["frontier"] for p in values["points"]] == marks
    assert not (folder / ".unfinished").exists()


def test_the_page_shows_every_point(swept):
    folder, values, _ = swept
    page = Page((folder / "sweep.html").read_text(encoding="utf-8"))
    rows = page.tables["Every point that is done; intervals at 95 %"][1:]
    assert len(rows) == len(values["points"]) == 8
    for row, point in zip(rows, values["points"], strict=True):
        assert row[1:4] == [
            point["method"],
            f"{point['block_shape'][0]}\N{MULTIPLICATION SIGN}{point['block_shape'][1]}",
            "flops=" + f"{point['budget']['ratio']:g}",
        ]
        assert row[4] == f"{100 * point['flops_ratio']:.1f} %"
        assert row[7] == f"{100 * point['evaluation']['top1']:.1f} %"
        assert row[11] == ("yes" if point["frontier"] else "no")
    classes = [attributes["class"] for attributes in page.with_tag("circle")]
    assert classes == [*("best" if p["frontier"] else "other" for p in values["points"]), "dense"]


@pytest.mark.parametrize("keep", ["frontier", "none"])
def test_a_finished_sweep_only_drops_what_is_not_kept(swept, job, tmp_path, keep):
    folder = tmp_path / "copy"
    shutil.copytree(swept[0], folder)
    seen = []
    values = run_sweep(job_in(job, folder), GRID, keep=keep, on_point=seen.append)
    assert seen == []
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {p["name"] for p in values["points"] if p["frontier"] and keep == "frontier"}
    assert {p["name"] for p in values["points"] if p["checkpoint"]} == kept
    strip = [{k: v for k, v in p.items() if k != "checkpoint"} for p in values["points"]]
    assert strip == [
        {k: v for k, v in p.items() if k != "checkpoint"} for p in json.loads(json.dumps(swept[1]["points"]))
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": QUICK.replace(damping=0.5)}, r"other settings \(points\)"),
        ({"model": "other"}, r"other settings \(weights\)"),
        ({"evaluation": "other"}, r"other settings \(evaluation\)"),
    ],
)
def test_other_settings_are_refused(swept, job, tmp_path, small_folder, change, message):
    folder = tmp_path / "copy"
    shutil.copytree(swept[0], folder)
    if "model" in change:
        other = shutil.copytree(small_folder, tmp_path / small_folder.name)
        model = BlockPruner.from_pretrained(small_folder).model
        with torch.no_grad():
            model.classifier.bias += 1
        model.save_pretrained(other)
        change = {"model": str(other)}
    if "evaluation" in change:
        change = {"evaluation": str(write_images(tmp_path / "pictures", 8))}
    before = files_in(folder)
    with pytest.raises(CheckpointError, match=message):
        run_sweep(job_in(job, folder, **change), GRID)
    with pytest.raises(CheckpointError, match=r"other settings \(points\)"):
        run_sweep(job_in(job, folder), Grid(GRID.budgets[:1], GRID.block_shapes, GRID.methods))
    assert files_in(folder) == before


def test_folders_of_something_else_are_left_alone(job, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="no sweep's"):
        run_sweep(job_in(job, tmp_path), GRID)
    with pytest.raises(CheckpointError, match="is a file"):
        run_sweep(job_in(job, tmp_path / "mine.txt"), GRID)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/sweep.json").write_text('{"settings": 1}')
    with pytest.raises(CheckpointError, match="no sweep of this version"):
        run_sweep(job_in(job, tmp_path / "old"), GRID)
    assert files_in(tmp_path) == {"mine.txt": b"mine", "old/sweep.json": b'{"settings": 1}'}


def test_settings_without_sense_are_refused_before_any_work(job, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match="name labelled images"):
        run_sweep(job_in(job, output, evaluation=None), GRID)
    with pytest.raises(ConfigError, match="is twice in the grid"):
        run_sweep(job_in(job, output), Grid((Budget("flops", 0.9),) * 2))
    with pytest.raises(ConfigError, match="grid is empty"):
        run_sweep(job_in(job, output), Grid(()))
    with pytest.raises(ConfigError, match="method"):
        run_sweep(job_in(job, output), Grid((Budget("flops", 0.9),), methods=("guess",)))
    with pytest.raises(ConfigError, match="keep"):
        run_sweep(job_in(job, output), GRID, keep="some")
    assert not output.exists()


def command(small_folder, images, output, *more):
    arguments = ["sweep", small_folder, "--dataset", images, "--evaluate", images, "--block-shapes", "8x16,8x8"]
    return [str(a) for a in [*arguments, "--samples", "8", "--output", output, "--quiet", "--json", *more]]


def test_an_error_of_a_point_is_recorded_and_tried_again(small_folder, images, tmp_path):
    arguments = command(
        small_folder, images, tmp_path / "out", "--methods", "taylor", "--budgets", "0.9,0.01,density=0.5"
    )
    for _ in range(2):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1
        points = {p["name"]: p for p in json.loads(result.stdout)["points"]}
        assert [p["status"] for p in points.values()] == ["done", "failed", "done"] * 2
        assert "0.0100 cannot be met" in points["taylor-8x8-flops-0.01"]["error"]
        assert result.stderr.count("error: taylor-") == 2
    page = Page((tmp_path / "out/sweep.html").read_text(encoding="utf-8"))
    assert "4 of 6 points done, 2 failed" in page.words
    assert page.words.count("0.0100 cannot be met") == 2


def test_usage(small_folder, images, tmp_path):
    good = command(small_folder, images, tmp_path / "out", "--budgets", "0.9", "--methods", "magnitude")
    done = CliRunner().invoke(app, [a for a in good if a != "--json"])
    assert done.exit_code == 0, done.output
    assert "magnitude-8x16-flops-0.9" in done.stdout
    for bad in (["--budgets", "much"], ["--block-shapes", "16"], ["--keep", "some"]):
        assert CliRunner().invoke(app, [*good, *bad]).exit_code == 2
    refused = CliRunner().invoke(app, [*good, "--seed", "5"])
    assert refused.exit_code == 1
    assert "holds a sweep with other settings (points)" in refused.stderr


@pytest.mark.slow
def test_a_killed_sweep_goes_on(forks, small_folder, images, tmp_path):
    """Killed after its first point, with what a process that is killed while it writes leaves behind."""
    folder = tmp_path / "out"
    arguments = command(
        small_folder, images, folder, "--methods", "taylor,obs", "--budgets", "0.9,0.6", "--keep", "all"
    )
    process = forks.start("-m", "hf_blockprune.cli", *arguments)
    deadline = time.monotonic() + 120
    while not done_points(folder) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = json.loads((folder / "sweep.json").read_text())["points"]
    assert 1 <= len(finished) < 8
    (folder / "checkpoints/.obs-8x8-flops-0.6.xyz.partial").mkdir()
    (folder / ".sweep.json.123.partial").write_text("{")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    points = json.loads(result.stdout)["points"]
    assert [p["name"] for p in points] == list(GRID.points(QUICK))
    assert points[: len(finished)] == [{**p, "frontier": q["frontier"]} for p, q in zip(finished, points, strict=False)]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "sweep.html", "sweep.json"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == sorted(p["name"] for p in points)
    for point in points:
        assert inspect_checkpoint(folder / point["checkpoint"])["flops_ratio"] == point["flops_ratio"]


def done_points(folder):
    file = folder / "sweep.json"
    return len(json.loads(file.read_text())["points"]) if file.is_file() else 0
