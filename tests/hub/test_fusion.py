"""Layers that work together: same predictions, undone without a trace, nothing lost or kept too long."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from hf_blockprune.hub import blockprune_linear as linear
from hf_blockprune.hub.blockprune_fusion import fuse_activations, is_fused, share_inputs
from hf_blockprune.hub.blockprune_linear import BlockSparseLinear
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers, sparsify
from hf_blockprune.hub.blockprune_together import fuse, unfuse
from tests.conftest import tiny_model


def sparse_model(family="vit", model=None, **changes):
    model = tiny_model(family, **changes) if model is None else model
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            grid = -(-module.out_features // 16), -(-module.in_features // 16)
            masks[name] = torch.rand(grid, generator=generator) < 0.6
    return sparsify(model, masks, (16, 16))


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def answers(model, pixels):
    return model(pixel_values=pixels).logits


def count_fused(model):
    return sum(map(is_fused, model.modules()))


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_fused_and_unfused_models_agree(family, activation, pixels):
    model = sparse_model(family, hidden_act=activation)
    assert count_fused(model) == 2  # one a layer: sparsify fuses
    fused = answers(model, pixels)
    unfuse(model)
    assert count_fused(model) == 0
    torch.testing.assert_close(answers(model, pixels), fused, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), [("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")])
def test_the_two_kinds_of_gelu_are_told_apart(kind, name, pixels, applied):
    answers(sparse_model(hidden_act=kind), pixels)
    assert set(applied) == {"none", name}
    assert applied.count(name) == 2  # one a layer


@pytest.mark.parametrize("activation", ["relu", "quick_gelu", "silu", "gelu_10"])  # gelu_10 clips what is above 10
def test_other_activations_stay_where_they_are(activation, pixels):
    model = sparse_model(hidden_act=activation)
    assert count_fused(model) == 0
    assert fuse_activations(model) == 0


def test_a_dense_fc1_keeps_its_activation():
    model = tiny_model()
    assert fuse_activations(model) == 0


def test_fusing_twice_is_fusing_once(pixels):
    model = sparse_model()
    before = answers(model, pixels)
    assert fuse_activations(model) == 0
    fuse(model)
    assert torch.equal(answers(model, pixels), before)


def test_whoever_replaces_a_fused_layer_by_a_dense_one_keeps_the_activation(pixels):
    model = sparse_model()
    expected = answers(model, pixels)
    for name, module in list(block_sparse_layers(model)):
        model.set_submodule(name, module.to_dense())
    torch.testing.assert_close(answers(model, pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_looks_at_its_own_layers(duplicate, pixels):
    model = sparse_model()
    expected = answers(model, pixels)
    other = duplicate(model)
    assert torch.equal(answers(other, pixels), expected)
    for name, module in list(block_sparse_layers(other)):
        other.set_submodule(name, module.to_dense())
    assert torch.equal(answers(model, pixels), expected)
    torch.testing.assert_close(answers(other, pixels), expected, rtol=1e-4, atol=1e-4)


def test_names_of_parameters_do_not_change():
    model = sparse_model()
    names = set(model.state_dict())
    unfuse(model)
    assert set(model.state_dict()) == names


def test_a_cut_layer_stays_fused():
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    layer = BlockSparseLinear.from_dense(nn.Linear(32, 48), mask, (16, 16))
    layer.activation = "gelu"
    x = torch.randn(5, 32)
    small = layer.cut(rows=mask.any(dim=1))
    with torch.no_grad():
        torch.testing.assert_close(small(x), layer(x)[:, [*range(16), *range(32, 48)]])


def test_gradients_flow_through_a_fused_mlp(pixels):
    model, plain = sparse_model(), sparse_model()
    unfuse(plain)
    for m in (model, plain):
        m(pixel_values=pixels).logits.square().sum().backward()
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4)


def attention_of(model):
    return model.vit.layers[0].attention


@pytest.fixture
def calls(monkeypatch, by_parts):
    """How many layers each call of the op computed together."""
    seen = []
    together = linear.block_sparse_linears
    monkeypatch.setattr(
        linear, "block_sparse_linears", lambda x, layers: seen.append(len(layers)) or together(x, layers)
    )
    return seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_query_key_and_value_are_one_call(mode, pixels, calls):
    model, alone = sparse_model(), sparse_model()
    unfuse(alone)
    with mode():
        torch.testing.assert_close(
            model(pixel_values=pixels).logits, alone(pixel_values=pixels).logits, rtol=1e-5, atol=1e-5
        )
    assert calls == [3, 3]  # one a layer, none of the unfused model


def test_nothing_is_kept_once_all_three_are_taken(pixels):
    model = sparse_model()
    answers(model, pixels)
    assert attention_of(model).q_proj.shared_input._last is None


@torch.no_grad()
def test_layers_whose_weights_are_elsewhere_are_not_computed_with_others(pixels, calls):
    """Offloading brings a layer's weights in while that layer runs, and takes them away again."""
    model = sparse_model()
    expected = answers(model, pixels)
    calls.clear()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert attention_of(model).k_proj.weight.is_meta
    torch.testing.assert_close(answers(model, pixels), expected, rtol=1e-5, atol=1e-5)
    assert calls == []


@torch.no_grad()
def test_each_output_belongs_to_the_input_it_was_computed_from():
    attention = attention_of(sparse_model())
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    expected = [layer.to_dense() for layer in layers]
    x, y = torch.randn(2, 5, 48), torch.randn(2, 5, 48)
    steps = [(0, x), (1, y), (0, x), (2, x), (1, x), (0, y), (0, y), (2, y), (2, y)]
    for place, value in steps:
        torch.testing.assert_close(layers[place](value), expected[place](value))
    layers[0](x)
    x.add_(1)  # the same tensor, another value
    torch.testing.assert_close(layers[1](x), expected[1](x))


def test_gradients_reach_all_three(calls):
    attention = attention_of(sparse_model())
    x = torch.randn(2, 5, 48)
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        layer(x).sum().backward()
        assert layer.weight.grad is not None
    assert calls == []


def test_threads_that_share_a_model_get_their_own_answers(pixels):
    model = sparse_model()
    batches = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    expected = [answers(model, batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, wanted in zip(pool.map(lambda b: answers(model, b), batches), expected, strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("changed", ["dense", "other blocks"])
def test_layers_that_do_not_fit_together_stay_alone(changed):
    model = tiny_model()
    attention = attention_of(model)
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = getattr(attention, name)
        setattr(attention, name, BlockSparseLinear.from_dense(linear, torch.ones(3, 3).bool(), (16, 16)))
    assert share_inputs(model) == 1
    other = tiny_model().vit.layers[0].attention.k_proj
    if changed == "other blocks":
        other = BlockSparseLinear.from_dense(other, torch.ones(2, 2).bool(), (32, 32))
    attention.k_proj = other
    assert share_inputs(model) == 0


def test_compiled_and_exported_models_agree(pixels):
    torch._dynamo.reset()
    model = sparse_model()
    expected = answers(model, pixels)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(pixel_values=pixels).logits, expected, rtol=1e-5, atol=1e-5)
        program = torch.export.export(model, (), {"pixel_values": pixels})
        torch.testing.assert_close(program.module()(pixel_values=pixels).logits, expected, rtol=1e-5, atol=1e-5)
