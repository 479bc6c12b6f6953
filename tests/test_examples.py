"""The example scripts run top to bottom, as processes of their own."""

import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_blockprune import BlockPruneConfig, BlockPruner, ModelError
from tests.browser import needs_browser
from tests.conftest import ROOT, tiny_model
from tests.forking import plain_forks

pytestmark = pytest.mark.slow

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"}


def example(name, *arguments):
    done = plain_forks().run(ROOT / "examples" / name, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def saved(folder, crop=32, **changes):
    """A dense ViT whose processor makes pictures larger first, and then crops them to what the model takes."""
    tiny_model("vit", hidden_size=96, intermediate_size=384, image_size=crop, **changes).save_pretrained(folder)
    settings = {"image_processor_type": "DeiTImageProcessor", "size": {"height": 40, "width": 40}}
    settings["crop_size"] = {"height": crop, "width": crop}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    AutoImageProcessor.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("dense") / "cropping")


@pytest.fixture(scope="module")
def pruned(dense, images, tmp_path_factory):
    """What `prune.py` makes of it, and what it said."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    return folder, example("prune.py", dense, images, folder)


def test_every_example_is_run_here():
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert names <= set(re.findall(r'(\w+\.py)"', Path(__file__).read_text()))


def test_prune_then_classify(pruned, images):
    folder, said = pruned
    assert re.search(r"kept (79\.[5-9]|80\.0)% of the FLOPs", said)
    answers = example("classify.py", folder, images / "picture_000.png").splitlines()
    assert len(answers) == 3
    assert all("class " in answer for answer in answers)


def test_prune_writes_the_defaults_out(pruned):
    """So that its comments are on what a user gets who sets nothing."""
    stored = json.loads((pruned[0] / "blockprune_report.json").read_text())["config"]
    default = BlockPruneConfig()
    # Left unset, the moves are all that a family supports; written out, they can only be named.
    assert BlockPruneConfig.from_dict(stored) == dataclasses.replace(default, moves=default.allowed_moves)


def test_quickstart(vit_folder, images, tmp_path):
    said = example("quickstart.py", vit_folder, images, images, tmp_path / "out")
    assert "times as fast" in said
    assert "on 24 images" in said
    assert (tmp_path / "out.html").stat().st_size > 10_000


def test_compare_methods(vit_folder, images):
    lines = example("compare_methods.py", vit_folder, images, images).splitlines()
    assert [line.split()[0] for line in lines] == ["obs", "taylor", "magnitude"]
    assert all("on 24 images" in line for line in lines)


@contextmanager
def served(pruned, dense, folder):
    """The address that the app says it is at; it has to end cleanly at Ctrl-C."""
    command = [sys.executable, str(ROOT / "examples/app.py"), str(pruned), str(dense)]
    with (
        open(folder / "stderr", "w") as errors,
        subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors, text=True) as app,
    ):
        try:
            line = app.stdout.readline()
            address = ADDRESS.search(line)
            assert address is not None, line + (folder / "stderr").read_text()[-2000:]
            yield address[0]
            app.send_signal(signal.SIGINT)
            assert app.wait(600) == 0  # a machine with much else to do may take minutes
        finally:
            app.kill()
    assert "Traceback" not in (folder / "stderr").read_text()


def answers_of(folder, picture):
    """{class: probability} by transformers' own pipeline."""
    answers = pipeline("image-classification", model=str(folder))(str(picture), top_k=5)
    return {answer["label"]: answer["score"] for answer in answers}


def test_the_app_shows_what_both_models_say(dense, pruned, images, tmp_path):
    """Served to a real client over HTTP."""
    from gradio_client import Client, handle_file

    picture = images / "picture_000.png"
    with served(pruned[0], dense, tmp_path) as address:
        client = Client(address, verbose=False)
        *answers, times = client.predict(handle_file(picture), api_name="/compare")
    for answer, folder in zip(answers, (dense, pruned[0]), strict=True):
        found = {entry["label"]: entry["confidence"] for entry in answer["confidences"]}
        assert found == pytest.approx(answers_of(folder, picture), abs=1e-4)
    assert re.search(r"\| dense \| [\d.]+ ms \|\n\| pruned \| [\d.]+ ms \|\n\| speed-up \| [\d.]+x \|", times)


@needs_browser()
def test_the_app_in_a_browser(dense, pruned, images, tmp_path):
    """A picture named in the page's file dialog: both models' classes and the times come up, and no error."""
    picture = images / "picture_000.png"
    with served(pruned[0], dense, tmp_path) as address:
        command = [sys.executable, str(ROOT / "scripts/app_in_browser.py"), address, str(picture)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["errors"], seen["dialogs"]) == ([], 1)
    assert [row[0] for row in seen["rows"][1:]] == ["dense", "pruned", "speed-up"]
    assert all(re.fullmatch(r"[\d.]+ ms", row[1]) for row in seen["rows"][1:3])
    shown = seen["text"].partition("\ndense\n")[2].partition("\npruned\n")
    for text, folder in zip((shown[0], shown[2]), (dense, pruned[0]), strict=True):
        expected = answers_of(folder, picture)
        assert re.findall(r"(class \d)\n\d+%", text) == list(expected)


@needs_browser()
def test_the_browser_tells_of_an_error(dense, pruned, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("no picture")
    with served(pruned[0], dense, tmp_path) as address:
        command = [sys.executable, str(ROOT / "scripts/app_in_browser.py"), address, str(text)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert "Invalid file type" in json.loads(done.stdout.splitlines()[-1])["errors"][0], done.stderr


def test_the_app_ends_with_one_line_where_a_folder_is_missing(dense, tmp_path):
    done = plain_forks().run(ROOT / "examples/app.py", tmp_path / "none", dense)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert re.match(rf"error: {tmp_path}/none: no such model or folder", done.stderr.splitlines()[-1])


def test_the_app_refuses_models_that_do_not_compare(dense, pruned, tmp_path):
    spec = importlib.util.spec_from_file_location("app", ROOT / "examples/app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    with pytest.raises(ModelError, match="is not pruned; name the pruned model first"):
        app.load(str(dense), str(pruned[0]))
    with pytest.raises(ModelError, match="is pruned too; name the dense model"):
        app.load(str(pruned[0]), str(pruned[0]))
    other = saved(tmp_path / "classes", id2label={0: "cat", 1: "dog"})
    with pytest.raises(ModelError, match=r"know other classes \(2 and 7\); name the dense model"):
        app.load(str(pruned[0]), str(other))
    other = saved(tmp_path / "size", crop=24)
    with pytest.raises(ModelError, match=r"takes pictures of 32x32, size of 24x24 \(height x width\)"):
        app.load(str(pruned[0]), str(other))
    other = saved(tmp_path / "several", problem_type="multi_label_classification")
    with pytest.raises(ModelError, match="does not tell the one class of a picture"):
        app.load(str(pruned[0]), str(other))
    assert isinstance(app.load(str(pruned[0]), str(dense))["dense"], BlockPruner)
