"""The example scripts run top to bottom."""

import os
import socket
import subprocess
import sys
import time

import pytest
from transformers import pipeline

from .conftest import ROOT

pytestmark = pytest.mark.slow


def example(name, *arguments):
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_prune_then_classify(vit_folder, images, tmp_path):
    said = example("prune.py", vit_folder, images, tmp_path / "out")
    assert "% of the FLOPs" in said
    answers = example("classify.py", tmp_path / "out", images / "picture_000.png").splitlines()
    assert len(answers) == 3
    assert all("class " in answer for answer in answers)


def test_quickstart(vit_folder, images, tmp_path):
    said = example("quickstart.py", vit_folder, images, images, tmp_path / "out")
    assert "times as fast" in said
    assert "on 24 images" in said
    assert (tmp_path / "out.html").stat().st_size > 10_000


def test_compare_methods(vit_folder, images):
    lines = example("compare_methods.py", vit_folder, images, images).splitlines()
    assert [line.split()[0] for line in lines] == ["magnitude", "taylor"]
    assert all("on 24 images" in line for line in lines)


def test_the_app_shows_what_both_models_say(vit_folder, images, tmp_path):
    """Served to a real client over HTTP."""
    from gradio_client import Client, handle_file

    example("prune.py", vit_folder, images, tmp_path / "out")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "examples/app.py"), str(tmp_path / "out"), str(vit_folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"}
    with subprocess.Popen([*command, "--port", str(port)], env=env, stderr=subprocess.PIPE, text=True) as app:
        try:
            client = wait_for(lambda: Client(f"http://127.0.0.1:{port}", verbose=False), app)
            picture = images / "picture_000.png"
            dense, pruned, times = client.predict(handle_file(picture), api_name="/compare")
        finally:
            app.terminate()
    for answer, folder in ((dense, vit_folder), (pruned, tmp_path / "out")):
        expected = pipeline("image-classification", model=str(folder))(str(picture), top_k=5)
        found = {entry["label"]: entry["confidence"] for entry in answer["confidences"]}
        assert found == pytest.approx({entry["label"]: entry["score"] for entry in expected}, abs=1e-4)
    assert "speed-up" in times


def wait_for(connect, process, seconds=120):
    """What `connect` gives once it does not fail any more."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return connect()
        except Exception:
            assert process.poll() is None, process.stderr.read()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.5)
