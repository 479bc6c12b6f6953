"""What may be done with the config of a block-sparse model, and with its dtype."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ViTForImageClassification

from hf_blockprune import BlockSparseFormatError
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from tests.conftest import tiny_model
from tests.hub.saved_models import OWN_KEYS, answer, assert_same, config_of, sparse_model


def test_the_config_of_a_loaded_model_loads_it_again(first, loaded):
    expected = answer(first[1])
    assert_same(answer(ViTForImageClassification.from_pretrained(first[0], config=loaded.config)), expected)
    config = AutoConfig.from_pretrained(first[0])
    assert_same(answer(AutoModelForImageClassification.from_pretrained(first[0], config=config)), expected)
    tensors = {"config": loaded.config, "state_dict": loaded.state_dict()}
    assert_same(answer(ViTForImageClassification.from_pretrained(None, **tensors)), expected)
    assert "quantization_config" in config.to_dict()


def test_tensors_in_memory_keep_a_bias_that_the_architecture_lacks(tmp_path):
    model = sparse_model(tiny_model(qkv_bias=False))
    layer = model.vit.layers[0].attention.q_proj
    layer.bias = nn.Parameter(torch.ones(48))
    model.save_pretrained(tmp_path)
    again = ViTForImageClassification.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same(answer(again), answer(model))
    assert again.vit.layers[0].attention.k_proj.bias is None


def test_configs_compare_copy_and_print(first, loaded, tmp_path):
    config = loaded.config
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    changed = copy.deepcopy(config)
    changed.quantization_config.layers.popitem()
    assert changed.quantization_config != config.quantization_config
    stored = config_of(first[0])["quantization_config"]
    assert config.quantization_config == stored
    assert json.loads(config.to_json_string())["quantization_config"] == stored
    assert json.loads(json.dumps(config.to_dict()))["quantization_config"] == stored
    assert dict(config.quantization_config) == stored
    AutoConfig.from_pretrained(first[0]).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).quantization_config == stored


@pytest.mark.parametrize("source", ["a loaded model's", "a file's"])
def test_a_dense_model_is_built_from_a_config_and_says_so(first, loaded, tmp_path, source):
    config = loaded.config if source == "a loaded model's" else AutoConfig.from_pretrained(first[0])
    model = AutoModelForImageClassification.from_config(config).eval()
    assert not any(block_sparse_layers(model))
    assert not OWN_KEYS & set(model.config.to_dict())
    assert "quantization_config" in config.to_dict()  # it is still what it was
    model.save_pretrained(tmp_path)
    assert_same(answer(AutoModelForImageClassification.from_pretrained(tmp_path)), answer(model))
    with pytest.raises(BlockSparseFormatError, match=r"^ViTForImageClassification\(config\): .*from_config\(config\)"):
        ViTForImageClassification(config)


CASTS = {
    "half": torch.float16,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
}


@pytest.mark.parametrize("name", CASTS)
def test_a_model_is_cast_as_any_other(first, tmp_path, name):
    model = AutoModelForImageClassification.from_pretrained(first[0], dtype=torch.float64)
    for form in (model, copy.deepcopy(first[1])):
        cast = getattr(form, name)()
        assert {parameter.dtype for parameter in cast.parameters()} == {CASTS[name]}
        cast.save_pretrained(tmp_path)
        again = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), cast.parameters(), strict=True))
        dense = cast.dequantize()
        assert {parameter.dtype for parameter in dense.parameters()} == {CASTS[name]}
