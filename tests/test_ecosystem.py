"""What the Hugging Face ecosystem does with any model works with a pruned one."""

import pickle

import pytest
import torch
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hf_blockprune import BlockPruneConfig, BlockPruner
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from tests.conftest import NUM_LABELS, tiny_model

PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory):
    config = BlockPruneConfig(method="magnitude", block_shape=(16, 16), budget={"metric": "density", "ratio": 0.5})
    pruner = BlockPruner(tiny_model(), processor, config)
    pruner.prune()
    folder = tmp_path_factory.mktemp("ecosystem") / "pruned"
    pruner.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(model):
    return model(pixel_values=PIXELS).logits


def masks_of(model):
    return {name: module.mask() for name, module in block_sparse_layers(model)}


@pytest.fixture(scope="module")
def expected(folder):
    return logits_of(AutoModelForImageClassification.from_pretrained(folder))


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"vit": "cpu", "classifier": "disk"}, {"": "disk"}])
def test_device_maps_and_offloading(folder, expected, tmp_path, device_map):
    model = AutoModelForImageClassification.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    torch.testing.assert_close(logits_of(model).cpu(), expected, rtol=1e-5, atol=1e-5)


def test_layers_on_disk_beside_layers_in_memory(folder, expected, tmp_path):
    places = {"vit.embeddings": "cpu", "vit.layers.0": "disk", "vit.layers.1": "cpu", "vit.layernorm": "cpu"}
    model = AutoModelForImageClassification.from_pretrained(
        folder, device_map={**places, "classifier": "cpu"}, offload_folder=tmp_path
    )
    assert next(model.vit.layers[0].parameters()).is_meta
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_pickle(folder, expected):
    model = pickle.loads(pickle.dumps(AutoModelForImageClassification.from_pretrained(folder)))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_trainer_fine_tunes_what_is_kept(folder, expected, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(folder)
    before = masks_of(model)
    rows = [{"pixel_values": PIXELS[i % 4], "labels": i % NUM_LABELS} for i in range(8)]
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(tmp_path / "run", dataloader_pin_memory=False, **settings, **quiet)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(model).items())
    trainer.save_model(tmp_path / "tuned")
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(logits_of(tuned), logits_of(model.eval()), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits_of(tuned), expected, atol=1e-2)
