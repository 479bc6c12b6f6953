"""Whoever replaces or watches parts of a block-sparse model gets what the dense model gives."""

import copy
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrize, spectral_norm

from hf_blockprune.hub.blockprune_fusion import is_fused
from hf_blockprune.hub.blockprune_together import fuse, unfuse
from tests.conftest import tiny_model
from tests.hub.test_fusion import answers, sparse_model

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pair():
    """A fused model and the dense model of the same values."""
    model = sparse_model()
    dense = copy.deepcopy(model)
    dense.dequantize()
    assert any(map(is_fused, model.modules()))
    return model, dense


def mlps_of(model):
    return [layer.mlp for layer in model.vit.layers]


def swap_by_type(model):
    for name, child in model.named_children():
        if "GELU" in type(child).__name__:
            setattr(model, name, nn.ReLU())
        else:
            swap_by_type(child)


def swap_by_attribute(model):
    for mlp in mlps_of(model):
        mlp.activation_fn = nn.SiLU()


def swap_by_name(model):
    for name, module in list(model.named_modules()):
        if "GELU" in type(module).__name__:
            model.set_submodule(name, nn.Tanh())


def swap_for_a_function(model):
    for mlp in mlps_of(model):
        del mlp.activation_fn
        mlp.activation_fn = F.relu


def swap_one_layer(model):
    mlps_of(model)[1].activation_fn = nn.ReLU()


def one_for_all(model):
    for mlp in mlps_of(model):
        mlp.activation_fn = mlps_of(model)[0].activation_fn
    mlps_of(model)[0].activation_fn = nn.ReLU()


def wrap(model):
    for mlp in mlps_of(model):
        mlp.activation_fn = nn.Sequential(mlp.activation_fn, nn.Hardtanh())


def patch_forward(model):
    for mlp in mlps_of(model):
        mlp.activation_fn.forward = F.relu


def patch_the_function_inside(model):
    for mlp in mlps_of(model):
        mlp.activation_fn.act = F.silu


def patch_the_mlp(model):
    def forward(self, x):
        return self.fc2(self.activation_fn(2 * self.fc1(x)))

    for mlp in mlps_of(model):
        mlp.forward = types.MethodType(forward, mlp)


def patch_fc1(model):
    for mlp in mlps_of(model):
        forward = mlp.fc1.forward
        mlp.fc1.forward = lambda x, forward=forward: forward(x) - 1


def another_fc1(model):
    for mlp in mlps_of(model):
        mlp.fc1 = nn.Linear(48, 96)
        nn.init.eye_(mlp.fc1.weight)
        nn.init.zeros_(mlp.fc1.bias)


class Beside(nn.Module):
    """What adapters do: something is added to a layer's outputs."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + x.amax(dim=-1, keepdim=True)


def wrap_fc1(model):
    for mlp in mlps_of(model):
        mlp.fc1 = Beside(mlp.fc1)


def no_fc2(model):
    for mlp in mlps_of(model):
        mlp.fc2 = nn.AdaptiveAvgPool1d(48)


def wrap_projections(model):
    for layer in model.vit.layers:
        layer.attention.k_proj = Beside(layer.attention.k_proj)


def another_query(model):
    torch.manual_seed(0)
    for layer in model.vit.layers:
        layer.attention.q_proj = nn.Linear(48, 48)


class Reversed(nn.Module):
    def forward(self, weight):
        return weight * -1


def parametrize_biases(model):
    for mlp in mlps_of(model):
        parametrize.register_parametrization(mlp.fc1, "bias", Reversed())


SWAPS = [
    swap_by_type,
    swap_by_attribute,
    swap_by_name,
    swap_for_a_function,
    swap_one_layer,
    one_for_all,
    wrap,
    patch_forward,
    patch_the_function_inside,
    patch_the_mlp,
    patch_fc1,
    another_fc1,
    wrap_fc1,
    no_fc2,
    wrap_projections,
    another_query,
    parametrize_biases,
]


@pytest.mark.parametrize("swap", SWAPS, ids=lambda swap: swap.__name__)
def test_what_is_replaced_counts(swap, pair, pixels):
    model, dense = pair
    before = answers(model, pixels)
    for each in pair:
        swap(each)
    found = answers(model, pixels)
    torch.testing.assert_close(found, answers(dense, pixels), **TOLERANCE)
    assert (found - before).abs().max() > 1e-2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_what_is_replaced_in_a_copy_counts_there_alone(duplicate, pair, pixels):
    model, dense = pair
    before = answers(model, pixels)
    other = duplicate(model)
    assert sum(map(is_fused, other.modules())) == 2
    swap_by_type(other), swap_by_type(dense)
    torch.testing.assert_close(answers(other, pixels), answers(dense, pixels), **TOLERANCE)
    assert torch.equal(answers(model, pixels), before)


def test_what_is_replaced_counts_in_training(pair, pixels):
    for each in pair:
        swap_by_type(each)
        each.train()
        each(pixel_values=pixels).logits.square().sum().backward()
    for name in ("bias", "weight"):
        first = [getattr(each.vit.layernorm, name).grad for each in pair]
        torch.testing.assert_close(*first, rtol=1e-3, atol=1e-3)


def test_the_kind_of_gelu_may_change(pixels):
    model = tiny_model()
    for mlp in mlps_of(model):
        mlp.activation_fn = nn.GELU()
    model = sparse_model(model=model)
    assert all(map(is_fused, mlps_of(model)))
    dense = copy.deepcopy(model)
    dense.dequantize()
    before = answers(model, pixels)
    for each in (model, dense):
        for mlp in mlps_of(each):
            mlp.activation_fn.approximate = "tanh"
    found = answers(model, pixels)
    torch.testing.assert_close(found, answers(dense, pixels), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before, rtol=1e-5, atol=1e-5)


class Noisy(nn.Module):
    """Exact GELU in evaluation, and something else in training."""

    def forward(self, x):
        return F.dropout(F.gelu(x), 0.5, self.training)


def test_a_class_that_may_do_other_things_at_other_times_is_not_fused():
    model = tiny_model()
    for mlp in mlps_of(model):
        mlp.activation_fn = Noisy()
    model = sparse_model(model=model)
    assert not any(map(is_fused, model.modules()))


def test_an_mlp_that_does_more_is_not_fused():
    class Scaled(type(tiny_model().vit.layers[0].mlp)):
        def forward(self, x):
            return self.fc2(self.activation_fn(self.fc1(x)) * 0.5)

    model = tiny_model()
    for mlp in mlps_of(model):
        mlp.__class__ = Scaled
    assert not any(map(is_fused, sparse_model(model=model).modules()))


def test_modules_keep_their_names_and_classes():
    model, plain = sparse_model(), sparse_model()
    unfuse(plain)
    for (name, module), (other_name, other) in zip(model.named_modules(), plain.named_modules(), strict=True):
        assert name == other_name
        assert isinstance(module, type(other))
        assert type(module).__name__ == type(other).__name__
    assert repr(model) == repr(plain)


def test_unfused_modules_are_of_the_class_that_they_were():
    model = sparse_model()
    unfuse(model)
    assert {type(mlp) for mlp in mlps_of(model)} == {type(mlp) for mlp in mlps_of(tiny_model())}
    fuse(model)
    assert all(map(is_fused, mlps_of(model)))


@torch.no_grad()
def test_parts_called_by_themselves_give_what_dense_ones_give(pair):
    x = torch.randn(2, 5, 48)
    for name in ("fc1", "activation_fn"):
        first, second = (getattr(mlps_of(each)[0], name)(x) for each in pair)
        torch.testing.assert_close(first, second, **TOLERANCE)


def by_hook(module, seen):
    return [module.register_forward_hook(lambda _m, args, out: seen.extend([args[0], out]))]


def by_hook_with_keywords(module, seen):
    def hook(_module, args, kwargs, out):
        seen.extend([args[0], out])

    return [module.register_forward_hook(hook, with_kwargs=True, always_call=True)]


def by_hook_before(module, seen):
    return [module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))]


def by_hook_on_all(module, seen):
    def hook(each, args, out):
        if each is module:
            seen.extend([args[0], out])

    return [every_module.register_module_forward_hook(hook)]


def by_hook_before_all(module, seen):
    return [
        every_module.register_module_forward_pre_hook(lambda m, args: seen.append(args[0]) if m is module else None)
    ]


WATCHERS = [by_hook, by_hook_with_keywords, by_hook_before, by_hook_on_all, by_hook_before_all]
PLACES = ["mlp.fc1", "mlp.activation_fn", "mlp.fc2", "mlp", "attention.q_proj", "attention.k_proj", "attention.v_proj"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("watch", WATCHERS, ids=lambda watch: watch.__name__)
def test_hooks_see_what_they_see_in_the_dense_model(watch, place, pair, pixels):
    model, dense = pair
    before = answers(model, pixels)
    seen = {}
    for each in pair:
        handles = watch(each.vit.layers[0].get_submodule(place), seen.setdefault(each is dense, []))
        answers(each, pixels)
        for handle in handles:
            handle.remove()
    assert len(seen[False]) > 0
    for first, second in zip(seen[False], seen[True], strict=True):
        torch.testing.assert_close(first, second, **TOLERANCE)
    assert torch.equal(answers(model, pixels), before)


@pytest.mark.parametrize("place", PLACES)
def test_hooks_change_what_they_change_in_the_dense_model(place, pair, pixels):
    model, dense = pair
    for each in pair:
        each.vit.layers[0].get_submodule(place).register_forward_hook(lambda _m, _args, out: out * 1.5)
        each.vit.layers[1].get_submodule(place).register_forward_pre_hook(lambda _m, args: (args[0] - 0.5,))
    torch.testing.assert_close(answers(model, pixels), answers(dense, pixels), **TOLERANCE)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pre", [False, True], ids=["after", "before"])
def test_hooks_see_the_gradients_of_the_dense_model(pre, place, pair, pixels):
    seen = []
    for each in pair:
        module = each.vit.layers[0].get_submodule(place)
        if pre:
            module.register_full_backward_pre_hook(lambda _m, grads: seen.append(grads[0]))
        else:
            module.register_full_backward_hook(lambda _m, _inputs, grads: seen.append(grads[0]))
        each(pixel_values=pixels).logits.square().sum().backward()
    torch.testing.assert_close(*seen, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_a_hook_may_change_an_input_in_place(pair, pixels):
    for each in pair:
        each.vit.layers[0].attention.k_proj.register_forward_pre_hook(lambda _m, args: (args[0].mul_(2),))
    model, dense = pair
    torch.testing.assert_close(model(pixel_values=pixels).logits, dense(pixel_values=pixels).logits, **TOLERANCE)


def test_a_hook_may_change_weights(pixels):
    """Old-style weight norms set a layer's weight just before it runs."""
    model = sparse_model()
    for layer in model.vit.layers:
        spectral_norm(layer.attention.v_proj).eval()
    found = answers(model, pixels)
    unfuse(model)
    torch.testing.assert_close(answers(model, pixels), found, **TOLERANCE)
    with torch.no_grad():
        for layer in model.vit.layers:
            layer.attention.v_proj.weight_orig.data[0] *= 3
    changed = answers(model, pixels)
    assert not torch.allclose(changed, found, **TOLERANCE)
    fuse(model)
    torch.testing.assert_close(answers(model, pixels), changed, **TOLERANCE)


def test_layers_are_fused_again_once_nobody_watches(pixels, applied):
    model = sparse_model()
    handle = mlps_of(model)[0].fc1.register_forward_hook(lambda *_: None)
    answers(model, pixels)
    assert applied.count("gelu") == 1
    applied.clear()
    handle.remove()
    answers(model, pixels)
    assert applied.count("gelu") == 2


def gelus(program):
    """(GELUs that a graph's products apply, GELUs by themselves)."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    fused = [n for n in calls if "block_sparse_linear" in str(n.target) and "gelu" in n.args]
    return len(fused), sum("gelu" in str(node.target) for node in calls)


@torch.no_grad()
def test_graphs_are_fused_where_nobody_watches(pixels):
    model = sparse_model()
    expected = answers(model, pixels)
    assert gelus(torch.export.export(model, (), {"pixel_values": pixels})) == (2, 0)
    seen = []
    mlps_of(model)[0].fc1.register_forward_hook(lambda _m, _args, out: seen.append(out) or out + 1)
    program = torch.export.export(model, (), {"pixel_values": pixels})
    assert gelus(program) == (1, 1)
    found = program.module()(pixel_values=pixels).logits
    torch.testing.assert_close(found, answers(model, pixels), **TOLERANCE)
    assert not torch.allclose(found, expected, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_models_heed_what_was_replaced_before_and_after(fullgraph, pair, pixels):
    torch._dynamo.reset()
    model, dense = pair
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    torch.testing.assert_close(compiled(pixel_values=pixels).logits, answers(dense, pixels), **TOLERANCE)
    for swap in (swap_one_layer, patch_the_function_inside, swap_by_attribute):
        swap(model), swap(dense)
        torch.testing.assert_close(compiled(pixel_values=pixels).logits, answers(dense, pixels), **TOLERANCE)


def test_replicas_use_their_own_layers(pair):
    """What `DataParallel` makes of a module: copies with the same attributes and other children."""
    model, dense = pair
    x = torch.randn(2, 5, 48)
    mlp, other = mlps_of(model)[0], mlps_of(dense)[0]
    replica = mlp._replicate_for_data_parallel()
    for name, child in mlp.named_children():
        setattr(replica, name, copy.deepcopy(child))
    replica.fc1.bias.data.add_(1)
    other.fc1.bias.data.add_(1)
    with torch.no_grad():
        torch.testing.assert_close(replica(x), other(x), **TOLERANCE)
        query = model.vit.layers[0].attention.q_proj
        replica = query._replicate_for_data_parallel()
        for name, value in (*query.named_parameters(), *query.named_buffers()):
            setattr(replica, name, value.detach().clone())
        replica.bias += 1
        torch.testing.assert_close(replica(x), query.to_dense()(x) + 1, **TOLERANCE)


@torch.no_grad()
def test_weights_that_change_between_query_and_key_count():
    attention = sparse_model().vit.layers[0].attention
    x = torch.randn(2, 5, attention.q_proj.in_features)
    attention.q_proj(x)
    attention.k_proj.weight.mul_(2)
    attention.v_proj.bias = nn.Parameter(attention.v_proj.bias + 1)
    for layer in (attention.k_proj, attention.v_proj):
        torch.testing.assert_close(layer(x), layer.to_dense()(x), **TOLERANCE)
