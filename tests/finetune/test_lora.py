"""LoRA on block-sparse models with peft: as on the dense model of the same weights, saved and loaded, never merged."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification

from hf_blockprune import sparsify
from hf_blockprune.errors import ModelError
from hf_blockprune.finetune.lora import LoraBlockSparseLinear
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from tests.conftest import ROOT, tiny_model

# peft asks transformers under names that it is about to give up.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


def pruned_model():
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(module.out_features // 16, module.in_features // 16, generator=generator) < 0.6
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    return sparsify(model, masks, (16, 16)).eval()


@torch.no_grad()
def answers(model):
    return model(pixel_values=PIXELS).logits


def adapted(model, **settings):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, **{"init_lora_weights": False, **settings}))


def adapters(model):
    return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


TARGETS = [["q_proj", "v_proj"], "all-linear", r".*\.(fc1|fc2)", ["fc1"], ["o_proj", "classifier"]]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_answers_and_gradients_are_those_of_the_dense_model(targets):
    model = pruned_model()
    dense = copy.deepcopy(model).dequantize()
    both = [adapted(each, target_modules=targets) for each in (model, dense)]
    assert adapters(both[0]) == adapters(both[1])
    assert adapters(both[0])
    torch.testing.assert_close(answers(both[0]), answers(both[1]), rtol=1e-4, atol=1e-4)
    for each in both:
        each(pixel_values=PIXELS, labels=LABELS).loss.backward()
    gradients = [{n: p.grad for n, p in each.named_parameters() if p.requires_grad} for each in both]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_all_linear_means_every_layer_once_also_for_a_second_adapter():
    model = adapted(pruned_model(), target_modules="all-linear")
    first = adapters(model)
    assert len(first) == 12 + 1  # six a layer, and the classifier
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    assert adapters(model) == first


def test_training_changes_adapters_alone_and_the_model_comes_back():
    model = pruned_model()
    before, expected = copy.deepcopy(model.state_dict()), answers(model)
    peft_model = adapted(
        model, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"], init_lora_weights=True
    )
    torch.testing.assert_close(answers(peft_model), expected, rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = peft_model(pixel_values=PIXELS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with peft_model.disable_adapter():
        torch.testing.assert_close(answers(peft_model), expected, rtol=1e-5, atol=1e-5)
    back = peft_model.unload()
    assert len(list(block_sparse_layers(back))) == 12
    changed = {name for name, value in back.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}  # peft leaves trained modules_to_save in place
    back.load_state_dict(before)
    torch.testing.assert_close(answers(back), expected, rtol=1e-5, atol=1e-5)


def test_adapters_load_on_a_freshly_loaded_model(tmp_path):
    pruned_model().save_pretrained(tmp_path / "model")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    peft_model = adapted(model, target_modules="all-linear", modules_to_save=["classifier"])
    peft_model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert sum(isinstance(module, LoraBlockSparseLinear) for module in loaded.modules()) == 12
    torch.testing.assert_close(answers(loaded), answers(peft_model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_before_anything_is_merged(how):
    peft_model = adapted(pruned_model(), target_modules=["dense", "projection", "classifier", "fc2"])
    before = copy.deepcopy(peft_model.state_dict())
    with pytest.raises(ModelError, match=r"bring removed blocks back.*dequantize"):
        getattr(peft_model, how)()
    layer = next(module for module in peft_model.modules() if isinstance(module, LoraBlockSparseLinear))
    with pytest.raises(ModelError, match="bring removed blocks back"):
        layer.merge()
    for name, value in peft_model.state_dict().items():
        assert torch.equal(value, before[name])


def test_adapters_merge_into_layers_that_were_made_dense():
    peft_model = adapted(pruned_model(), target_modules=["q_proj", "fc1", "fc2"])
    expected = answers(peft_model)
    peft_model.get_base_model().dequantize()
    torch.testing.assert_close(answers(peft_model), expected, rtol=1e-4, atol=1e-4)
    merged = peft_model.merge_and_unload()
    assert not list(block_sparse_layers(merged))
    torch.testing.assert_close(answers(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
    ],
)
def test_kinds_that_need_the_whole_weight_are_refused(settings, name):
    with pytest.raises(ModelError, match=f"{name}.*whole weight.*dequantize"):
        adapted(pruned_model(), target_modules=["q_proj"], **settings)
    dense = pruned_model().dequantize()
    assert adapters(adapted(dense, target_modules=["q_proj"], **settings))


def test_other_methods_do_not_pass_over_block_sparse_layers_in_silence():
    with pytest.raises((ValueError, TypeError), match=r"BlockSparseLinear.*supported"):
        get_peft_model(pruned_model(), VeraConfig(r=4, target_modules="all-linear"))


FIRST = {
    "peft": "import peft",
    "package": """
from transformers.utils import import_utils
import transformers.utils
# Some files of transformers import peft where it is installed.
transformers.utils.is_peft_available = import_utils.is_peft_available = lambda: False
import hf_blockprune
assert "peft" not in sys.modules
""",
}


@pytest.mark.parametrize("first", FIRST)
def test_either_may_be_imported_first(first):
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
{FIRST[first]}
import hf_blockprune, peft
import torch
from torch import nn
mask = torch.eye(2, dtype=torch.bool)
model = nn.ModuleDict({{"a": hf_blockprune.BlockSparseLinear.from_dense(nn.Linear(32, 32), mask, (16, 16))}})
adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
print(type(adapted.base_model.model["a"]).__name__)
"""
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "LoraBlockSparseLinear"
