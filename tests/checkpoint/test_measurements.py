"""What is measured of a saved model is kept with it, is shown wherever it matters, and holds for its weights alone."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hf_blockprune import BlockPruneConfig, BlockPruner, CheckpointError
from hf_blockprune.checkpoint import measurements
from hf_blockprune.files import write_all
from hf_blockprune.jobs.measure import run_benchmark, run_evaluate
from hf_blockprune.pages.description import describe
from hf_blockprune.pages.page import report_page
from hf_blockprune.report.measured import Measurements
from hf_blockprune.report.values import Report
from tests.conftest import tiny_model, write_images
from tests.page_reader import Page

REPORT, CARD, WEIGHTS = "blockprune_report.json", "README.md", "model.safetensors"


@pytest.fixture(scope="module")
def saved(vit_folder, tmp_path_factory):
    """A pruned model that nobody measured."""
    config = BlockPruneConfig(method="magnitude", block_shape=(16, 16), budget={"metric": "density", "ratio": 0.5})
    pruner = BlockPruner.from_pretrained(vit_folder, config)
    pruner.prune()
    folder = tmp_path_factory.mktemp("measured") / "pruned"
    pruner.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pruned")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Ten other labelled pictures."""
    return write_images(tmp_path_factory.mktemp("others") / "more", 10, seed=1)


def report_of(folder):
    return json.loads((folder / REPORT).read_text())


def page_of(folder):
    return Page(report_page([describe(folder)]))


def change_weights(folder):
    """Another model of the same shape under the same names, as somebody else's training would leave it."""
    tensors = load_file(folder / WEIGHTS)
    tensors["classifier.bias"] = tensors["classifier.bias"] + 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def kept(values, name="elsewhere", **changes):
    """A report with one evaluation, as `BlockPruner.evaluate` writes it."""
    stamped = {"measured_at": "2026-01-01T00:00:00+00:00", "device": "a processor", "dtype": "float32"}
    stamped["environment"] = {"threads": 2}
    evaluation = {"dataset": name, "split": None, "num_images": 8, "top1": 0.5, "top5": 1.0, "skipped": [], **stamped}
    return {**values, "evaluation": {**evaluation, **changes}}


def test_measurements_are_kept_and_shown(folder, vit_folder, images):
    before = page_of(folder).words
    assert "Speed-up, measured - not measured" in before
    assert "Speed-up, predicted" in before
    result, problem = run_evaluate(str(folder), images, against=str(vit_folder))
    values, other_problem = run_benchmark(str(folder), batch_sizes=(1, 2), seconds=0.0)
    assert (problem, other_problem) == (None, None)
    stored = report_of(folder)
    for key in ("top1", "baseline_top1", "delta", "num_images"):
        assert stored["evaluation"][key] == getattr(result, key)
    assert stored["latency"] == values
    for entry in (stored["evaluation"], values):
        assert entry["measured_at"].endswith("+00:00")
        assert entry["environment"]["threads"] == torch.get_num_threads()
        assert entry["environment"]["versions"]["torch"]
        assert (entry["device"], entry["dtype"]) == (entry["environment"]["cpu"], "float32")
    assert stored["evaluation"]["dataset"].endswith("labelled")
    assert stored["evaluation"]["batch_size"] == 32
    card = (folder / CARD).read_text()
    assert "On 24 images of" in card
    assert f"| 2 | {values['rows'][1]['dense_latency_ms']:.2f} ms |" in card
    assert "Not measured" not in card
    assert [r.dataset_name for r in ModelCard(card).data.eval_results] == [stored["evaluation"]["dataset"]] * 2
    words = page_of(folder).words
    assert f"Speed-up, measured {values['rows'][0]['speedup']:.2f}\N{MULTIPLICATION SIGN}" in words
    assert f"Top-1, measured {100 * result.top1:.1f} %" in words
    assert "Speed-up, predicted" not in words
    assert "Latency and energy, predicted" in words


def test_measurements_of_other_data_and_machines_stand_side_by_side(folder, vit_folder, images, others):
    pruner = BlockPruner.from_pretrained(folder)
    for dataset in (images, others, images):
        pruner.evaluate(dataset)
    assert pruner.save_measurements()
    stored = report_of(folder)
    assert stored["evaluation"]["num_images"] == 24
    assert [old["num_images"] for old in stored["history"]["evaluation"]] == [10]
    run_evaluate(str(folder), images, against=str(vit_folder))
    stored = report_of(folder)
    assert stored["evaluation"]["against"] == vit_folder.name
    assert [old["num_images"] for old in stored["history"]["evaluation"]] == [24, 10]
    threads = torch.get_num_threads()
    try:
        for count, batches in ((1, (1, 2)), (2, (1, 2)), (1, (2,)), (1, (1,))):
            torch.set_num_threads(count)
            run_benchmark(str(folder), batch_sizes=batches, seconds=0.0)
    finally:
        torch.set_num_threads(threads)
    stored = report_of(folder)
    found = [stored["latency"], *stored["history"]["latency"]]
    rows = [(each["environment"]["threads"], [row["batch"] for row in each["rows"]]) for each in found]
    assert rows == [(1, [1]), (1, [2]), (2, [1, 2])]
    card, page = (folder / CARD).read_text(), page_of(folder)
    assert card.count("both models by turns") == 3
    assert "| others/more | 10 |" in card.replace(stored["history"]["evaluation"][-1]["dataset"], "others/more")
    assert "On 24 images of" in card
    assert len([caption for caption in page.tables if "the two models by turns" in caption]) >= 2
    assert [row[1] for row in page.tables["Also measured, newest first"][1:]] == ["24", "10"]


def test_other_weights_show_nothing_of_what_was_measured(folder, images, caplog):
    pruner = BlockPruner.from_pretrained(folder)
    pruner.evaluate(images)
    pruner.benchmark(seconds=0.0)
    pruner.save_measurements()
    assert describe(folder).values["evaluation"]
    change_weights(folder)
    shown = describe(folder).values
    assert (shown["evaluation"], shown["latency"]) == (None, None)
    assert "of other weights" in shown["notes"][0]
    with pytest.raises(CheckpointError, match="other weights than those that were measured"):
        pruner.save_measurements()
    again = BlockPruner.from_pretrained(folder)
    assert again.report()["evaluation"] is None
    assert again.report()["latency"] is None
    again.evaluate(images)
    assert again.save_measurements()
    stored = report_of(folder)
    assert stored["latency"] is None
    assert stored["evaluation"]["num_images"] == 24
    assert describe(folder).values["evaluation"]["num_images"] == 24


def test_the_same_weights_in_other_files_are_the_same(folder):
    before = measurements.files_fingerprint(folder)
    model = BlockPruner.from_pretrained(folder).model
    model.save_pretrained(folder, max_shard_size="200KB")
    (folder / WEIGHTS).unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert measurements.files_fingerprint(folder) == before


def test_a_model_that_was_trained_after_measuring_is_saved_without_old_figures(folder, images, tmp_path):
    pruner = BlockPruner.from_pretrained(folder)
    pruner.evaluate(images)
    with torch.no_grad():
        pruner.model.classifier.bias += 1
    with pytest.raises(CheckpointError, match="use save_pretrained"):
        pruner.save_measurements(folder)
    pruner.save_pretrained(tmp_path / "changed")
    assert report_of(tmp_path / "changed")["evaluation"] is None
    assert "Not measured." in (tmp_path / "changed" / CARD).read_text()
    pruner.evaluate(images)
    assert pruner.save_measurements()
    assert report_of(tmp_path / "changed")["evaluation"]["num_images"] == 24
    assert report_of(folder)["evaluation"] is None


def test_an_edited_card_stays(folder, images):
    card = folder / CARD
    card.write_text(card.read_text() + "\nMy own words.\n")
    before = card.read_bytes()
    assert run_evaluate(str(folder), images)[1] is None
    assert card.read_bytes() == before
    assert report_of(folder)["evaluation"]["num_images"] == 24


def test_metadata_that_somebody_added_stays_while_the_card_is_made_again(folder, images, others):
    card = folder / CARD
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\n", 1))
    for dataset, count in ((images, 24), (others, 10)):
        run_evaluate(str(folder), dataset)
        found = ModelCard(card.read_text())
        assert found.data.license == "mit"
        assert f"On {count} images of" in found.text
        assert len(found.data.eval_results) == 2


def test_a_card_without_its_file_is_not_made_again(folder, images):
    (folder / CARD).unlink()
    run_evaluate(str(folder), images)
    assert not (folder / CARD).exists()
    assert report_of(folder)["evaluation"]


def test_permissions_stay_and_nothing_else_is_left(folder, images):
    names = sorted(path.name for path in folder.iterdir())
    for name, mode in ((REPORT, 0o640), (CARD, 0o604)):
        (folder / name).chmod(mode)
    run_evaluate(str(folder), images)
    assert (folder / REPORT).stat().st_mode & 0o777 == 0o640
    assert (folder / CARD).stat().st_mode & 0o777 == 0o604
    assert sorted(path.name for path in folder.iterdir()) == names


def test_nothing_is_touched_where_nothing_is_to_be_kept(folder, images):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run_evaluate(str(folder), images, save=False)
    run_benchmark(str(folder), seconds=0.0, save=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture
def read_only(folder):
    """The folder, which takes no file; also where the tests run as root, whom permissions do not bind."""
    folder.chmod(0o555)
    root = os.access(folder, os.W_OK)
    if root and subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
        pytest.skip("nothing makes a folder read-only here")
    yield folder
    if root:
        subprocess.run(["chattr", "-i", folder], check=True)
    folder.chmod(0o755)


def test_a_folder_that_takes_no_file_costs_one_line(read_only, images):
    before = {path.name: path.read_bytes() for path in read_only.iterdir()}
    result, problem = run_evaluate(str(read_only), images)
    assert result.num_images == 24
    assert problem.startswith("the result was not kept: ")
    assert "cannot be written" in problem
    assert "\n" not in problem
    assert {path.name: path.read_bytes() for path in read_only.iterdir()} == before


def test_several_files_are_written_all_or_none(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")
    second.mkdir()  # which no file can replace
    for order in ((first, second), (second, first)):
        with pytest.raises(OSError, match="second"):
            write_all(dict.fromkeys(order, "new"))
        assert first.read_text() == "old"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    second.rmdir()
    write_all({first: "new", second: "new"})
    assert (first.read_text(), second.read_text()) == ("new", "new")


def test_nothing_is_lost_where_several_measure_at_once(folder):
    weights = measurements.files_fingerprint(folder)
    values = report_of(folder)
    with ThreadPoolExecutor(8) as pool:
        for name in range(8):
            pool.submit(measurements.save, folder, Report.from_dict(kept(values, f"set {name}")).measured, weights)
    stored = report_of(folder)
    found = [stored["evaluation"], *stored["history"]["evaluation"]]
    assert sorted(each["dataset"] for each in found) == [f"set {name}" for name in range(8)]


def test_the_newest_wins_whatever_is_merged_first(folder):
    old, new = (kept({}, measured_at=f"2026-01-0{day}T00:00:00+00:00", top1=0.1 * day, split=None) for day in (1, 2))
    for first, second in ((old, new), (new, old)):
        measured = Measurements.from_dict(first)
        measurements.merge(measured, Measurements.from_dict(second))
        report = measured.to_dict()
        assert report["evaluation"]["top1"] == 0.2
        assert report["history"]["evaluation"] == []


def test_reports_of_older_versions_show_what_they_showed(folder, images, others):
    pruner = BlockPruner.from_pretrained(folder)
    pruner.evaluate(images)
    pruner.benchmark(seconds=0.0)
    pruner.save_measurements()
    values = report_of(folder)
    for key in ("history", "weights_sha256", "card_sha256"):
        values.pop(key, None)
    for key in ("measured_at", "split", "device", "dtype", "environment", "batch_size"):
        values["evaluation"].pop(key)
    values["latency"].pop("measured_at")
    (folder / REPORT).write_text(json.dumps(values))
    again = BlockPruner.from_pretrained(folder)
    assert again.report()["evaluation"] == values["evaluation"]
    shown = describe(folder).values
    assert shown["evaluation"]["num_images"] == 24
    assert len(shown["latency"]["rows"]) == 1
    again.evaluate(others)
    assert again.save_measurements()
    stored = report_of(folder)
    assert stored["evaluation"]["num_images"] == 10
    assert stored["history"]["evaluation"] == [values["evaluation"]]
    assert stored["latency"] == values["latency"]
    page_of(folder)


def test_what_another_pruned_model_is_like_is_no_word_on_the_dense_one(folder, saved, images):
    result, _ = run_evaluate(str(folder), images, against=str(saved))
    assert result.delta == 0
    assert "delta" not in report_of(folder)["evaluation"]
    assert report_of(folder)["evaluation"]["top1"] == result.top1
    assert "The dense model has" not in (folder / CARD).read_text()
    run_benchmark(str(folder), against=str(saved), seconds=0.0)
    assert report_of(folder)["latency"] is None


def test_a_dense_model_of_another_name_is_named(folder, processor, images, tmp_path):
    other = tmp_path / "another-vit"
    tiny_model("vit", seed=3).save_pretrained(other)
    processor.save_pretrained(other)
    run_evaluate(str(folder), images, against=str(other))
    assert "The dense model another-vit has" in (folder / CARD).read_text()


def test_dense_models_and_models_without_a_report_keep_nothing(folder, vit_folder, images):
    assert run_evaluate(str(vit_folder), images)[1] is None
    assert not list(vit_folder.glob("blockprune_*"))
    (folder / REPORT).unlink()
    result, problem = run_evaluate(str(folder), images)
    assert result.num_images == 24
    assert "has no report to keep it in" in problem
    assert not (folder / REPORT).exists()


def test_links_into_a_cache_are_left_alone(folder, images, tmp_path):
    blob = tmp_path / "blob"
    (folder / REPORT).rename(blob)
    (folder / REPORT).symlink_to(blob)
    before = blob.read_bytes()
    assert "is a link" in run_evaluate(str(folder), images)[1]
    assert blob.read_bytes() == before


@pytest.mark.parametrize("history", [7, {"evaluation": 7}, {"latency": [7]}])
def test_damaged_histories_are_refused_by_name(folder, history):
    values = report_of(folder)
    (folder / REPORT).write_text(json.dumps({**values, "history": history}))
    with pytest.raises(CheckpointError, match="history"):
        BlockPruner.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="history"):
        describe(folder)
