"""The command line: outputs, exit codes, one-line errors."""

import json
import subprocess
import sys

import datasets
import pytest
import torch

from hf_blockprune._cpu.library import find_library
from hf_blockprune.cost.systolic import dense_cycles
from hf_blockprune.data.batches import load_images
from hf_blockprune.hub.blockprune_backends import available_backends
from tests.commands import refused, run
from tests.conftest import write_images

QUICK = ["--block-shape", "16x16", "--budget", "flops=0.75", "--samples", "8", "--quiet"]


@pytest.fixture(scope="module")
def pruned(vit_folder, images, tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "pruned"
    result = run("prune", vit_folder, "--dataset", images, "--output", output, *QUICK)
    assert result.exit_code == 0, result.output
    assert "75." in result.stdout or "74." in result.stdout
    return output


def test_prune_json_is_the_saved_report(vit_folder, images, tmp_path):
    result = run("prune", vit_folder, "--dataset", images, "--output", tmp_path / "out", "--json", *QUICK)
    report = json.loads(result.stdout)
    saved = json.loads((tmp_path / "out/blockprune_report.json").read_text())
    assert {key: value for key, value in report.items() if key != "output"} == saved


def test_inspect_json_has_the_promised_keys(pruned):
    values = json.loads(run("inspect", pruned, "--json").stdout)
    assert 0.7 < values["flops_ratio"] <= 0.75
    assert values["size_bytes"] < values["dense_size_bytes"]
    total = sum(layer["kept_blocks"] for layer in values["layers"])
    assert values["density"] == pytest.approx(total / sum(layer["blocks"] for layer in values["layers"]))
    for layer in values["layers"]:
        assert set(layer) >= {"name", "shape", "block_shape", "kept_blocks", "density"}


def test_inspect_table_shows_every_layer(pruned):
    shown = run("inspect", pruned).stdout
    for layer in json.loads(run("inspect", pruned, "--json").stdout)["layers"]:
        assert layer["module"] in shown


def test_inspect_says_what_multiplies_with_each_layer(pruned, monkeypatch):
    layers = json.loads(run("inspect", pruned, "--json").stdout)["layers"]
    backends = {layer["cpu_backend"] for layer in layers}
    monkeypatch.setenv("BLOCKPRUNE_STORAGE", "auto")  # these layers are too small for kernels to pay
    unpacked = json.loads(run("inspect", pruned, "--json").stdout)["layers"]
    assert {layer["cpu_backend"] for layer in unpacked} == {"unpacked"}
    assert backends <= {"cpu", "dense"}
    if find_library()[0] is None:
        assert backends == {"dense"}
    else:  # half of the blocks are left
        assert "cpu" in backends


def test_env_names_machine_versions_and_backends():
    values = json.loads(run("env", "--json").stdout)
    assert torch.__version__.startswith(values["versions"]["torch"])  # which may lack +cu124
    assert values["backends"]["registered"].split(", ") == available_backends()
    assert values["backends"]["cpu"] == find_library()[1]
    shown = run("env").stdout
    assert values["cpu"] in shown
    assert "backends cpu" in shown


def test_evaluate_json_with_and_without_baseline(pruned, vit_folder, images):
    alone = json.loads(run("evaluate", pruned, "--dataset", images, "--json", "--quiet").stdout)
    assert set(alone) == {"top1", "top5", "num_images", "skipped"}
    both = json.loads(run("evaluate", pruned, "--dataset", images, "--against", vit_folder, "--json", "--quiet").stdout)
    assert set(both) - set(alone) == {"baseline_top1", "delta", "interval", "flipped_to_wrong", "flipped_to_right"}
    assert both["top1"] == alone["top1"]


def test_recipe_with_overrides(vit_folder, images, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {vit_folder}\ndataset: {images}\noutput: {tmp_path / 'never'}\nblock_shape: [16, 16]\n"
        "method: magnitude\nbudget: {metric: flops, ratio: 0.9}\ncalibration: {samples: 4, seed: 3}\n"
    )
    arguments = ["--config", recipe, "--output", tmp_path / "out", "--budget", "density=0.5", "--samples", "6"]
    report = json.loads(run("prune", *arguments, "--json", "--quiet").stdout)
    assert report["config"]["budget"].items() >= {"metric": "density", "ratio": 0.5}.items()
    assert report["config"]["calibration"] == {"samples": 6, "batch_size": 16, "seed": 3, "cache_mb": 1024}
    assert not (tmp_path / "never").exists()


@pytest.fixture(scope="module")
def table(images, tmp_path_factory):
    """A parquet file with columns of other names."""
    path = tmp_path_factory.mktemp("table") / "pictures.parquet"
    dataset = load_images(images).dataset.cast_column("image", datasets.Image())
    dataset.rename_columns({"image": "photo", "label": "species"}).to_parquet(path)
    return path


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_columns_by_option(pruned, vit_folder, table, tmp_path, streaming):
    columns = ["--image-column", "photo", "--label-column", "species", *streaming]
    arguments = ["--dataset", table, "--evaluate-on", table, "--output", tmp_path / "out", "--method", "taylor"]
    report = json.loads(run("prune", vit_folder, *arguments, *columns, "--json", *QUICK).stdout)
    assert report["calibration"]["num_images"] == 8
    assert report["calibration"]["found_images"] == (None if streaming else 24)
    assert report["evaluation"]["num_images"] == 24
    measured = json.loads(run("evaluate", pruned, "--dataset", table, *columns, "--json", "--quiet").stdout)
    assert measured["num_images"] == 24
    line = refused("evaluate", pruned, "--dataset", table, "--label-column", "genus", "--quiet")
    assert "has no column 'genus'; choose the labels from photo, species" in line


def test_recipe_describes_its_data_sets(vit_folder, images, table, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {vit_folder}\noutput: {tmp_path / 'out'}\nblock_shape: [16, 16]\nmethod: taylor\n"
        f"budget: {{metric: flops, ratio: 0.9}}\ncalibration: {{samples: 4}}\nevaluation: {images}\n"
        f"dataset: {{path: {table}, label_column: species, streaming: true, shuffle_buffer: 8}}\n"
    )
    report = json.loads(run("prune", "--config", recipe, "--json", "--quiet").stdout)
    assert report["calibration"]["dataset"].endswith("pictures.parquet")
    assert report["evaluation"]["num_images"] == 24
    recipe.write_text(recipe.read_text().replace("label_column", "labels_column"))
    assert "unknown key 'labels_column'" in refused("prune", "--config", recipe, "--overwrite", "--quiet")


def test_moves_say_what_may_leave(vit_folder, images, tmp_path):
    quick = ["--dataset", images, "--samples", 8, "--budget", "flops=0.8", "--block-shape", "16x16"]
    result = run(
        "prune", vit_folder, *quick, "--moves", "units, heads", "--output", tmp_path / "out", "--json", "--quiet"
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["config"]["moves"] == ["units", "heads"]
    assert any(layer["kept_shape"] for layer in report["layers"])
    for layer in report["layers"]:
        rows, cols = layer["kept_shape"] or layer["shape"]
        assert layer["kept_blocks"] == -(-rows // 16) * -(-cols // 16)
    wrong = refused("prune", vit_folder, *quick, "--moves", "rows", "--output", tmp_path / "no", "--quiet")
    assert "blocks, units, heads" in wrong
    assert "leaves all to tokens" in refused(
        "prune", vit_folder, *quick, "--moves", "none", "--output", tmp_path / "no"
    )
    alone = ["--moves", "none", "--tokens", "auto", "--json", "--quiet", "--output", tmp_path / "tokens"]
    report = json.loads(run("prune", vit_folder, *quick, *alone).stdout)
    assert (report["density"], report["config"]["moves"]) == (1, [])


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "--block-shape", "16"],
        ["prune", "--budget", "flops"],
        ["prune", "--budget", "flops=2"],
        ["prune", "--samples", "0"],
        ["prune", "--no-such-option"],
        ["evaluate", "model"],
        ["no-such-command"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_usage_errors_exit_with_2(arguments):
    assert run(*arguments).exit_code == 2


def test_nothing_to_prune_is_one_line(tmp_path):
    assert "model: name one" in refused("prune", "--output", tmp_path / "out")


def test_existing_output_is_refused_before_any_work(vit_folder, images, pruned):
    line = refused("prune", "no/such-model", "--dataset", images, "--output", pruned, *QUICK)
    assert "exists already" in line


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_damaged_weights_are_one_line(pruned, images, tmp_path, command):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in pruned.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = ["--dataset", images, "--quiet"] if command == "evaluate" else []
    assert "safetensors" in refused(command, broken, *arguments)


def test_inspecting_something_else(tmp_path, vit_folder):
    assert "cannot be read" in refused("inspect", tmp_path)
    assert "no block-sparse checkpoint" in refused("inspect", vit_folder)


def test_empty_image_folder(vit_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    line = refused("prune", vit_folder, "--dataset", tmp_path / "empty", "--output", tmp_path / "out", *QUICK)
    assert "no images" in line
    assert not (tmp_path / "out").exists()


def test_corrupt_images_past_one_percent(vit_folder, tmp_path):
    folder = write_images(tmp_path / "pictures", 10)
    (folder / "picture_004.png").write_bytes(b"not a picture")
    line = refused("evaluate", vit_folder, "--dataset", folder, "--quiet")
    assert "1 of 10 images" in line
    assert "picture_004.png" in line


def test_installed_command_shows_help():
    done = subprocess.run([sys.executable, "-m", "hf_blockprune.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("prune", "evaluate", "inspect", "env", "demo"):
        assert command in done.stdout


def simulated(pruned, *options):
    result = run("simulate", pruned, "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("dataflow", ["ws", "os", "is"])
def test_simulate_adds_up_the_closed_forms(pruned, dataflow):
    values = simulated(pruned, "--device", "systolic-16", "--dataflow", dataflow, "--no-overlap")
    layers = json.loads(run("inspect", pruned, "--json").stdout)["layers"]
    assert [layer["name"] for layer in values["layers"]] == [layer["name"] for layer in layers]
    for layer, stored in zip(values["layers"], layers, strict=True):
        n, k = stored["shape"]
        options = {"rows": 16, "cols": 16, "dataflow": dataflow}
        assert layer["dense_cycles"] == dense_cycles(layer["tokens"], k, n, **options)
        assert layer["cycles"] <= layer["dense_cycles"]
    total = sum(layer["cycles"] + 1 for layer in values["layers"]) + values["other_cycles"]
    assert values["cycles"] == total
    assert values["latency_ms"] < values["dense_latency_ms"]
    assert 0 < values["utilisation"] <= 1
    assert values["array"]["dataflow"] == dataflow


def test_simulate_heeds_its_options(pruned):
    one = simulated(pruned, "--device", "systolic-16", "--no-overlap")
    assert simulated(pruned, "--device", "systolic-16", "--overlap")["cycles"] < one["cycles"]
    assert simulated(pruned, "--device", "systolic-16", "--no-overlap", "--arrays", "2")["cycles"] < one["cycles"]
    four = simulated(pruned, "--device", "systolic-16", "--no-overlap", "--batch-size", "4")
    assert four["flops"] == pytest.approx(4 * one["flops"])


@pytest.mark.parametrize("device", ["cpu-avx512", "h100-sxm"])
def test_simulate_on_devices_without_cycles(pruned, device):
    values = simulated(pruned, "--device", device)
    assert "cycles" not in values
    assert 0 < values["latency_ms"] <= values["dense_latency_ms"]
    assert "latency" in run("simulate", pruned, "--device", device).stdout


def test_simulate_refuses_what_it_does_not_know(pruned, vit_folder):
    assert "no profile 'abacus'" in refused("simulate", pruned, "--device", "abacus")
    wrong = run("simulate", pruned, "--dataflow", "rs")
    assert (wrong.exit_code, "'rs'" in wrong.stderr) == (2, True)
    assert "systolic arrays" in refused("simulate", pruned, "--device", "cpu-avx2", "--dataflow", "os")
    assert "no block-sparse checkpoint" in refused("simulate", vit_folder)
