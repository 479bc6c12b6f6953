"""Whoever saves a block-sparse model, and in whatever form it is then: what is saved loads again, with its weights."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, QuantoConfig, Trainer, TrainingArguments, ViTModel

from hf_blockprune import BlockSparseFormatError
from hf_blockprune.hub import modeling_blockprune
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from tests.conftest import tiny_model, tiny_settings
from tests.hub.saved_models import (
    HUB_FILES,
    OWN_KEYS,
    PIXELS,
    answer,
    answers_of,
    assert_same,
    config_of,
    run,
    sparse_model,
)


def train(model, folder):
    """A checkpoint as `Trainer` leaves it, without a step that changes weights."""
    rows = [{"pixel_values": PIXELS[0], "labels": 1}]
    options = {"max_steps": 1, "learning_rate": 0.0, "save_steps": 1, "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(folder, disable_tqdm=True, dataloader_pin_memory=False, **options)
    Trainer(model, arguments, train_dataset=rows).train()
    return folder / "checkpoint-1"


def save_in_every_way(folder, model, work):
    """Folders of one model, by who saved it in which form."""
    accelerator = Accelerator(cpu=True)
    forms = {
        "just pruned": model,
        "loaded": AutoModelForImageClassification.from_pretrained(folder),
        "copied": copy.deepcopy(model),
        "pickled": pickle.loads(pickle.dumps(model)),
        "compiled": torch.compile(model),
        "unwrapped": accelerator.unwrap_model(accelerator.prepare(copy.deepcopy(model))),
    }
    for name, form in forms.items():
        form.save_pretrained(work / name)
    model.save_pretrained(work / "in shards", max_shard_size="20KB")
    model.save_pretrained(work / "tensors passed", state_dict=model.state_dict())
    places = {"trained": train(copy.deepcopy(model), work / "training")}
    return {**{path.name: path for path in work.iterdir() if path.name != "training"}, **places}


@pytest.mark.slow
def test_every_way_of_saving_loads_in_every_way(first, tmp_path):
    (tmp_path / "saved").mkdir()
    folders = save_in_every_way(*first, tmp_path / "saved")
    assert len(folders) == 9
    for name, folder in folders.items():
        files = {path.name for path in folder.glob("*.py")}
        assert files == HUB_FILES, name
    places = {name: ("AutoModelForImageClassification", str(folder)) for name, folder in folders.items()}
    for package, kwargs in ((True, {}), (True, {"trust_remote_code": True}), (False, {"trust_remote_code": True})):
        for name, (sparse, answers) in answers_of(places, tmp_path, package=package, **kwargs).items():
            assert sparse == 12, name
            assert_same(answers, answer(first[1]))


SAVE_AGAIN = """
import sys
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[2])
model.dequantize().save_pretrained(sys.argv[3])
"""


@pytest.mark.slow
def test_a_model_that_was_loaded_without_the_package_is_saved_with_its_code(first, tmp_path):
    done = run(SAVE_AGAIN, tmp_path, str(first[0]), str(tmp_path / "again"), str(tmp_path / "dense"), package=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert config_of(tmp_path / "again") == config_of(first[0])
    assert {path.name for path in (tmp_path / "again").glob("*.py")} <= HUB_FILES
    places = {"again": ("AutoModelForImageClassification", str(tmp_path / "again"))}
    sparse, answers = answers_of(places, tmp_path, package=False, trust_remote_code=True)["again"]
    assert sparse == 12
    assert_same(answers, answer(first[1]))
    assert not OWN_KEYS & set(config_of(tmp_path / "dense"))
    assert config_of(tmp_path / "dense")["architectures"] == ["ViTForImageClassification"]
    assert not list((tmp_path / "dense").glob("*.py"))


@pytest.mark.slow
def test_a_model_made_dense_is_saved_as_any_other(loaded, tmp_path):
    expected = answer(loaded)
    loaded.dequantize().save_pretrained(tmp_path / "dense")
    assert {path.name for path in (tmp_path / "dense").iterdir()} == {"config.json", "model.safetensors"}
    assert not OWN_KEYS & set(config_of(tmp_path / "dense"))
    places = {"dense": ("AutoModelForImageClassification", str(tmp_path / "dense"))}
    for package in (True, False):
        assert_same(answers_of(places, tmp_path, package=package)["dense"][1], expected)


def test_passed_tensors_are_saved(first, tmp_path):
    changed = {
        name: tensor + 1 if name == "classifier.bias" else tensor for name, tensor in first[1].state_dict().items()
    }
    first[1].save_pretrained(tmp_path, state_dict=changed)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again.classifier.bias, first[1].classifier.bias + 1)


def test_the_models_own_names_are_saved(loaded, tmp_path):
    loaded.save_pretrained(tmp_path, save_original_format=False)
    again, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert "vit.layers.0.mlp.fc1" in config_of(tmp_path)["quantization_config"]["layers"]
    assert_same(answer(again), answer(loaded))


def test_a_folder_is_used_again(first, loaded, tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path)
    for model in (loaded, copy.deepcopy(loaded).dequantize(), loaded):
        model.save_pretrained(tmp_path)
        assert_same(answer(AutoModelForImageClassification.from_pretrained(tmp_path)), answer(first[1]))


def test_quantized_layers_beside_block_sparse_ones_are_refused(first, tmp_path):
    whole = copy.deepcopy(first[1])
    settings = QuantoConfig(weights="int8")
    whole.hf_quantizer = type("Other", (), {"quantization_config": settings, "is_serializable": lambda self: True})()
    with pytest.raises(BlockSparseFormatError, match=r"quanto quantized.*save them apart"):
        whole.save_pretrained(tmp_path / "saved")


def test_saving_leaves_model_and_config_as_they_were(loaded, tmp_path):
    before, attributes = copy.deepcopy(loaded.config.to_dict()), set(vars(loaded))
    loaded.save_pretrained(tmp_path)
    after = loaded.config.to_dict()
    assert {key: value for key, value in after.items() if key not in ("architectures", "dtype")} == {
        key: value for key, value in before.items() if key not in ("architectures", "dtype")
    }
    assert set(vars(loaded)) == attributes


def test_other_models_are_saved_as_ever(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert not OWN_KEYS & set(config_of(tmp_path))


PUSH = """
import sys
import hf_blockprune
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
model.push_to_hub("someone/pushed")
model.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="someone/saved")
"""


@pytest.mark.slow
def test_the_models_own_ways_to_the_hub_upload_the_code(online, first, tmp_path):
    hub, client = online
    client.run(PUSH, first[0], tmp_path / "local")
    for repo in ("someone/pushed", "someone/saved"):
        assert {"config.json", "model.safetensors", *HUB_FILES} <= set(hub.files(repo))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["vit_msn", "data2vec-vision", "dinov2_with_registers", "ijepa", "siglip", "vit model"]
)
def test_families_load_without_the_package(kind, tmp_path):
    names = {
        "vit_msn": ("ViTMSN", "ForImageClassification"),
        "data2vec-vision": ("Data2VecVision", "ForImageClassification"),
        "dinov2_with_registers": ("Dinov2WithRegisters", "ForImageClassification"),
        "ijepa": ("IJepa", "ForImageClassification"),
        "siglip": ("SiglipVision", "Model"),
        "vit model": ("ViT", "Model"),
    }
    family, head = names[kind]
    settings = {k: v for k, v in tiny_settings().items() if family != "Dinov2WithRegisters" or k != "intermediate_size"}
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    sparse_model(model).save_pretrained(tmp_path / "saved")
    auto = f"AutoModel{head.removeprefix('Model')}"
    assert config_of(tmp_path / "saved")["auto_map"][auto] == f"modeling_blockprune.BlockPrune{family}{head}"
    places = {"saved": (auto, str(tmp_path / "saved"))}
    sparse, answers = answers_of(places, tmp_path, package=False, trust_remote_code=True)["saved"]
    assert sparse == 12
    assert_same(answers, answer(model))


def test_the_code_beside_a_checkpoint_names_model_classes_of_transformers_alone():
    made = modeling_blockprune.BlockPruneViTModel
    assert made is modeling_blockprune.BlockPruneViTModel
    assert issubclass(made, ViTModel)
    for name in ("BlockPruneViTConfig", "BlockPruneNothing", "ViTModel", "BlockPrunepipeline"):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_blockprune, name)


# Each is a call that fine-tunes a model with another head; without the code, none may give one.
TRY_ALL = """
import json, sys
import transformers
from transformers import AutoConfig, pipeline

folder, = sys.argv[1:]
loaded, messages = [], []
for name in ("AutoModelForImageClassification", "AutoModel", "ViTForImageClassification", "ViTModel"):
    cls = getattr(transformers, name)
    config = AutoConfig.from_pretrained(folder, num_labels=3)
    for what, call in {
        "mismatch": lambda: cls.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True),
        "config": lambda: cls.from_pretrained(folder, config=config, ignore_mismatched_sizes=True),
        "variant": lambda: cls.from_pretrained(folder, variant="small", ignore_mismatched_sizes=True),
        "subfolder": lambda: cls.from_pretrained(f"{folder}/..", subfolder="guarded", ignore_mismatched_sizes=True),
        "pipeline": lambda: pipeline("image-classification", model=folder),
    }.items():
        try:
            call()
            loaded.append(f"{name} {what}")
        except Exception as error:
            messages.append(str(error))
print(json.dumps([loaded, messages]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"variant": "small"}], ids=str)
def test_nobody_gets_random_weights(first, tmp_path, options):
    first[1].save_pretrained(tmp_path / "guarded", **options)
    done = run(TRY_ALL, tmp_path, str(tmp_path / "guarded"), package=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded, messages = json.loads(done.stdout.splitlines()[-1])
    assert loaded == []
    assert len(messages) == 20
    assert all("trust_remote_code=True" in message for message in messages)


def test_a_body_without_the_head_keeps_what_was_trained(first):
    model = AutoModel.from_pretrained(first[0], ignore_mismatched_sizes=True)
    assert len(list(block_sparse_layers(model))) == 12
    for name, module in block_sparse_layers(model):
        assert torch.equal(module.weight, first[1].vit.get_submodule(name).weight)
