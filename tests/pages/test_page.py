"""Pages about checkpoints: their figures are the checkpoint's, and nothing in one gets out of its place."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hf_blockprune import BlockPruneConfig, BlockPruner, CheckpointError, ConfigError, write_report
from hf_blockprune.checkpoint.inspection import open_checkpoint
from hf_blockprune.cli import app
from hf_blockprune.evaluate.frontier import frontier
from hf_blockprune.evaluate.intervals import wilson_interval
from hf_blockprune.pages.description import describe
from hf_blockprune.pages.drawings import Bar, bar_chart, mask_picture, ticks
from hf_blockprune.pages.page import report_page
from hf_blockprune.stored_values import MAX_ROWS, StoredValues, flat
from tests.browser import needs_browser
from tests.conftest import ROOT, tiny_model
from tests.page_reader import Page

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{7*7}}"
REPORT = "blockprune_report.json"


@pytest.fixture(scope="module")
def checkpoints(vit_folder, images, tmp_path_factory):
    """Three budgets of one model: measured and timed, measured, and not measured."""
    folder = tmp_path_factory.mktemp("report")
    for ratio in (0.9, 0.7, 0.5):
        settings = {"budget": {"metric": "flops", "ratio": ratio}, "calibration": {"samples": 8}}
        config = BlockPruneConfig(block_shape=(16, 8), coupling_rounds=0, true_loss_rounds=0, **settings)
        pruner = BlockPruner.from_pretrained(vit_folder, config)
        pruner.prune(images)
        if ratio > 0.5:
            pruner.evaluate(images, against=vit_folder)
        if ratio == 0.9:
            pruner.benchmark(batch_sizes=(1, 2), seconds=0.1)
        pruner.save_pretrained(folder / f"kept-{ratio}")
    return folder


def page_of(*sources, **options):
    return Page(report_page([describe(source, **options) for source in sources]))


def changed(checkpoint, target, change):
    """A copy of a checkpoint with another report file."""
    shutil.copytree(checkpoint, target)
    values = json.loads((target / REPORT).read_text())
    change(values)
    (target / REPORT).write_text(json.dumps(values))
    return target


def test_pictures_are_the_masks(checkpoints):
    stored = open_checkpoint(checkpoints / "kept-0.5")
    masks = page_of(checkpoints / "kept-0.5").masks
    assert len(stored.layers) == 12
    assert masks.keys() == {layer.module for layer in stored.layers}
    for layer in stored.layers:
        assert torch.equal(masks[layer.module], layer.mask)
        assert layer.values["kept_blocks"] == masks[layer.module].sum()


def test_pictures_have_the_proportions_of_their_matrices(checkpoints):
    stored = {layer.module: layer.values["stored_shape"] for layer in open_checkpoint(checkpoints / "kept-0.9").layers}
    for attributes in page_of(checkpoints / "kept-0.9").with_tag("img"):
        rows, cols = stored[attributes["alt"].partition(": ")[0]]
        assert int(attributes["width"]) / int(attributes["height"]) == pytest.approx(cols / rows, rel=0.05)


@pytest.mark.parametrize("name", ["kept-0.9", "kept-0.5"])
def test_the_table_of_layers_is_the_checkpoint(checkpoints, name):
    values = describe(checkpoints / name).values
    caption = "Kept blocks by layer; a dash where the report file says nothing"
    rows = page_of(checkpoints / name).tables[caption][1:]
    report = json.loads((checkpoints / name / REPORT).read_text())
    losses = {layer["name"]: f"{layer['predicted_loss']:.3g}" for layer in report["layers"]}
    assert [row[0] for row in rows] == [layer["module"] for layer in values["layers"]]
    for row, layer in zip(rows, values["layers"], strict=True):
        assert row[2] == f"{layer['kept_blocks']}/{layer['blocks']}"
        assert row[3] == f"{100 * layer['kept_blocks'] / layer['blocks']:.1f} %"
        assert row[5] == losses[layer["module"]]


def test_bars_are_as_high_as_the_shares(checkpoints):
    values = describe(checkpoints / "kept-0.5").values
    heights = [float(rect["height"].rstrip("%")) for rect in page_of(checkpoints / "kept-0.5").with_tag("rect")]
    assert heights[:12] == [pytest.approx(100 * layer["density"], abs=0.01) for layer in values["layers"]]
    losses = [layer["predicted_loss"] for layer in values["layers"]]
    assert heights[12:] == [pytest.approx(100 * loss / max(losses), abs=0.01) for loss in losses]


def test_measured_and_predicted_stand_apart(checkpoints):
    report = json.loads((checkpoints / "kept-0.9" / REPORT).read_text())
    page = page_of(checkpoints / "kept-0.9")
    measured = next(rows for caption, rows in page.tables.items() if caption.startswith("On "))
    predicted = page.tables["By the cost model, not measured; one pass over so many images"]
    for row, said in zip(measured[1:], report["latency"]["rows"], strict=True):
        assert row[1:3] == [f"{said['dense_latency_ms']:.2f} ms", f"{said['latency_ms']:.2f} ms"]
    for row, said in zip(predicted[1:], report["predicted"], strict=True):
        assert row[0] == f"{said['device']} ({said['dtype']})"
        assert row[3] == f"{said['latency_ms']:.3g} ms"


def test_accuracy_is_that_of_the_report_file(checkpoints):
    evaluation = json.loads((checkpoints / "kept-0.7" / REPORT).read_text())["evaluation"]
    words = page_of(checkpoints / "kept-0.7").words
    low, high = wilson_interval(evaluation["top1"], 24)
    assert f"pruned {100 * evaluation['top1']:.1f} % {100 * low:.1f} % to {100 * high:.1f} %" in words
    assert f"dense {100 * evaluation['baseline_top1']:.1f} %" in words
    change = [f"{100 * value:+.1f}" for value in (evaluation["delta"], *evaluation["interval"])]
    assert f"changed by {change[0]} points (95 % interval {change[1]} to {change[2]})" in words


def test_what_was_not_measured_is_said_so(checkpoints, tmp_path):
    words = page_of(checkpoints / "kept-0.5").words
    assert "Not measured. blockprune evaluate with labelled images" in words
    assert "Not measured. Kept FLOPs are no speed-up" in words
    assert "Speed-up, measured - not measured" in words
    bare = shutil.copytree(checkpoints / "kept-0.5", tmp_path / "bare")
    (bare / REPORT).unlink()
    (bare / "blockprune_config.json").unlink()
    words = page_of(bare).words
    assert "has no report file" in words
    assert "holds no recipe" in words
    assert "Not known: the report file does not say" in words
    assert "environment it was pruned in is not recorded" in words
    assert torch.equal(
        page_of(bare).masks["vit.layers.1.mlp.fc2"], page_of(checkpoints / "kept-0.5").masks["vit.layers.1.mlp.fc2"]
    )


def test_a_family_without_cost_model_is_told_apart(processor, tmp_path):
    config = BlockPruneConfig(block_shape=(8, 8), method="magnitude", budget={"metric": "density", "ratio": 0.5})
    pruner = BlockPruner(tiny_model("swin"), processor, config, name="tiny-swin")
    pruner.prune()
    pruner.save_pretrained(tmp_path / "swin")
    page = page_of(tmp_path / "swin")
    assert "Not predicted: " in page.words
    assert len(page.masks) == len(open_checkpoint(tmp_path / "swin").layers)


def test_devices_are_those_that_were_named(checkpoints):
    report = describe(checkpoints / "kept-0.9", ["systolic-16", "cpu-avx2"], batch_size=4)
    assert [(row["device"], row["batch"]) for row in report.values["predicted"]] == [
        ("systolic-16", 4),
        ("cpu-avx2", 4),
    ]
    with pytest.raises(ConfigError, match="no profile 'abacus'"):
        describe(checkpoints / "kept-0.9", ["abacus"])


def test_several_are_compared(checkpoints):
    names = [checkpoints / f"kept-{ratio}" for ratio in (0.9, 0.7, 0.5)]
    page = page_of(*names)
    rows = page.tables["Figures of each model"][1:]
    assert [row[1] for row in rows] == [name.name for name in names]
    assert rows[2][5:] == ["not measured", "not measured"]
    circles = [attributes["class"] for attributes in page.with_tag("circle")]
    values = [describe(name).values for name in names[:2]]
    best = frontier([(v["flops_ratio"], v["evaluation"]["top1"]) for v in values])
    assert circles == [*("best" if mark else "other" for mark in best), "dense"]
    assert page_of(names[0], names[2]).with_tag("circle") == []
    assert "measured for fewer than two" in page_of(names[0], names[2]).words


def test_accuracies_on_other_images_are_not_compared_silently(checkpoints, tmp_path):
    other = changed(checkpoints / "kept-0.7", tmp_path / "other", lambda r: r["evaluation"].update(dataset="elsewhere"))
    assert "do not compare" not in page_of(checkpoints / "kept-0.9", checkpoints / "kept-0.7").words
    assert "do not compare" in page_of(checkpoints / "kept-0.9", other).words


def test_texts_of_a_checkpoint_stay_texts(checkpoints, tmp_path):
    """`Page` refuses active elements and attributes wherever they are."""

    def poison(values):
        values.update(base_model=EVIL, model_class=EVIL, environment={EVIL: {EVIL: EVIL}}, seconds={EVIL: EVIL})
        values["config"]["method"] = values["evaluation"]["dataset"] = values["calibration"]["dataset"] = EVIL
        values["latency"].update(device=EVIL, dtype=EVIL)
        values["layers"].append({"name": EVIL, "kept_blocks": EVIL})
        values["layers"][0]["kept_blocks"] = EVIL

    folder = changed(checkpoints / "kept-0.9", tmp_path / "<b>evil&", poison)
    (folder / "blockprune_config.json").write_text(json.dumps({EVIL: [EVIL], "deep": {"er": EVIL}}))
    page = page_of(folder, checkpoints / "kept-0.7")
    assert page.words.count("<script>alert(1)</script>") > 8
    assert "{{7*7}}" in page.words
    assert "<b>evil&" in page.words
    assert "<script" not in page.html


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["evaluation"].update(top1="good"), "evaluation.top1: expected a number from 0 to 1, got good"),
        (lambda r: r["evaluation"].update(top1=float("nan")), "evaluation.top1"),
        (lambda r: r["evaluation"].update(num_images=0), "evaluation.num_images"),
        (lambda r: r["evaluation"].update(num_images=10**200), "evaluation.num_images"),
        (lambda r: r["evaluation"].update(interval=[1, 2, 3]), "evaluation.interval: expected 2 numbers"),
        (
            lambda r: r["latency"]["rows"][0].pop("speedup"),
            r"latency.rows\[0\].speedup: expected a number, got nothing",
        ),
        (lambda r: r.update(layers="all"), "layers: expected a list, got all"),
        (lambda r: r.update(base_model=["x"]), "base_model: expected text"),
        (lambda r: r.update(environment=7), "environment: expected a mapping"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(checkpoints, tmp_path, change, message):
    folder = changed(checkpoints / "kept-0.9", tmp_path / "odd", change)
    with pytest.raises(CheckpointError, match=message):
        describe(folder)


def test_long_values_are_cut():
    rows = flat({"a" * 1000: "b" * 10000, "deep": {"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}})
    assert all(len(text) <= 200 for row in rows for text in row)
    assert len(flat({str(i): i for i in range(5000)})) == MAX_ROWS
    assert StoredValues({"a": True}, "file").values["a"] is True
    with pytest.raises(CheckpointError, match="expected a number"):
        StoredValues({"a": True}, "file").number("a")


def test_texts_that_cannot_be_shown_are_shown_as_such(checkpoints, tmp_path):
    odd = "a\x00b\ud800c\u202ed"
    folder = changed(
        checkpoints / "kept-0.7", tmp_path / "odd", lambda r: r.update(base_model=odd, environment={odd: odd})
    )
    write_report(folder, tmp_path / "page.html")
    words = Page((tmp_path / "page.html").read_text(encoding="utf-8")).words
    assert words.count("a\ufffdb\ufffdc\ufffdd") == 3


def test_bottomless_files_are_refused(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "kept-0.7", tmp_path / "deep")
    (folder / REPORT).write_text('{"config": ' * 100_000 + "{}" + "}" * 100_000)
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        describe(folder)
    for depth in (100, 900):
        (folder / REPORT).write_text('{"environment": {"a": ' + "[" * depth + "]" * depth + "}}")
        try:
            assert dict(describe(folder).values["environment"]).keys() == {"a"}
        except CheckpointError as error:
            assert "is not valid JSON" in str(error)  # noqa: PT017 (how deep Python reads depends on its version)


def test_a_report_that_contradicts_the_weights_is_pointed_out(checkpoints, tmp_path):
    def lie(values):
        values["layers"][3]["kept_blocks"] += 1
        values["layers"].append({"name": "vit.layers.9.mlp.fc1"})

    folder = changed(checkpoints / "kept-0.9", tmp_path / "lies", lie)
    notes = describe(folder).values["notes"]
    assert len(notes) == 2
    assert "this page shows the weights" in notes[0]
    assert "1 layers that the weights do not hold: vit.layers.9.mlp.fc1" in notes[1]
    assert describe(checkpoints / "kept-0.9").values["notes"] == []


def test_files_are_written_whole_and_not_overwritten(checkpoints, tmp_path):
    page = tmp_path / "report.html"
    write_report(checkpoints / "kept-0.9", page)
    assert Page(page.read_text(encoding="utf-8")).masks
    with pytest.raises(CheckpointError, match="exists already"):
        write_report(checkpoints / "kept-0.5", page)
    with pytest.raises(CheckpointError, match="folder does not exist"):
        write_report(checkpoints / "kept-0.5", tmp_path / "no/where.html")
    with pytest.raises(CheckpointError, match="no checkpoint was named"):
        write_report([], tmp_path / "none.html")
    before = page.read_bytes()
    with pytest.raises(CheckpointError):
        write_report(tmp_path, page, overwrite=True)
    assert page.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_command(checkpoints, tmp_path):
    page = tmp_path / "page.html"
    arguments = ["report", checkpoints / "kept-0.9", checkpoints / "kept-0.7", "--output", page]
    arguments = [str(argument) for argument in [*arguments, "--device", "systolic-16", "--json"]]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["output"] == str(page)
    assert [v["name"] for v in values["checkpoints"]] == ["kept-0.9", "kept-0.7"]
    assert [v["predicted"][0]["device"] for v in values["checkpoints"]] == ["systolic-16"] * 2
    assert len(page.read_bytes()) < 200_000
    again = CliRunner().invoke(app, arguments)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "exists already" in again.stderr
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0


@pytest.mark.slow
def test_from_the_hub(online, checkpoints, tmp_path):
    """In a process of its own, as the Hub's address is read once."""
    hub, client = online
    hub.add("someone/shown", checkpoints / "kept-0.7")
    script = "import sys; from hf_blockprune import write_report; write_report(*sys.argv[1:])"
    client.run(script, "someone/shown", tmp_path / "page.html")
    missing = client.start(script, "someone/missing", tmp_path / "none.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Pruned model: someone/shown" in page.words
    assert page.masks.keys() == page_of(checkpoints / "kept-0.7").masks.keys()
    assert "no such folder, and no such model on the Hub" in missing.stderr
    asked = {request.rpartition("/")[2] for request in hub.requests if "/shown/resolve/" in request}
    assert asked
    assert not any(name.endswith(".py") for name in asked)


POINTS = st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.4]), st.sampled_from([0.0, 0.5, 0.6, 1.0])), max_size=9)


@given(POINTS)
def test_the_frontier_is_what_no_point_beats(points):
    def beats(a, b):
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    assert frontier(points) == [not any(beats(other, point) for other in points) for point in points]


@given(st.integers(1, 500), st.floats(0, 1))
def test_intervals_hold_the_share(count, share):
    low, high = wilson_interval(share, count)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    assert high > low


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_within_and_are_few(low, width):
    found = ticks(low, low + width)
    assert len(found) <= 6
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in found)


def test_bars_of_losses_below_zero_and_of_nothing():
    chart = bar_chart([Bar(-1.0, "0", "a", ""), Bar(0.0, "1", "a", "")])
    assert [bar["height"] for bar in chart["bars"]] == [0, 0]
    assert bar_chart([])["bars"] == []
    many = bar_chart([Bar(1.0, str(i), f"role {i}", "") for i in range(100)])
    assert len(many["labels"]) <= 16
    assert max(bar["x"] + bar["width"] for bar in many["bars"]) <= 100


def test_a_layer_with_no_block_has_no_picture():
    assert mask_picture(torch.zeros(0, 3).bool(), (8, 8), 24).uri is None


@needs_browser()
def test_in_a_browser(checkpoints, tmp_path):
    page = tmp_path / "page.html"
    write_report([checkpoints / "kept-0.9", checkpoints / "kept-0.7"], page)
    assert_looks_right(page, tmp_path)


@needs_browser()
def test_the_browser_sees_what_is_wrong(checkpoints, tmp_path):
    page = tmp_path / "page.html"
    write_report(checkpoints / "kept-0.9", page)
    text = page.read_text(encoding="utf-8").replace(
        "<h2>", "<script>alert(1)</script><pre>wide" + "x" * 300 + "</pre><h2>", 1
    )
    page.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=r"scrolls sideways.*wrote to the console"):
        assert_looks_right(page, tmp_path)


def assert_looks_right(page, folder):
    """On a desktop and on a phone, light and dark; no errors on the console, and no scrolling sideways."""
    command = [sys.executable, str(ROOT / "scripts/screenshot.py"), str(page), "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout.replace("\n", " ") + done.stderr
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(s["inner"], s["dark"]) for s in seen] == [(1200, False), (390, True)]
    assert all(s["images"] == 24 and s["broken"] == 0 for s in seen)
    assert re.fullmatch(r"(\w+-\w+\.png ?){2}", " ".join(sorted(p.name for p in folder.glob("*.png"))))
