"""Models inside others, and models that are refused before any work."""

import threading
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForImageClassification, ViTForImageClassification

from hf_blockprune import BlockPruneConfig, BlockPruner, ModelError
from hf_blockprune.cost.flops import count_flops
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from hf_blockprune.hub.blockprune_skeleton import skeleton
from hf_blockprune.model.copying import copied
from tests.conftest import tiny_model

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
CONFIG = BlockPruneConfig(
    block_shape=(8, 8), budget={"metric": "flops", "ratio": 0.75}, calibration={"samples": 24, "batch_size": 8}
)
MAGNITUDE = BlockPruneConfig(
    method="magnitude", refit=False, block_shape=(8, 8), budget={"metric": "flops", "ratio": 0.75}
)


class OwnConstructor(ViTForImageClassification):
    """Takes more than a config."""

    def __init__(self, config, answer):
        super().__init__(config)
        self.answer = answer


class Around(nn.Module):
    """A plain module that holds a transformers model."""

    def __init__(self, model):
        super().__init__()
        self.backbone = model

    def forward(self, pixel_values):
        return self.backbone(pixel_values=pixel_values)


def compiled_inside(model):
    model.compile(backend="eager")
    return model


def compiled_layers(model):
    layers = model.vit.layers
    for index in range(len(layers)):
        layers[index] = torch.compile(layers[index], backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": compiled_inside,
    "compiled layer by layer": compiled_layers,
    "DataParallel": nn.DataParallel,
    "DataParallel of compiled": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@torch.no_grad()
def logits_of(model):
    return model(pixel_values=PIXELS).logits


@pytest.fixture(scope="module")
def plain(images, processor):
    """What comes of the model with nothing around or on it."""
    pruner = BlockPruner(tiny_model(), processor, CONFIG)
    pruner.prune(images)
    return pruner


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_model_inside_is_pruned_and_saved(wrapper, plain, images, processor, tmp_path):
    wrapped = WRAPPERS[wrapper](tiny_model())
    pruner = BlockPruner(wrapped, processor, CONFIG)
    assert type(pruner.model) is ViTForImageClassification
    pruner.prune(images)
    torch.testing.assert_close(logits_of(pruner.model), logits_of(plain.model), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(wrapped), logits_of(plain.model), atol=1e-5, rtol=1e-5)
    pruner.save_pretrained(tmp_path / "pruned")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned")
    torch.testing.assert_close(logits_of(loaded), logits_of(plain.model), atol=1e-5, rtol=1e-5)


def test_a_constructor_may_take_more_than_a_config(images, processor, tmp_path):
    model = OwnConstructor(tiny_model().config, 42).eval()
    pruner = BlockPruner(model, processor, CONFIG)
    pruner.prune(images)
    assert pruner.report()["flops_ratio"] <= 0.75
    pruner.save_pretrained(tmp_path / "own")
    loaded = OwnConstructor.from_pretrained(tmp_path / "own", answer=42)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_what_it_is(dtype, images, processor, tmp_path):
    pruner = BlockPruner(tiny_model().to(dtype), processor, CONFIG)
    pruner.prune(images)
    pruner.save_pretrained(tmp_path / "half")
    loaded = BlockPruner.from_pretrained(tmp_path / "half").model
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    x = PIXELS.to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values=x).logits, pruner.model(pixel_values=x).logits)


def test_a_skeleton_has_the_dense_form_and_no_weights(images, processor):
    model = tiny_model()
    dense = count_flops(model)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    BlockPruner(model, processor, MAGNITUDE).prune()
    made = skeleton(model)
    assert all(tensor.is_meta for tensor in (*made.parameters(), *made.buffers()))
    assert not next(block_sparse_layers(made), None)
    assert next(block_sparse_layers(model), None)
    assert count_flops(model) == dense
    assert not calls


class Listener:
    """A hook that has no copy."""

    def __init__(self):
        self.lock, self.devices = threading.Lock(), set()

    def __call__(self, module, inputs, *_):
        with self.lock:
            self.devices.add(inputs[0].device.type)


def listened_to(model):
    model.vit.layers[0].register_forward_hook(Listener())
    return model


def reads_inputs(model):
    means = []
    model.vit.layers[0].register_forward_pre_hook(lambda _, inputs: means.append(float(inputs[0].detach().mean())))
    return model


def with_a_lock(model):
    model.lock = threading.Lock()
    return model


def replaced_forward(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model


def another_activation(model):
    model.vit.layers[0].mlp.activation_fn.forward = nn.functional.gelu
    return model


ODD = {f.__name__: f for f in (listened_to, reads_inputs, with_a_lock, another_activation)}


@pytest.mark.parametrize("kind", ODD)
def test_what_others_put_on_a_model_does_not_matter(kind, plain, images, processor):
    pruner = BlockPruner(ODD[kind](tiny_model()), processor, CONFIG)
    pruner.prune(images)
    torch.testing.assert_close(logits_of(pruner.model), logits_of(plain.model), atol=1e-5, rtol=1e-5)
    pruner.recover(images, teacher=BlockPruner(ODD[kind](tiny_model()), processor))
    assert pruner.benchmark(seconds=0.05)["rows"][0]["latency_ms"] > 0


def test_a_replaced_forward_that_a_copy_would_not_follow_is_named(images, processor):
    model = replaced_forward(tiny_model())
    assert count_flops(model) == count_flops(tiny_model())
    pruner = BlockPruner(model, processor, MAGNITUDE)
    pruner.prune()
    with pytest.raises(ModelError, match="ViTForImageClassification: its forward was replaced by a plain function"):
        pruner.benchmark(seconds=0.05)
    inside = tiny_model()
    replaced_forward(inside.vit.layers[1].mlp)
    with pytest.raises(ModelError, match="mlp: its forward was replaced"):
        BlockPruner(inside, processor, CONFIG).prune(images)


def test_counting_calls_no_hook():
    listener = Listener()
    model = tiny_model()
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        getattr(model.vit.layers[0], register)(listener)
    count_flops(model)
    assert not listener.devices
    logits_of(model)
    assert listener.devices == {"cpu"}


def test_a_copy_has_weights_and_hooks_of_its_own():
    model = listened_to(with_a_lock(tiny_model()))
    copy = copied(model)
    assert copy.lock is model.lock
    shared = {id(p) for p in model.parameters()} & {id(p) for p in copy.parameters()}
    assert not shared
    with torch.no_grad():
        copy.classifier.weight.zero_()
    assert model.classifier.weight.abs().sum() > 0
    copy.vit.layers[0].register_forward_hook(lambda *_: None)
    assert len(model.vit.layers[0]._forward_hooks) == 1
    assert len(copy.vit.layers[0]._forward_hooks) == 2


def without_values():
    with torch.device("meta"):
        return tiny_model()


def one_layer_twice():
    model = tiny_model()
    model.vit.layers[1] = model.vit.layers[0]
    return model


def one_weight_twice():
    model = tiny_model()
    model.vit.layers[1].mlp.fc1.weight = model.vit.layers[0].mlp.fc1.weight
    return model


def of_peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        return get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))


REFUSED = {
    "a name": (lambda: "vit", "expected a transformers model, got str"),
    "a module around one": (lambda: Around(tiny_model()), r"pass its part backbone \(ViTForImageClassification\)"),
    "a module of one's own": (lambda: nn.Linear(2, 2), "Linear: expected a transformers model"),
    "a model of peft": (
        of_peft,
        r"call merge_and_unload\(\) first",
    ),
    "adapters inside": (
        lambda: inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_model()),
        r"merge them first",
    ),
    "no values": (without_values, "has parameters on the meta device"),
    "a layer used twice": (one_layer_twice, "share one weight"),
    "a weight used twice": (one_weight_twice, "share one weight"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_before_any_work(kind, processor):
    make, message = REFUSED[kind]
    with pytest.raises(ModelError, match=message):
        BlockPruner(make(), processor, MAGNITUDE).prune()


def test_linears_that_see_nothing_of_an_image_stay(processor, caplog):
    """As those of a second tower that only text reaches."""
    model = tiny_model()
    model.text = nn.ModuleList([nn.Linear(48, 48)])
    pruner = BlockPruner(model, processor, MAGNITUDE)
    pruner.prune()
    assert type(model.text[0]) is nn.Linear
    assert not any(layer["name"].startswith("text") for layer in pruner.report()["layers"])


def test_layers_in_a_sequential_are_a_list_too(plain, images, processor):
    """As timm's models hold theirs."""
    pruner = BlockPruner(_with_sequential(tiny_model()), processor, CONFIG)
    pruner.prune(images)
    assert len(pruner.report()["layers"]) == len(plain.report()["layers"]) == 12
    pruner.recover(images, teacher=BlockPruner(_with_sequential(tiny_model()), processor))


def _with_sequential(model):
    model.vit.layers = nn.Sequential(*model.vit.layers)
    return model
