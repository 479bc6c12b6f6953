"""What a checkpoint may say of tokens that merge, and what is refused before anything is allocated."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hf_blockprune import BlockSparseFormatError, CheckpointError, ModelError, sparsify
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.checkpoint.simulation import simulate_checkpoint
from hf_blockprune.hub.blockprune_config import MAX_PATCHES, BlockPruneQuantizationConfig
from hf_blockprune.hub.blockprune_layers import block_sparse_layers
from hf_blockprune.hub.blockprune_tokens import TokenSchedule, UnmergeableError, schedule_of, set_schedule
from hf_blockprune.model.loading import load_model
from hf_blockprune.score.blocks import grid_shape
from tests.conftest import ROOT, tiny_model, tiny_settings

GOOD = {"block_shape": [8, 8], "layers": {"a": 1}, "tokens": {"leave": [5, 0, 4], "patches": 16}}
PICTURE = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of format 5 that a test may change: (5, 4, 0) of 16 patches leave."""
    return Path(shutil.copytree(ROOT / "tests/fixtures/format-5", tmp_path / "stranger"))


def say(folder, tokens, **changes):
    """Let a checkpoint's config say other things."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"].update(tokens=tokens, **changes)
    path.write_text(json.dumps(values))


def load(folder):
    return AutoModelForImageClassification.from_pretrained(folder)


def simulate(folder):
    return simulate_checkpoint(folder, "systolic-32")


OPENERS = pytest.mark.parametrize(
    "opened", [load, inspect_checkpoint, simulate], ids=["from_pretrained", "inspect", "simulate"]
)


def sparse(model, *, named=("layer",)):
    """A model of which every Linear in its layers keeps all blocks, but one."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(part in n for part in named)}
    masks = {n: torch.ones(grid_shape((m.out_features, m.in_features), (8, 8))).bool() for n, m in linears.items()}
    next(iter(masks.values()))[0, 0] = False
    return sparsify(model, masks, (8, 8))


def schedule(*leave, patches=16):
    return {"leave": list(leave), "patches": patches}


def test_a_config_with_tokens():
    config = BlockPruneQuantizationConfig(**GOOD)
    assert config.to_dict() == {**GOOD, "quant_method": "blockprune", "format_version": 6}
    assert "tokens" not in BlockPruneQuantizationConfig(**{**GOOD, "tokens": None}).to_dict()
    assert BlockPruneQuantizationConfig(**{**GOOD, "tokens": schedule(1, patches=MAX_PATCHES)})


LEAVE, PATCHES, KEYS = r"tokens\.leave: a list of", r"tokens\.patches: a whole number up to", "must give leave and"
NOT_SO = [
    *[(tokens, KEYS) for tokens in ([], {}, "x", 0, 1.5, True, False, [[5, 4, 0], 16])],
    ({"leave": [5, 4, 0]}, KEYS),
    ({"patches": 16}, KEYS),
    ({**schedule(5, 4, 0), "prefix": 1}, KEYS),
    ({"Leave": [5, 4, 0], "patches": 16}, KEYS),
    *[({"leave": leave, "patches": 16}, LEAVE) for leave in (None, 9, "540", {"0": 5}, [[5], 4, 0], [None] * 3)],
    *[(schedule(5, value, 0), LEAVE) for value in (-1, 4.0, True, "4", float("nan"), -(10**400), {"a": 1})],
    *[(schedule(5, 4, 0, patches=value), PATCHES) for value in (None, True, 16.0, "16", [16], float("inf"))],
    *[(schedule(0, 0, 0, patches=value), PATCHES) for value in (0, -1, MAX_PATCHES + 1, 2**63, 10**4000)],
    *[(schedule(*leave), PATCHES) for leave in ((16, 0, 0), (5, 4, 7), (10**4000, 0, 0))],
    (schedule(5, 4, 0, patches=9), PATCHES),
]


@pytest.mark.parametrize(("tokens", "message"), NOT_SO)
def test_impossible_schedules_are_refused(tokens, message):
    with pytest.raises(BlockSparseFormatError, match=message):
        BlockPruneQuantizationConfig(**{**GOOD, "tokens": tokens})


@OPENERS
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        *[NOT_SO[number] for number in range(0, len(NOT_SO), 5)],
        (schedule(), "tokens: 0 numbers, but the model has 3 layers"),
        (schedule(5, 4), "tokens: 2 numbers, but the model has 3 layers"),
        (schedule(5, 4, 0, 0), "tokens: 4 numbers, but the model has 3 layers"),
        (schedule(*[0] * 100_000), "tokens: 100000 numbers"),
    ],
)
def test_no_schedule_that_is_none_of_the_model_opens(folder, opened, tokens, message):
    say(folder, tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BlockSparseFormatError, match=message):
        opened(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@OPENERS
def test_older_formats_have_no_tokens(folder, opened):
    say(folder, schedule(5, 4, 0), format_version=4)
    with pytest.raises(BlockSparseFormatError, match=r"unknown keys \['tokens'\] in format 4"):
        opened(folder)


@pytest.mark.parametrize("opened", [load_model, inspect_checkpoint, simulate])
@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_deep_nesting_is_refused(folder, opened, depth):
    say(folder, {"leave": "nested", "patches": 16})
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"nested"', "[" * depth + "]" * depth))
    with pytest.raises((BlockSparseFormatError, CheckpointError, ModelError), match=r"leave|recursion"):
        opened(folder, {}) if opened is load_model else opened(folder)


@OPENERS
def test_two_tokens_must_stay(tmp_path, opened):
    """One patch is enough beside a class token, but not alone."""
    torch.manual_seed(0)
    settings = {key: value for key, value in tiny_settings().items() if key != "id2label"}
    sparse(SiglipVisionModel(SiglipVisionConfig(**settings))).save_pretrained(tmp_path)
    say(tmp_path, schedule(8, 7))
    opened = SiglipVisionModel.from_pretrained if opened is load else opened
    with pytest.raises(BlockSparseFormatError, match="tokens: 15 of 16 patches leave, so that 1 tokens are left"):
        opened(tmp_path)
    say(tmp_path, schedule(8, 6))
    opened(tmp_path)


@OPENERS
@pytest.mark.parametrize(
    ("family", "leave", "message"),
    [
        ("beit", (4, 4), "a bias for each pair of places"),
        ("swin", (3, 3, 3, 3), "a bias for each pair of places|within windows"),
    ],
)
def test_families_whose_tokens_cannot_merge(tmp_path, opened, family, leave, message):
    sparse(tiny_model(family)).save_pretrained(tmp_path)
    for said in (leave, [0] * len(leave)):
        say(tmp_path, schedule(*said))
        with pytest.raises(UnmergeableError, match=message):
            opened(tmp_path)


@OPENERS
def test_layers_of_several_lists_are_refused(tmp_path, opened):
    sparse(tiny_model(), named=("layer", "classifier")).save_pretrained(tmp_path)
    opened(tmp_path)
    say(tmp_path, schedule(4, 4))
    with pytest.raises(UnmergeableError, match="tokens merge in one list of layers, and its Linears lie in more"):
        opened(tmp_path)


def clip():
    vision = {key: value for key, value in tiny_settings().items() if key != "id2label"}
    torch.manual_seed(0)
    text = {**vision, "vocab_size": 50, "max_position_embeddings": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (("text_model.encoder",), "not known which of its tokens are patches"),
        (("text_model.encoder", "vision_model.encoder"), "its Linears lie in more"),
        (("vision_model.encoder",), None),
    ],
    ids=["text", "both", "images"],
)
def test_words_do_not_merge(tmp_path, named, message):
    sparse(clip(), named=named).save_pretrained(tmp_path)
    say(tmp_path, schedule(4, 4))
    if message is None:
        assert schedule_of(CLIPModel.from_pretrained(tmp_path)) == TokenSchedule((4, 4), 16)
        return
    with pytest.raises(UnmergeableError, match=message):
        CLIPModel.from_pretrained(tmp_path)


def test_words_do_not_merge_in_a_model_of_nothing_else(tmp_path):
    settings = {**tiny_settings(), "vocab_size": 50, "max_position_embeddings": 8}
    sparse(CLIPTextModel(CLIPTextConfig(**settings))).save_pretrained(tmp_path)
    say(tmp_path, schedule(4, 4))
    with pytest.raises(UnmergeableError, match="not known which of its tokens are patches"):
        CLIPTextModel.from_pretrained(tmp_path)


def test_a_backbone_in_a_model_does_not_merge():
    """It gives its layers' states as maps."""
    settings = {**tiny_settings(num_hidden_layers=4), "mlp_ratio": 2}
    del settings["intermediate_size"]
    backbone = Dinov2Config(**settings, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    sizes = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "reassemble_hidden_size": 48, "patch_size": 8}
    model = DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=backbone, **sizes))
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and ".layer." in name]
    with pytest.raises(UnmergeableError, match=r"maps of patches \(backbone\)"):
        set_schedule(model, TokenSchedule((1, 1, 1, 1), 16), names)


@pytest.mark.parametrize("tokens", [None, schedule(0, 0, 0)], ids=["nothing said", "none leave"])
def test_where_none_leave_none_merge(folder, tokens):
    say(folder, tokens)
    model = load(folder)
    assert schedule_of(model) is None
    merging = inspect_checkpoint(ROOT / "tests/fixtures/format-5")
    assert inspect_checkpoint(folder)["flops_ratio"] > merging["flops_ratio"]
    with torch.no_grad():
        torch.testing.assert_close(model(PICTURE).logits, model.dequantize()(PICTURE).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [schedule(15, 0, 0), schedule(0, 0, 15), schedule(2, 2, 2, patches=MAX_PATCHES)])
def test_the_ways_to_open_agree(folder, tokens):
    """Also on what is as odd as may be."""
    say(folder, tokens)
    model, found = load(folder), inspect_checkpoint(folder)["tokens"]
    assert schedule_of(model) == TokenSchedule(tuple(tokens["leave"]), tokens["patches"])
    assert (list(found["leave"]), found["patches"]) == (tokens["leave"], tokens["patches"])
    seen = {}
    for name, layer in block_sparse_layers(model):
        layer.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0].shape[1]}))
    with torch.no_grad():
        assert model(PICTURE).logits.isfinite().all()
    assert [layer["tokens"] for layer in simulate(folder)["layers"]] == list(seen.values())
