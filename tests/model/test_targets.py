"""Which Linears are found, and which never."""

import pytest
import torch
from torch import nn

from hf_blockprune import BlockPruneConfig, ConfigError, ModelError
from hf_blockprune.model.targets import find_targets
from tests.conftest import tiny_model

LINEARS_OF_A_LAYER = 6  # q, k, v, attention output and the two of the MLP


def settings(**changes):
    return BlockPruneConfig(**{"block_shape": (16, 16), **changes})


@pytest.fixture(scope="module")
def vit():
    return tiny_model()


@pytest.fixture(scope="module")
def found(vit):
    return find_targets(vit, settings())


def test_all_linears_of_all_layers_are_found_and_no_other(family):
    model = tiny_model(family, num_hidden_layers=3)
    targets = find_targets(model, settings())
    assert len(targets) == 3 * LINEARS_OF_A_LAYER
    assert all(targets[name] is model.get_submodule(name) for name in targets)
    shapes = sorted((linear.out_features, linear.in_features) for linear in targets.values())
    assert shapes == sorted([(48, 48)] * 12 + [(96, 48)] * 3 + [(48, 96)] * 3)
    left_dense = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)} - set(targets)
    words = ("classifier", "pooler", "patch_embed")
    assert left_dense
    assert all(any(word in name for word in words) for name in left_dense)


def test_order_is_that_of_the_forward_pass(vit, found):
    called = []
    handles = [m.register_forward_hook(lambda *_, name=n: called.append(name)) for n, m in found.items()]
    with torch.no_grad():
        vit(pixel_values=torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    assert called == list(found)


def test_targets_select_and_ignore_takes_out(vit, found):
    first = next(iter(found))
    layer = first[: first.index(".0.") + 3]
    of_first_layer = [name for name in found if name.startswith(layer)]
    assert list(find_targets(vit, settings(targets=[f"{layer}*"]))) == of_first_layer
    assert list(find_targets(vit, settings(ignore=[f"{layer}*"]))) == [n for n in found if n not in of_first_layer]
    assert list(find_targets(vit, settings(targets=[f"{layer}*"], ignore=[first]))) == of_first_layer[1:]
    assert list(find_targets(vit, settings(targets=[first]))) == [first]


@pytest.mark.parametrize("key", ["targets", "ignore"])
@pytest.mark.parametrize("pattern", ["*.no_such_layer", "classifier", "*patch_embeddings*", "VIT*"])
def test_pattern_without_match_is_refused_with_an_example(vit, found, key, pattern):
    with pytest.raises(
        ConfigError, match=rf"^{key}: .* matches no Linear; names look like {next(iter(found))}"
    ) as error:
        find_targets(vit, settings(**{key: ["*.0.*", pattern] if key == "targets" else [pattern]}))
    assert repr(pattern) in str(error.value)


def test_ignoring_everything_is_refused(vit):
    with pytest.raises(ConfigError, match="leave no layer to prune; shorten ignore"):
        find_targets(vit, settings(targets=["*.0.*"], ignore=["*"]))


@pytest.mark.parametrize("block_shape", [(64, 16), (16, 64)])
def test_block_larger_than_a_matrix_is_refused(vit, found, block_shape):
    message = rf"^block_shape: {block_shape[0]}x{block_shape[1]} is larger than {next(iter(found))} \(48x48\).*ignore"
    with pytest.raises(ConfigError, match=message):
        find_targets(vit, settings(block_shape=block_shape))


def test_block_may_be_larger_than_matrices_that_stay_dense(vit, found):
    narrow = [name for name, linear in found.items() if linear.out_features < 64]
    left = find_targets(vit, settings(block_shape=(64, 16), ignore=narrow))
    assert set(left) == set(found) - set(narrow)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(8, 8)),
        nn.ModuleDict({"layers": nn.ModuleList([nn.Conv2d(3, 3, 1)]), "head": nn.Linear(8, 8)}),
    ],
)
def test_model_without_linears_in_repeated_layers_is_refused(model):
    with pytest.raises(ModelError, match="has no target Linears: none lies in a repeated layer"):
        find_targets(model, settings())
