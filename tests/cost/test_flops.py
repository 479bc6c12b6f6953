"""FLOPs of whole models against the formula written out."""

import pytest
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_blockprune import ModelError, sparsify
from hf_blockprune.cost.flops import count_flops, image_size
from tests.conftest import TINY_MODELS, tiny_config, tiny_model, tiny_settings

EXTRA_TOKENS = {"vit": 1, "deit": 2, "deit-distilled": 2}
HEADS = {"vit": 1, "deit": 1, "deit-distilled": 2}


def weightless(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def flops_by_hand(config, *, extra_tokens=1, heads=1):
    """Two FLOPs for each multiply-add; biases, norms and softmax are not counted."""
    patches = (config.image_size // config.patch_size) ** 2
    tokens, width, wide = patches + extra_tokens, config.hidden_size, config.intermediate_size
    patch_embedding = patches * config.num_channels * config.patch_size**2 * width
    projections = 4 * tokens * width * width
    products = 2 * tokens * tokens * width
    mlp = 2 * tokens * width * wide
    layers = config.num_hidden_layers * (projections + products + mlp)
    return 2 * (patch_embedding + layers + heads * width * config.num_labels)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 3, "image_size": 48}, {"intermediate_size": 80}])
def test_tiny_models_against_the_formula(family, changes):
    model_class, config_class = TINY_MODELS[family]
    config = config_class(**tiny_settings(**changes))
    expected = flops_by_hand(config, extra_tokens=EXTRA_TOKENS[family], heads=HEADS[family])
    assert count_flops(weightless(model_class, config)).total == expected


def test_vit_base_against_the_formula_and_the_literature():
    config = ViTConfig(num_labels=1000)
    total = count_flops(weightless(ViTForImageClassification, config)).total
    assert total == flops_by_hand(config)
    assert total == pytest.approx(35.13e9, rel=1e-3)


def test_distilled_base_counts_the_second_token_and_head():
    config = DeiTConfig(num_labels=1000)
    total = count_flops(weightless(DeiTForImageClassificationWithTeacher, config)).total
    assert total == flops_by_hand(config, extra_tokens=2, heads=2)
    assert total == count_flops(weightless(DeiTForImageClassification, config)).total + 2 * 768 * 1000


def test_linears_multiply_one_row_a_token(family):
    model_class, config_class = TINY_MODELS[family]
    config = config_class(**tiny_settings())
    tokens = count_flops(weightless(model_class, config)).linear_tokens
    names = {n for n, m in tiny_model(family).named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(tokens) == names
    heads = {name: count for name, count in tokens.items() if "classifier" in name}
    assert set(heads.values()) == {1}
    assert len(heads) == HEADS[family]
    assert {count for name, count in tokens.items() if name not in heads} == {16 + EXTRA_TOKENS[family]}


def test_oblong_images():
    config = ViTConfig(**tiny_settings(image_size=(32, 16)))
    assert set(count_flops(weightless(ViTForImageClassification, config)).linear_tokens.values()) == {1, 9}


def test_config_of_a_block_sparse_model_counts_its_dense_form():
    model = tiny_model()
    dense = count_flops(model)
    name = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".0." in n)
    sparsify(model, {name: torch.eye(3, dtype=torch.bool)}, (16, 16))
    assert model.config.quantization_config is not None
    assert count_flops(model) == dense
    assert model.config.quantization_config is not None


def test_model_without_an_image_size_is_refused():
    with pytest.raises(ModelError, match="its config has no image_size; only vision models can be pruned"):
        count_flops(
            weightless(ResNetForImageClassification, ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8))
        )


@pytest.mark.parametrize(
    ("processing", "size"),
    [
        ({}, (32, 32)),
        ({"size": {"height": 16, "width": 24}}, (16, 24)),
        ({"do_center_crop": True, "crop_size": {"height": 8, "width": 8}, "size": {"shortest_edge": 12}}, (8, 8)),
        ({"do_center_crop": False, "crop_size": {"height": 8, "width": 8}, "size": {"shortest_edge": 12}}, (32, 32)),
        ({"size": 16}, (16, 16)),
    ],
)
def test_images_are_of_the_size_that_the_processor_makes(processing, size):
    assert image_size(ViTConfig(**tiny_settings()), processing) == size


def test_flops_are_those_of_the_images_that_the_model_is_given():
    """As of Dinov2, whose configs give the size it was trained on."""
    config = tiny_config("dinov2", image_size=64)
    smaller = count_flops(weightless(Dinov2ForImageClassification, config), (32, 32))
    assert smaller.total == count_flops(weightless(Dinov2ForImageClassification, tiny_config("dinov2"))).total
    assert set(smaller.linear_tokens.values()) == {1, 17}
    assert smaller.image_size == (32, 32)
