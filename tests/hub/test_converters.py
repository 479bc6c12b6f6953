"""Layers that transformers merges with others, or changes, between a model and its files."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification, ViTForImageClassification
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

from hf_blockprune import ModelError
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.export.forms import export_checkpoint
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from tests.conftest import tiny_config, tiny_settings
from tests.hub.saved_models import answer, answers_of, assert_same, pruned, sparse_model


def swiglu(family, **changes):
    """A tiny model with gated MLPs, whose two first Linears transformers keeps as one in files."""
    settings = {key: value for key, value in tiny_settings().items() if key != "intermediate_size"}
    config = getattr(transformers, f"{family}Config")(**{**settings, "use_swiglu_ffn": True, "mlp_ratio": 4, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForImageClassification")(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


GATED = ("Dinov2", "Dinov2WithRegisters")
CHOICES = {
    "all": lambda name: True,
    # Older transformers keep both halves of a gated MLP in one Linear.
    "gates alone": lambda name: "gate_proj" in name or "weights_in" in name,
    "one half of one layer": lambda name: ".0." in name and ("up_proj" in name or "weights_in" in name),
    "one layer": lambda name: ".1." in name,
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", GATED)
def test_layers_that_transformers_would_merge_are_saved(family, choice, tmp_path):
    model = sparse_model(swiglu(family), chosen=CHOICES[choice])
    count = len(list(block_sparse_layers(model)))
    for turn in range(2):
        model.save_pretrained(tmp_path / f"{turn}", **({"max_shard_size": "20KB"} if turn else {}))
        again, info = AutoModelForImageClassification.from_pretrained(tmp_path / f"{turn}", output_loading_info=True)
        assert not any(info.values()), info
        assert len(list(block_sparse_layers(again))) == count
        assert_same(answer(again), answer(model))
        model = again
    expected = answer(model)
    model.dequantize().save_pretrained(tmp_path / "dense")
    names = load_file(tmp_path / "dense" / "model.safetensors")
    assert any("mlp.weights_in.weight" in name for name in names)
    assert not any("gate_proj" in name for name in names)
    assert_same(answer(AutoModelForImageClassification.from_pretrained(tmp_path / "dense")), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", GATED)
def test_gated_mlps_through_all_that_the_package_does(family, processor, tmp_path):
    pruner = pruned(swiglu(family), processor)
    pruner.save_pretrained(tmp_path / "saved")
    stored = inspect_checkpoint(tmp_path / "saved")
    assert {layer["module"] for layer in stored["layers"]} == {name for name, _ in block_sparse_layers(pruner.model)}
    export_checkpoint(tmp_path / "saved", tmp_path / "dense", "dense")
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(answer(dense), answer(pruner.model), rtol=1e-4, atol=1e-4)
    places = {"saved": ("AutoModelForImageClassification", str(tmp_path / "saved"))}
    _, answers = answers_of(places, tmp_path, package=False, trust_remote_code=True)["saved"]
    torch.testing.assert_close(answers, answer(pruner.model), rtol=1e-4, atol=1e-4)


class TransposedViT(ViTForImageClassification):
    """A model whose files hold a layer's weight transposed, under the same name."""


def test_layers_that_cannot_be_stored_are_refused_before_the_work(processor):
    turned = WeightConverter("layers.0.mlp.fc1.weight", "layers.0.mlp.fc1.weight", operations=[Transpose(0, 1)])
    register_checkpoint_conversion_mapping("TransposedViT", [turned], overwrite=True)
    model = TransposedViT(tiny_config("vit"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"1 of its layers .*vit\.layers\.0\.mlp\.fc1.*ignore"):
        pruned(model, processor)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
