"""Attentions that lack heads, or features of heads: loaded, saved, run and turned whole again."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)
from transformers.models.bert.modeling_bert import BertSelfAttention

from hf_blockprune import BlockSparseFormatError, sparsify
from hf_blockprune.hub.blockprune_config import FORMAT_VERSION
from hf_blockprune.hub.blockprune_flops import count_flops
from hf_blockprune.hub.blockprune_heads import (
    CutHeads,
    check_heads,
    cut_heads,
    dense_heads_of,
    restore_heads,
    set_heads,
)
from hf_blockprune.hub.blockprune_layers import block_sparse_layers
from hf_blockprune.hub.blockprune_skeleton import skeleton
from hf_blockprune.score.blocks import grid_shape
from tests.conftest import NUM_LABELS, tiny_model, tiny_settings
from tests.cutting import KEPT, attentions, cut_model, shrink
from tests.hub.saved_models import PIXELS, answer, answers_of, assert_same, config_of

VISION = {
    "clip": (CLIPVisionModel, CLIPVisionConfig),
    "siglip": (SiglipVisionModel, SiglipVisionConfig),
    "vit_msn": (ViTMSNForImageClassification, ViTMSNConfig),
}
ALL = (*KEPT, *VISION)
WIDTH = 48


def dense_model(family):
    if family in KEPT:
        return tiny_model(family)
    model_class, config_class = VISION[family]
    torch.manual_seed(0)
    model = model_class(config_class(**tiny_settings())).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def kept_of(family):
    return KEPT.get(family, KEPT["vit"])


@torch.no_grad()
def by_hand(family):
    """The dense model with zeros where features of heads are to be cut."""
    model = dense_model(family)
    for cut in attentions(model, kept_of(family)):
        gone = torch.ones(cut.dense_features, dtype=torch.bool)
        gone[cut.places()] = False
        for name in cut.names():
            linear = model.get_submodule(name)
            if name == cut.out:
                linear.weight[:, gone] = 0
            else:
                linear.weight[gone] = 0
                if linear.bias is not None:
                    linear.bias[gone] = 0
    return model


@pytest.mark.parametrize("family", ALL)
def test_a_cut_attention_is_the_dense_one_with_zeros(family):
    model = cut_model(dense_model(family), kept_of(family))
    assert [(cut.heads, cut.head_size) for cut in cut_heads(model)] == list(kept_of(family))
    assert_same(answer(model), answer(by_hand(family)))
    dense = model.dequantize()
    assert not cut_heads(dense)
    assert type(dense) is type(dense_model(family))
    expected = by_hand(family)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(dense.state_dict()[name], tensor), name
    for cut in attentions(expected, kept_of(family)):
        have, want = vars(dense.get_submodule(cut.attention)), vars(expected.get_submodule(cut.attention))
        plain = {key: value for key, value in want.items() if isinstance(value, (int, float))}
        assert {key: have[key] for key in plain} == plain


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_saving_and_loading(family, share, tmp_path):
    model = cut_model(dense_model(family), kept_of(family), share=share, others=True)
    expected = answer(model)
    model.save_pretrained(tmp_path)
    stored = config_of(tmp_path)["quantization_config"]
    assert stored["format_version"] == FORMAT_VERSION
    assert [(entry["heads"], entry["head_size"]) for entry in stored["heads"]] == list(kept_of(family))
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert cut_heads(loaded) == cut_heads(model)
    assert_same(answer(loaded), expected)
    assert loaded.config.quantization_config == model.config.quantization_config
    assert_same(answer(loaded.dequantize()), expected)


def test_the_three_ways_to_load(tmp_path):
    model = cut_model(dense_model("vit"), KEPT["vit"], share=0.7)
    model.save_pretrained(tmp_path / "saved")
    folders = {"vit": ("AutoModelForImageClassification", str(tmp_path / "saved"))}
    for package, options in ((True, {}), (False, {"trust_remote_code": True})):
        found = answers_of(folders, tmp_path, package=package, **options)
        assert found["vit"][0] == 8
        assert_same(found["vit"][1], answer(model))


def test_a_part_of_a_larger_model_is_cut_with_it_and_by_itself(tmp_path):
    vision = {key: value for key, value in tiny_settings().items() if key != "id2label"}
    text = {**vision, "num_hidden_layers": 1, "vocab_size": 50, "max_position_embeddings": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    layers = [name for name, _ in model.vision_model.named_modules() if name.endswith("self_attn")]
    found, sizes = [], {}
    for name, kept in zip(layers, KEPT["vit"], strict=True):
        names = [f"vision_model.{name}.{part}_proj" for part in ("q", "k", "v", "out")]
        found.append(CutHeads(*names, *kept, 3, 16))
        sizes |= shrink(model, found[-1])
    shapes = {name: model.get_submodule(name).weight.shape for name in sizes}
    masks = {name: torch.ones(grid_shape(tuple(shape), (8, 8)), dtype=torch.bool) for name, shape in shapes.items()}
    sparsify(model, masks, (8, 8), cut=sizes, heads=found)
    model.save_pretrained(tmp_path / "whole")
    assert cut_heads(CLIPModel.from_pretrained(tmp_path / "whole")) == found
    part = CLIPVisionModel.from_pretrained(tmp_path / "whole")
    part.save_pretrained(tmp_path / "part")
    for loaded in (part, CLIPVisionModel.from_pretrained(tmp_path / "part")):
        assert [(cut.heads, cut.head_size) for cut in cut_heads(loaded)] == list(KEPT["vit"])
        assert_same(answer(loaded), answer(model.vision_model))


def test_copies_and_pickles_stay_cut(tmp_path):
    model = cut_model(dense_model("vit"), KEPT["vit"])
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    for number, other in enumerate(copies):
        assert cut_heads(other) == cut_heads(model)
        other.save_pretrained(tmp_path / str(number))
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / str(number))
        assert_same(answer(loaded), answer(model))
    copies[0].dequantize()
    assert cut_heads(model)
    assert_same(answer(copies[0]), answer(model))


def test_names_follow_the_model_that_holds_the_attention():
    model = cut_model(dense_model("vit"), KEPT["vit"])
    whole, part = cut_heads(model)[0], cut_heads(model.vit)[0]
    assert part == replace(whole, **{key: getattr(whole, key)[4:] for key in ("query", "key", "value", "out")})
    assert cut_heads(model.get_submodule(whole.attention))[0].names() == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert [cut.query for cut in cut_heads(torch.nn.ModuleList([model]))] == [
        f"0.{cut.query}" for cut in cut_heads(model)
    ]


def test_shards_and_states(tmp_path):
    model = cut_model(dense_model("vit"), KEPT["vit"], share=0.7)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_same(answer(loaded), answer(model))
    for _, layer in block_sparse_layers(loaded):
        torch.nn.init.zeros_(layer.weight)
    loaded.load_state_dict(model.state_dict())
    assert_same(answer(loaded), answer(model))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # 5.0 has no other
def test_training_changes_what_is_left(tmp_path):
    model = cut_model(dense_model("vit"), KEPT["vit"], share=0.7).train()
    model.gradient_checkpointing_enable()
    before = {name: layer.weight.detach().clone() for name, layer in block_sparse_layers(model)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(pixel_values=PIXELS, labels=torch.arange(3)).loss.backward()
    optimizer.step()
    assert all(not torch.equal(layer.weight, before[name]) for name, layer in block_sparse_layers(model))
    model.eval().save_pretrained(tmp_path)
    assert_same(answer(AutoModelForImageClassification.from_pretrained(tmp_path)), answer(model))


@pytest.mark.parametrize(("storage", "share"), [("packed", 0.7), ("unpacked", 0.7), ("unpacked", 1.0)])
def test_compiled_and_exported(storage, share, monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_STORAGE", storage)
    model = cut_model(dense_model("vit"), KEPT["vit"], share=share)
    expected = answer(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(compiled(pixel_values=PIXELS).logits, expected)
        program = torch.export.export(model, (PIXELS,)).module()
        assert_same(program(PIXELS).logits, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_implementations_and_half_precision(implementation):
    model = cut_model(dense_model("vit"), KEPT["vit"], share=0.7)
    expected = answer(model)
    model.set_attn_implementation(implementation)
    assert_same(answer(model), expected)
    with torch.no_grad():
        half = model.bfloat16()(pixel_values=PIXELS.bfloat16()).logits
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)


def test_a_model_that_was_only_shrunk_runs_torchs_own_products(monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKPRUNE_STORAGE", "auto")
    model = cut_model(dense_model("vit"), KEPT["vit"], others=True)
    model.save_pretrained(tmp_path)
    for made in (model, AutoModelForImageClassification.from_pretrained(tmp_path)):
        assert all(layer.is_unpacked and layer.is_whole for _, layer in block_sparse_layers(made))
    monkeypatch.setenv("BLOCKPRUNE_STORAGE", "packed")
    packed = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert not any(layer.is_unpacked for _, layer in block_sparse_layers(packed))
    assert_same(answer(packed), answer(model))


@pytest.mark.parametrize("family", KEPT)
def test_flops_are_those_of_the_model_that_runs(family, monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_STORAGE", "unpacked")
    dense = count_flops(dense_model(family))
    model = cut_model(dense_model(family), kept_of(family))
    assert count_flops(model) == dense
    model.set_attn_implementation("eager")  # torch does not count fused attention on CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=PIXELS[:1])
    gone = sum(
        2 * dense.linear_tokens[name] * (layer.dense_shape[0] * layer.dense_shape[1] - layer.weight.numel())
        for name, layer in block_sparse_layers(model)
    )
    assert counter.get_total_flops() == pytest.approx(dense.total - gone - dense.without_heads(cut_heads(model)))


def test_a_skeleton_is_whole():
    made = skeleton(cut_model(dense_model("vit"), KEPT["vit"]))
    assert not cut_heads(made)
    assert {dense_heads_of(made, cut.query) for cut in attentions(dense_model("vit"), KEPT["vit"])} == {(3, 16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads from 1 to 3, got 0"),
        ({"heads": True}, "heads from 1 to 3, got True"),
        ({"heads": 4}, "heads from 1 to 3, got 4"),
        ({"head_size": 17}, "head_size from 1 to 16, got 17"),
        ({"heads": 2**70}, "heads from 1 to 3, got"),
        ({"heads": 3, "head_size": 16}, "nothing is cut from its 3 heads of 16"),
        ({"dense_heads": 6, "dense_head_size": 8}, "said of an architecture of 3 of 16"),
        ({"key": "vit.layers.1.attention.k_proj"}, "no query, key, value and out of one attention"),
        ({"key": "vit.layers.0.attention.q_proj"}, "no query, key, value and out of one attention"),
        ({"out": "vit.layers.1.attention.o_proj"}, "no query, key, value and out of one attention"),
        ({"out": "vit.layers.0.attention.other"}, "has no such module"),
        ({"head_size": 9}, "10 features|20 features"),
    ],
)
def test_what_cannot_be_left_of_an_attention_is_refused(change, message):
    model = dense_model("vit")
    cut = attentions(model, KEPT["vit"])[0]
    shrink(model, cut)
    before = copy.deepcopy(vars(model.get_submodule(cut.attention)))
    with pytest.raises(BlockSparseFormatError, match=message):
        set_heads(model, replace(cut, **change))
    assert vars(model.get_submodule(cut.attention)).keys() == before.keys()
    assert not cut_heads(model)
    set_heads(model, cut)
    assert answer(model).shape == (3, NUM_LABELS)


@pytest.mark.parametrize("family", ["beit", "swin"])
def test_heads_with_a_position_bias_stay(family):
    model = dense_model(family)
    cut = attentions(model, KEPT[family])[0]
    with pytest.raises(BlockSparseFormatError, match=r"must keep 3 heads, as each has a place in .*position_bias"):
        check_heads(model, replace(cut, heads=2))


def test_heads_without_a_position_bias_may_leave():
    model = tiny_model("beit", use_relative_position_bias=False)
    expected = answer(model)
    assert answer(cut_model(model, ((2, 16), (3, 9)))).shape == expected.shape


def test_a_shared_position_bias_counts():
    model = tiny_model("beit", use_relative_position_bias=False, use_shared_relative_position_bias=True)
    with pytest.raises(BlockSparseFormatError, match="shared_position_bias"):
        check_heads(model, attentions(model, ((2, 16), (2, 16)))[0])


def test_attentions_that_cannot_be_cut_are_named():
    model = Data2VecVisionForImageClassification(Data2VecVisionConfig(**tiny_settings()))
    name = next(name for name, _ in model.named_modules() if name.endswith(".query"))
    with pytest.raises(BlockSparseFormatError, match=rf"{name}: Data2VecVision.* has no scaling or scale"):
        dense_heads_of(model, name)
    with pytest.raises(BlockSparseFormatError, match=r"ViTMLP has no num_attention_heads or num_heads"):
        dense_heads_of(dense_model("vit"), "vit.layers.0.mlp.fc1")


def test_features_that_are_turned_in_pairs_stay():
    model = DINOv3ViTModel(DINOv3ViTConfig(**tiny_settings()))
    name = next(name for name, _ in model.named_modules() if name.endswith(".q_proj")).removesuffix("q_proj")
    names = [f"{name}{part}_proj" for part in "qkvo"]
    with pytest.raises(BlockSparseFormatError, match="must keep 16 features of a head"):
        check_heads(model, CutHeads(*names, 3, 8, 3, 16))
    check_heads(model, CutHeads(*names, 2, 16, 3, 16))


def test_attributes_of_older_attentions_are_set():
    """As transformers 5 began, a ViT's attention had these."""
    config = BertConfig(hidden_size=WIDTH, num_attention_heads=3)
    model = torch.nn.ModuleDict({"self": BertSelfAttention(config)})
    attention = model["self"]
    attention.scaling = 0.25
    model["output"] = torch.nn.Linear(WIDTH, WIDTH)
    cut = CutHeads("self.query", "self.key", "self.value", "output", 2, 5, 3, 16)
    shrink(model, cut)
    set_heads(model, cut)
    sizes = ("num_attention_heads", "attention_head_size", "all_head_size")
    assert [getattr(attention, name) for name in sizes] == [2, 5, 10]
    assert cut_heads(model) == [cut]
    restore_heads(model)
    assert [getattr(attention, name) for name in sizes] == [3, 16, 48]
    assert not cut_heads(model)


def test_sparsify_refuses_what_does_not_fit_and_changes_nothing():
    model = dense_model("vit")
    cut = attentions(model, KEPT["vit"])[0]
    sizes = shrink(model, cut)
    grids = {name: [-(-size // 8) for size in model.get_submodule(name).weight.shape] for name in sizes}
    masks = {name: torch.ones(grid, dtype=torch.bool) for name, grid in grids.items()}
    for wrong, heads, message in (
        ({cut.out: (48, 8)}, (), "is larger than the 48x8 in cut"),
        ({"vit.layers.1.mlp.fc1": (96, 48)}, (), "is in cut, but not in masks"),
        ({}, (cut,), "is of an attention in heads, but not in cut"),
        (sizes, (replace(cut, heads=1),), "20 features, not 1 heads of 10"),
    ):
        with pytest.raises(BlockSparseFormatError, match=message):
            sparsify(model, masks, (8, 8), cut=wrong, heads=heads)
        assert not list(block_sparse_layers(model))
    assert answer(sparsify(model, masks, (8, 8), cut=sizes, heads=[cut])).shape == (3, NUM_LABELS)


def test_a_cut_attention_with_a_dense_layer_cannot_be_saved(tmp_path):
    model = cut_model(dense_model("vit"), KEPT["vit"])
    cut = cut_heads(model)[0]
    model.set_submodule(cut.key, model.get_submodule(cut.key).to_dense())
    with pytest.raises(BlockSparseFormatError, match=rf"{cut.key}: .* must be block-sparse too"):
        model.save_pretrained(tmp_path)
