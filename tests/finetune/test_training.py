"""Training of pruned models: masks stay, steps do not depend on processes, and runs go on as if they were whole."""

import copy
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_blockprune import (
    BlockPruneConfig,
    BlockPruner,
    CheckpointError,
    ConfigError,
    DataError,
    FinetuneConfig,
    ModelError,
)
from hf_blockprune.data.batches import load_images
from hf_blockprune.finetune.gradual import masks_of
from hf_blockprune.finetune.training import Finetuning
from hf_blockprune.jobs.finetune import FinetuneJob, make_accelerator
from hf_blockprune.runs.resume import RunState
from hf_blockprune.runs.training_state import Average
from tests.conftest import ALL_FAMILIES, NUM_LABELS, ROOT, tiny_model, write_images
from tests.finetuning import check_masks, train

RECIPE = ROOT / "recipes/finetune.py"
SCRIPT = ROOT / "tests/finetuning.py"
PRUNING = BlockPruneConfig(block_shape=(10, 14), budget={"ratio": 0.7}, method="magnitude", min_kept_per_layer=0)
# Keys' biases change nothing, so that their gradients are rounding: with a small eps Adam would follow it.
SETTINGS = {"epochs": 2, "batch_size": 8, "micro_batch": 4, "lr": 1e-3, "eps": 1e-6, "warmup_epochs": 1, "clip": 1.0}


def settings_of(**changes):
    return FinetuneConfig.from_dict({**SETTINGS, "ema": 0.9, "distillation": {"hidden_weight": 0.5}, **changes})


@pytest.fixture(scope="module")
def models(tmp_path_factory, processor):
    """(folder of a pruned model whose blocks do not divide its matrices, folder of the dense one)."""
    folder = tmp_path_factory.mktemp("models")
    dense = tiny_model()
    for path in ("dense", "pruned"):
        dense.save_pretrained(folder / path)
        processor.save_pretrained(folder / path)
    pruner = BlockPruner(dense, processor, PRUNING, name="dense")
    pruner.prune()
    pruner.save_pretrained(folder / "pruned", overwrite=True)
    return folder / "pruned", folder / "dense"


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """22 labelled pictures: the last of three steps of 8 is ragged."""
    return write_images(tmp_path_factory.mktemp("some") / "images", 22)


def same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def close(one, two, tolerance):
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def test_masks_are_exact_after_each_of_a_hundred_steps(models, some, accelerator):
    settings = settings_of(epochs=34, micro_batch=8, augment=None, distillation={"kind": "none"}, weight_decay=0.5)
    before = masks_of(BlockPruner.from_pretrained(models[0]).model)
    run, steps = train(*models, some, settings, accelerator=accelerator)
    assert steps == run.history.step == 102
    assert masks_of(run.model).keys() == before.keys()
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(run.model).items())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_trains_with_its_masks(family, processor, some, accelerator):
    dense = tiny_model(family)
    pruner = BlockPruner(copy.deepcopy(dense), processor, PRUNING.replace(block_shape=(8, 8), min_kept_per_layer=0.3))
    pruner.prune()
    masks, before = masks_of(pruner.model), {n: p.detach().clone() for n, p in pruner.model.named_parameters()}
    settings = settings_of(epochs=1, precision="no")
    pruner.finetune(some, settings, teacher=BlockPruner(dense, processor))
    check_masks(pruner.model, masks)
    after = dict(pruner.model.named_parameters())
    assert after.keys() == before.keys()
    # Predictions do not depend on these two: on the one at all, on the other because softmax takes no constant.
    unused = ("mask_token", "k_proj.bias")
    assert not [n for n, value in after.items() if torch.equal(value, before[n]) and not n.endswith(unused)]
    assert all(parameter.requires_grad for parameter in pruner.model.parameters())


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(launch, models, some, accelerator, tmp_path):
    """With DDP and with FSDP2, with micro-batches of which one process has none in the ragged last batch.

    Blocks leave in the second run; in the others the script watches the masks, in the third for a hundred steps.
    """
    settings = settings_of(epochs=3, micro_batch=2)
    long = settings_of(epochs=34, augment=None, distillation={"kind": "none"}, weight_decay=0.5)
    common = {"pruned": str(models[0]), "dense": str(models[1]), "images": str(some)}
    gradual = settings_of(gradual={"budget": {"ratio": 0.5}, "every": 2, "end": 0.8, "samples": 8})
    runs = {"ddp": (settings, False), "gradual": (gradual, False), "long": (long, False), "fsdp2": (settings, True)}
    outputs = {name: tmp_path / f"{name}.safetensors" for name in runs}
    jobs = [
        {**common, "settings": run.to_dict(), "shard": sharded, "output": str(outputs[name])}
        for name, (run, sharded) in runs.items()
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = launch([SCRIPT, tmp_path / "jobs.json"], processes=2)
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    values = dict(zip(runs, printed, strict=True))
    one, steps = train(*models, some, settings, accelerator=accelerator)
    for name, kind in (("ddp", "MULTI_CPU"), ("fsdp2", "FSDP")):
        assert values[name]["kind"] == f"DistributedType.{kind}"
        assert values[name]["steps"] == steps == 9
        assert values[name]["losses"] == pytest.approx(one.history.losses, rel=1e-5)
        close(one.model.state_dict(), load_file(outputs[name]), 1e-5)
    shrunk, _ = train(*models, some, gradual, accelerator=accelerator)
    close(shrunk.model.state_dict(), load_file(outputs["gradual"]), 1e-5)
    assert values["long"]["steps"] == 102
    before, after = BlockPruner.from_pretrained(models[0]).model.state_dict(), load_file(outputs["long"])
    same({n: v for n, v in before.items() if "indices" in n}, {n: v for n, v in after.items() if "indices" in n})


@pytest.mark.parametrize("changes", [{"micro_batch": 2}, {"workers": 2}])
def test_how_a_batch_is_computed_does_not_change_the_steps(models, some, accelerator, changes):
    one, _ = train(*models, some, settings_of(), accelerator=accelerator)
    two, _ = train(*models, some, settings_of(**changes), accelerator=accelerator)
    close(one.model.state_dict(), two.model.state_dict(), 1e-5)


def test_the_first_step_is_that_of_plain_torch(models, some, accelerator, processor):
    """AdamW on the mean loss of the whole batch, computed on dense layers with zeros."""
    settings = settings_of(
        epochs=1, batch_size=22, augment=None, ema=None, clip=0.5, warmup_lr=3e-4, label_smoothing=0.2, weight_decay=0.1
    )
    run, _ = train(*models, some, settings, accelerator=accelerator)
    dense = BlockPruner.from_pretrained(models[1]).model
    plain = copy.deepcopy(dense)
    for name, module in BlockPruner.from_pretrained(models[0]).model.named_modules():
        if name in masks_of(run.model):
            plain.set_submodule(name, module.to_dense())
    images = load_images(some)
    pixels = processor(images=[image.convert("RGB") for image in map(Image.open, sorted(some.glob("*.png")))])
    pixels = torch.tensor(np.stack(pixels["pixel_values"]))
    labels = torch.tensor(images.dataset["label"])
    out = plain(pixel_values=pixels, output_hidden_states=True)
    with torch.no_grad():
        want = dense(pixel_values=pixels, output_hidden_states=True)
    loss = torch.nn.functional.cross_entropy(out.logits, labels, label_smoothing=0.2)
    loss = loss + torch.nn.functional.kl_div(
        out.logits.log_softmax(-1), want.logits.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    for a, b in zip(out.hidden_states[1:], want.hidden_states[1:], strict=True):
        distance = (a - b).square().mean((1, 2)) / b.flatten(1).var(1, unbiased=False)
        loss = loss + 0.5 * distance.mean() / len(out.hidden_states[1:])
    loss.backward()
    assert float(loss.detach()) == pytest.approx(run.history.losses[0], rel=1e-5)
    for name, mask in masks_of(run.model).items():
        blocks = mask.repeat_interleave(10, 0).repeat_interleave(14, 1)
        linear = plain.get_submodule(name)
        linear.weight.grad *= blocks[: linear.out_features, : linear.in_features]
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    matrices = {f"{n}.weight" for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    sides = [[p for n, p in plain.named_parameters() if (n in matrices) is decays] for decays in (True, False)]
    groups = [{"params": sides[0], "weight_decay": 0.1}, {"params": sides[1], "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=3e-4, eps=1e-6).step()
    for name in masks_of(run.model):
        run.model.set_submodule(name, run.model.get_submodule(name).to_dense())
    close(run.model.state_dict(), plain.state_dict(), 2e-6)


def test_the_average_is_that_of_float64():
    torch.manual_seed(0)
    steps = [{"a": torch.randn(3, 2)} for _ in range(50)]
    average, expected = Average(steps[0], 0.9), steps[0]["a"].double()
    for values in steps[1:]:
        average.update(values)
        expected = 0.9 * expected + 0.1 * values["a"].double()
    torch.testing.assert_close(average.values["a"].double(), expected, rtol=0, atol=1e-6)


def test_what_is_kept_is_the_average(models, some, accelerator):
    """Of the weights after each step, without which the run ends elsewhere."""
    seen = []
    settings = settings_of(ema=0.5)
    run, _ = train(*models, some, settings_of(ema=None), accelerator=accelerator)
    averaged = Finetuning(
        BlockPruner.from_pretrained(models[0]).model,
        run.processor,
        run.images,
        settings,
        accelerator,
        teacher=BlockPruner.from_pretrained(models[1]).model,
    )
    name = "classifier.weight"
    start = averaged.model.get_parameter(name).clone()
    step = averaged.student.step

    def watched(*args, **kwargs):
        result = step(*args, **kwargs)
        seen.append(averaged.student.model.get_parameter(name).detach().double().clone())
        return result

    averaged.student.step = watched
    averaged.run()
    expected = start.double()
    for weight in seen:
        expected = 0.5 * expected + 0.5 * weight
    torch.testing.assert_close(averaged.model.get_parameter(name).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(run.model.get_parameter(name).double(), seen[-1], rtol=0, atol=1e-6)


def learnable(folder, count, seed):
    """Pictures whose class is the channel that is bright."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = ["file_name,label"]
    for i in range(count):
        label = i % 3
        picture = rng.integers(0, 90, (32, 32, 3))
        picture[..., label] += 150
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{label}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_what_can_be_learned_is_learned(models, accelerator, tmp_path):
    images, others = learnable(tmp_path / "a", 48, 0), learnable(tmp_path / "b", 24, 1)
    pruner = BlockPruner.from_pretrained(models[0], accelerator=accelerator)
    before = pruner.evaluate(others).top1
    settings = settings_of(
        epochs=12, batch_size=16, micro_batch=16, lr=3e-3, ema=None, augment=None, distillation={"kind": "none"}
    )
    pruner.finetune(images, settings, evaluation=others)
    values = pruner.report()["finetuning"]
    assert values["losses"][-1] < 0.6 * values["losses"][0]
    assert pruner.evaluate(others).top1 > max(before + 0.4, 0.8)
    best = max(values["evaluations"], key=lambda e: e["top1"])
    assert values["kept_epoch"] == best["epoch"]
    assert pruner.report()["evaluation"]["top1"] == best["top1"]


@pytest.mark.parametrize("gradual", [False, True])
def test_a_run_goes_on_from_any_saved_step_bit_for_bit(models, some, accelerator, tmp_path, monkeypatch, gradual):
    more = {"gradual": {"budget": {"ratio": 0.5}, "every": 2, "end": 0.8, "samples": 8}} if gradual else {}
    settings = settings_of(save_every=1, **more)
    write = RunState.write

    def write_and_keep(progress, part, *args, **kwargs):
        write(progress, part, *args, **kwargs)
        shutil.copytree(progress.folder, tmp_path / f"after-{len(list(tmp_path.iterdir()))}")

    monkeypatch.setattr(RunState, "write", write_and_keep)
    options = {"accelerator": accelerator, "evaluation": load_images(some)}
    whole, _ = train(*models, some, settings, work_dir=tmp_path / "work", **options)
    monkeypatch.setattr(RunState, "write", write)
    expected, kept = whole.model.state_dict(), sorted(tmp_path.glob("after-*"))
    assert len(kept) > settings.epochs * 3
    for folder in kept[::2] if gradual else kept[1::3]:
        run, _ = train(*models, some, settings, work_dir=folder, **options)
        same(run.model.state_dict(), expected)
        assert {**vars(run.history), "seconds": 0} == {**vars(whole.history), "seconds": 0}


def test_the_state_of_another_run_is_refused(models, some, accelerator, tmp_path):
    train(*models, some, settings_of(epochs=1, warmup_epochs=0), accelerator=accelerator, work_dir=tmp_path / "work")
    for changes in ({"seed": 1}, {"epochs": 2}, {"label_smoothing": 0.0}, {"augment": {"flip": 0.0}}):
        settings = settings_of(**{"epochs": 1, "warmup_epochs": 0, **changes})
        with pytest.raises(CheckpointError, match="holds the state of a run with another model, data set or settings"):
            train(*models, some, settings, accelerator=accelerator, work_dir=tmp_path / "work")
    same_run = settings_of(epochs=1, warmup_epochs=0, workers=1, save_every=5)
    run, steps = train(*models, some, same_run, accelerator=accelerator, work_dir=tmp_path / "work")
    assert (steps, run.history.step) == (0, 3)


@pytest.mark.slow
def test_a_killed_recipe_is_resumed_bit_for_bit(forks, models, some, tmp_path):
    """In mixed precision, which leaves the weights themselves in single precision."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(settings_of(epochs=10, save_every=2, precision="bf16").to_dict()))
    command = [RECIPE, "--config", recipe, "--model", models[0], "--quiet", "--json"]
    command += ["--teacher", models[1], "--dataset", some, "--output"]
    env = {**forks.env, "ACCELERATE_USE_CPU": "true"}
    state = tmp_path / ".out.unfinished/state.safetensors"
    process = forks.start(*command, tmp_path / "out", env=env)
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists()
    assert not (tmp_path / "out").exists()
    resumed = forks.run(*command, tmp_path / "out", "--resume", env=env)
    assert resumed.returncode == 0, resumed.stderr
    whole = forks.run(*command, tmp_path / "whole", env=env)
    assert whole.returncode == 0, whole.stderr
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    same(*weights)
    assert {value.dtype for value in weights[0].values()} == {torch.float32, torch.int32}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.json", "whole"]
    report = json.loads(resumed.stdout)
    assert report["finetuning"]["steps"] == 30
    assert report["finetuning"]["losses"] == json.loads(whole.stdout)["finetuning"]["losses"]


def test_a_half_precision_checkpoint_stays_one(models, some, processor, accelerator):
    model = BlockPruner.from_pretrained(models[0]).model.to(torch.bfloat16)
    run = Finetuning(
        model, processor, load_images(some), settings_of(epochs=1, distillation={"kind": "none"}), accelerator
    )
    assert next(run.student.model.parameters()).dtype == torch.float32
    run.run()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_corrupt_images_count_for_nothing_and_too_many_are_refused(models, accelerator, tmp_path):
    images = write_images(tmp_path / "few", 8)
    (images / "picture_003.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1 of 8 images cannot be decoded, more than 1%: .*picture_003\.png"):
        train(*models, images, settings_of(), accelerator=accelerator)


def test_a_corrupt_image_is_left_out_of_the_mean(models, accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_blockprune.finetune.training.MAX_CORRUPT_SHARE", 0.5)
    images = write_images(tmp_path / "all", 8)
    settings = settings_of(epochs=1, augment=None)
    for name in ("picture_003.png", "picture_006.png"):
        (images / name).write_bytes(b"no picture")
    one, _ = train(*models, images, settings, accelerator=accelerator)
    assert [os.path.basename(file) for file in one.history.skipped] == ["picture_003.png", "picture_006.png"]
    lines = [line for line in (images / "metadata.csv").read_text().split() if "003" not in line and "006" not in line]
    (images / "metadata.csv").write_text("\n".join(lines) + "\n")
    for name in ("picture_003.png", "picture_006.png"):
        (images / name).unlink()
    two, _ = train(*models, images, settings, accelerator=accelerator)
    close(one.model.state_dict(), two.model.state_dict(), 1e-5)


def test_streams_train_as_far_as_they_are_said_to_reach(models, some, accelerator):
    from hf_blockprune import DataSource

    settings = settings_of(epoch_images=20, epochs=1)
    source = DataSource(some, streaming=True, shuffle_buffer=8)
    pruner = BlockPruner.from_pretrained(models[0], accelerator=accelerator)
    pruner.finetune(source, settings, teacher=models[1])
    assert pruner.report()["finetuning"]["num_images"] == 20
    with pytest.raises(DataError, match="a stream does not say how many images it has; set epoch_images"):
        pruner.finetune(source, settings_of(), teacher=models[1])
    with pytest.raises(DataError, match="holds fewer than 40 images; lower epoch_images"):
        pruner.finetune(source, settings_of(epoch_images=40), teacher=models[1])
    with pytest.raises(DataError, match="is no stream, 22 images long; take out epoch_images"):
        pruner.finetune(some, settings, teacher=models[1])


def test_labels_are_not_needed_where_they_weigh_nothing(models, accelerator, tmp_path):
    images = write_images(tmp_path / "unlabelled", 8, labels=False)
    with pytest.raises(DataError, match="has no labels; set label_weight to 0"):
        train(*models, images, settings_of(), accelerator=accelerator)
    run, steps = train(*models, images, settings_of(label_weight=0, epochs=1), accelerator=accelerator)
    assert steps == 1
    assert run.history.losses[0] > 0


def test_hard_distillation_learns_the_teachers_classes(models, some, accelerator):
    settings = settings_of(label_weight=0, distillation={"kind": "hard"}, augment=None, epochs=8, lr=3e-3, ema=None)
    run, _ = train(*models, some, settings, accelerator=accelerator)
    assert run.history.losses[-1] < 0.7 * run.history.losses[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lr": "1e-3"}, ConfigError, r"lr: expected a number from 0 \(YAML reads 1e-3 as text"),
        ({"epoch": 3}, ConfigError, "config: unknown key epoch; known keys are epochs"),
        ({"distillation": {"kinds": 1}}, ConfigError, "distillation: unknown key kinds; known keys are kind"),
        ({"augment": {"crop": 1}}, ConfigError, "augment: unknown key crop; known keys are smallest_crop"),
        ({"gradual": {"steps": 1}}, ConfigError, "gradual: unknown key steps; known keys are budget"),
        ({"gradual": {"start": 0.6, "end": 0.5}}, ConfigError, "leave no time"),
        ({"gradual": {"method": "random"}}, ConfigError, "gradual.method: expected one of magnitude, taylor, obs"),
        ({"precision": False}, ConfigError, "precision: expected 'no', 'bf16' or 'fp16' .in YAML with quotes"),
        ({"trackers": ["mlflow"]}, ConfigError, "trackers: expected a list of tensorboard, trackio, wandb"),
        ({"micro_batch": 3}, ConfigError, "micro_batch: images are mixed in pairs; give an even number, not 3"),
        ({"warmup_epochs": 5}, ConfigError, "warmup_epochs: 5 are more than the 2 epochs; lower it"),
        ({"min_lr": 0.1}, ConfigError, "lr: 0.001 is the peak; min_lr and warmup_lr may not lie above it"),
        ({"ema": 1.0}, ConfigError, "ema: expected a share from 0 to below 1"),
        (
            {"label_weight": 0, "distillation": {"kind": "none"}},
            ConfigError,
            "all weights are 0, so nothing is lear",
        ),
        ({"distillation": {"kind": "hard", "temperature": 2}}, ConfigError, "kind 'hard' has none; leave it out"),
        ({"precision": "bf16"}, ConfigError, "precision: 'bf16' is not that of the accelerator, 'no'"),
        ({"gradual": {"budget": {"ratio": 0.9}}}, ConfigError, "the model keeps 0.69.* already, no more than the 0.9"),
        (
            {"gradual": {"block_shape": [8, 8]}},
            ConfigError,
            r"has blocks of \(10, 14\) already; leave it out",
        ),
        ({"lr": 1e30, "warmup_lr": 1e30, "clip": None}, ModelError, "step 2: the loss is not finite; lower lr"),
    ],
)
def test_what_cannot_work_is_refused(models, some, accelerator, changes, error, message):
    with pytest.raises(error, match=message):
        train(*models, some, settings_of(**changes), accelerator=accelerator)


def test_models_that_do_not_fit_are_refused(models, some, accelerator, processor):
    images, options = load_images(some), {"accelerator": accelerator}
    pruned, dense = (BlockPruner.from_pretrained(folder).model for folder in models)
    with pytest.raises(ModelError, match="has no block-sparse layers: prune it first, or set gradual"):
        Finetuning(dense, processor, images, settings_of(), teacher=dense, **options)
    with pytest.raises(ModelError, match=r"name the dense model as teacher, or set distillation\.kind to none"):
        Finetuning(pruned, processor, images, settings_of(), **options)
    other = tiny_model(id2label={0: "a", 1: "b"})
    with pytest.raises(ModelError, match=f"the teacher has 2 classes, the model {NUM_LABELS}"):
        Finetuning(pruned, processor, images, settings_of(), teacher=other, **options)
    other = tiny_model(num_hidden_layers=1)
    with pytest.raises(ModelError, match="the teacher's hidden states have other shapes than the model's"):
        Finetuning(pruned, processor, images, settings_of(), teacher=other, **options).run()
    dense = BlockPruner.from_pretrained(models[1]).model
    settings = settings_of(gradual={"budget": {"ratio": 0.5}})
    with pytest.raises(ConfigError, match=r"gradual\.block_shape: the model is dense; say how large blocks are"):
        Finetuning(dense, processor, images, settings, teacher=dense, **options)


def test_a_tracker_that_is_missing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="trackers: wandb is not installed; pip install wandb, or take it out"):
        make_accelerator(FinetuneConfig(trackers=["wandb"]), tmp_path)


@pytest.mark.slow
def test_a_precision_that_the_device_lacks_is_one_line(forks, models, some, tmp_path):
    (tmp_path / "recipe.yaml").write_text("precision: fp16\n")
    command = [RECIPE, "--config", tmp_path / "recipe.yaml", "--model", models[0]]
    command += ["--teacher", models[1], "--dataset", some, "--output", tmp_path / "out"]
    done = forks.run(*command, env={**forks.env, "ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: precision: 'fp16' does not work on this device (cpu)")


def test_a_tracker_is_told_losses_rates_and_accuracy(models, some, processor, tmp_path):
    settings = settings_of(trackers=["tensorboard"], distillation={"kind": "none"})
    accelerator = make_accelerator(settings, tmp_path / "logs")
    model = BlockPruner.from_pretrained(models[0]).model
    images = load_images(some)
    run = Finetuning(model, processor, images, settings, accelerator, evaluation=images)
    run.run()
    accelerator.end_training()
    (events,) = (path for path in (tmp_path / "logs").rglob("*tfevents*") if path.parent.name == "hf_blockprune")
    content = events.read_bytes()
    assert content.count(b"loss") == content.count(b"lr") == 6
    assert content.count(b"top1") == 2


def test_jobs_are_read_from_recipes_and_overrides(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: a\noutput: b\ndataset: {path: c, split: train}\nepochs: 10\n")
    job = FinetuneJob.read(recipe, epochs=7, teacher="d", lr=None)
    assert (job.model, job.teacher, job.dataset.split, job.config.epochs) == ("a", "d", "train", 7)
    assert FinetuneConfig.from_dict(job.config.to_dict()) == job.config
    recipe.write_text("model: a\noutput: b\n")
    with pytest.raises(ConfigError, match="dataset: name images to learn from"):
        FinetuneJob.read(recipe)
    recipe.write_text("output: b\ndataset: c\n")
    with pytest.raises(ConfigError, match="model: name one on the command line or in the recipe"):
        FinetuneJob.read(recipe)
