"""What can be refused is refused before the work: every case here lacks what the work would need, such as weights."""

import json
import os
import shutil

import pytest

from hf_blockprune import BlockPruneConfig, BlockPruner, ConfigError, DataError, ModelError
from hf_blockprune.errors import BackendError
from hf_blockprune.jobs import demo
from hf_blockprune.jobs.measure import run_benchmark, run_evaluate
from hf_blockprune.jobs.prune import PruneJob
from tests.commands import refused
from tests.conftest import write_images

CLI = "import sys; from hf_blockprune.cli import app; app(sys.argv[1:])"


@pytest.fixture(scope="module")
def hollow(vit_folder, tmp_path_factory):
    """(a pruned, a dense model), both without weights."""
    parent = tmp_path_factory.mktemp("hollow")
    config = BlockPruneConfig(method="magnitude", block_shape=(16, 16), budget={"metric": "density", "ratio": 0.5})
    pruner = BlockPruner.from_pretrained(vit_folder, config)
    pruner.prune()
    pruner.save_pretrained(parent / "pruned")
    shutil.copytree(vit_folder, parent / "dense")
    for name in ("pruned", "dense"):
        (parent / name / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="file is missing"):
        BlockPruner.from_pretrained(parent / "pruned")
    return parent / "pruned", parent / "dense"


@pytest.fixture(params=["a file", "/proc", "/sys"])
def unwritable(request, tmp_path):
    """A folder in which nothing can be made, whoever asks."""
    if request.param != "a file":
        if not os.path.isdir(request.param):
            pytest.skip(f"there is no {request.param} here")
        return request.param
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file")


def test_evaluate_looks_at_images_and_models_first(hollow, images, tmp_path):
    pruned, _ = map(str, hollow)
    with pytest.raises(DataError, match="no such folder"):
        run_evaluate(pruned, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="has no labels"):
        run_evaluate(pruned, write_images(tmp_path / "plain", 4, labels=False))
    folder = write_images(tmp_path / "wrong", 4)
    (folder / "metadata.csv").write_text("file_name,label\n" + "".join(f"picture_{i:03d}.png,99\n" for i in range(4)))
    with pytest.raises(DataError, match="99"):
        run_evaluate(pruned, folder)
    with pytest.raises(ModelError, match="nowhere"):
        run_evaluate(pruned, tmp_path / "nowhere-either", against=str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="file is missing"):  # the weights, at last
        run_evaluate(pruned, images)


def test_encoders_are_compared_with_something(hollow, images, tmp_path):
    encoder = shutil.copytree(hollow[1], tmp_path / "encoder")
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**config, "architectures": ["ViTModel"]}))
    with pytest.raises(ModelError, match="name the dense model"):
        run_evaluate(str(encoder), tmp_path / "nowhere")


def test_a_recovery_needs_images(tmp_path):
    settings = {"model": "dense", "output": str(tmp_path / "out"), "method": "magnitude", "recover": True}
    with pytest.raises(ConfigError, match="recovery: learns from images; name a dataset"):
        PruneJob.read(None, **settings)


def test_benchmark_looks_at_both_models_first(hollow, tmp_path):
    pruned, dense = map(str, hollow)
    with pytest.raises(ModelError, match="no block-sparse layers"):
        run_benchmark(dense)
    with pytest.raises(ModelError, match="nowhere"):
        run_benchmark(pruned, against=str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="file is missing"):
        run_benchmark(pruned)


def test_a_backend_that_does_not_exist_is_refused_with_the_choices(hollow, images, monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", "abacus")
    for run in (lambda: run_evaluate(str(hollow[0]), images), lambda: run_benchmark(str(hollow[0]))):
        with pytest.raises(BackendError, match=r"BLOCKPRUNE_BACKEND: .*'abacus'.*'reference'"):
            run()


def test_report_looks_at_output_devices_and_folders_first(hollow, tmp_path):
    pruned, page = hollow[0], tmp_path / "page.html"
    page.write_text("mine")
    assert "exists already" in refused("report", pruned, "-o", page)
    assert "no profile 'abacus'" in refused("report", pruned, "--device", "abacus", "-o", tmp_path / "new.html")
    (tmp_path / "empty").mkdir()
    assert "empty/config.json" in refused("report", pruned, tmp_path / "empty", "-o", tmp_path / "new.html")
    assert page.read_text() == "mine"


def test_report_into_a_place_that_takes_no_file(hollow, unwritable):
    assert f"{unwritable}/page.html: " in refused("report", hollow[0], "-o", f"{unwritable}/page.html")


@pytest.mark.parametrize("form", ["--dense", "--torch-export"])
def test_export_looks_at_its_output_first(hollow, unwritable, tmp_path, form):
    assert "cannot be written" in refused("export", hollow[0], form, "-o", f"{unwritable}/out")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/config.json").write_text("{}")
    line = refused("export", hollow[0], form, "-o", tmp_path / "there")
    assert ("exists already" if form == "--dense" else "is a folder") in line


def test_demo_looks_at_its_output_first(hollow, unwritable, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_digits", lambda: pytest.fail("the demonstration began"))
    assert "is a saved model itself" in refused("demo", "-o", hollow[1])
    assert "is a saved model itself" in refused("demo", "-o", hollow[1], "--overwrite")
    shutil.copytree(hollow[1], tmp_path / "earlier/pruned")
    assert "exists already" in refused("demo", "-o", tmp_path / "earlier")
    assert "cannot be written" in refused("demo", "-o", f"{unwritable}/demo")
    assert "no profile 'abacus'" in refused("demo", "--budget", "latency=0.5@abacus")


def test_simulate_looks_at_the_device_first(tmp_path):
    assert "no profile 'abacus'" in refused("simulate", tmp_path / "nowhere", "--device", "abacus")


def test_push_looks_at_the_name_first(tmp_path):
    assert "could not be uploaded" in refused("push", tmp_path / "nowhere", "no/such/name")


@pytest.mark.slow
@pytest.mark.parametrize("command", [["report"], ["export", "--dense"]])
def test_no_traceback_in_a_process_of_its_own(forks, hollow, tmp_path, command):
    (tmp_path / "file").write_text("")
    arguments = [command[0], str(hollow[0]), *command[1:], "-o", str(tmp_path / "file/page.html")]
    done = forks.run("-c", CLI, *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def dense(hollow):
    """A dense model without weights."""
    return hollow[1]


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("unlabelled") / "images", 3, labels=False)


def job(command, dense, images, tmp_path, **changes):
    """Arguments of a command that would work, if the model had weights."""
    named = {"dataset": images, "evaluate-on": images, "output": tmp_path / "out"}
    if command in ("recover", "finetune"):
        named["teacher"] = dense
    if command == "sweep":
        named["budgets"] = "0.9"
    named |= changes
    return [command, dense, "--quiet", *(word for key, value in named.items() for word in (f"--{key}", value))]


COMMANDS = ["prune", "recover", "finetune", "sweep"]


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_weights_are_what_comes_next(command, dense, images, tmp_path):
    assert "weights" in refused(*job(command, dense, images, tmp_path)) or "model.safetensors" in refused(
        *job(command, dense, images, tmp_path)
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_labelled_images(command, dense, images, unlabelled, tmp_path):
    changed = job(command, dense, images, tmp_path, **{"evaluate-on": unlabelled})
    assert "has no labels, so accuracy cannot be measured" in refused(*changed)
    changed = job(command, dense, images, tmp_path, **{"evaluate-on": tmp_path / "nowhere"})
    assert str(tmp_path / "nowhere") in refused(*changed)


@pytest.mark.parametrize("command", COMMANDS)
def test_output(command, dense, images, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(*job(command, dense, images, tmp_path, output=tmp_path / "file"))
    assert "is a file; name a folder" in line


@pytest.mark.parametrize("command", ["prune", "recover", "finetune"])
def test_output_that_cannot_be_made(command, dense, images, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(*job(command, dense, images, tmp_path, output=tmp_path / "file/out"))
    assert "cannot be written" in line


@pytest.mark.parametrize(
    ("command", "option", "value"), [("prune", "budget", "latency=0.5@abacus"), ("sweep", "budgets", "energy=1@abacus")]
)
def test_devices(command, option, value, dense, images, tmp_path):
    assert "no profile 'abacus'" in refused(*job(command, dense, images, tmp_path, **{option: value}))


@pytest.mark.parametrize("command", COMMANDS)
def test_backend(command, dense, images, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", "abacus")
    assert "abacus" in refused(*job(command, dense, images, tmp_path))


@pytest.mark.parametrize("command", ["recover", "finetune"])
def test_teacher(command, dense, images, tmp_path):
    line = refused(*job(command, dense, images, tmp_path, teacher=tmp_path / "nobody"))
    assert str(tmp_path / "nobody") in line


@pytest.mark.parametrize("setting", ["--epochs 1 --warmup-epochs 5", "--lr 1e-9"])
def test_settings_of_training(setting, dense, images, tmp_path):
    line = refused(*job("finetune", dense, images, tmp_path), *setting.split())
    assert "epochs; lower it" in line or "is the peak" in line
