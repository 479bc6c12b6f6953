"""Checkpoints written by earlier versions load for ever, with the predictions that they had then."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_blockprune import BlockSparseFormatError
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.hub import blockprune_config
from hf_blockprune.hub.blockprune_config import FORMAT_VERSION
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from hf_blockprune.hub.blockprune_tokens import TokenSchedule, schedule_of
from tests.conftest import ROOT

FIXTURES = ROOT / "tests" / "fixtures"
PICTURE = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_checkpoint_of_every_format_loads(version):
    folder = FIXTURES / f"format-{version}"
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"] == version
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert len(list(block_sparse_layers(model))) == (18 if version >= 5 else 6)
    with torch.no_grad():
        logits = model(PICTURE).logits
    expected = torch.tensor(json.loads((folder / "logits.json").read_text()))
    tolerance = 1e-3 if version == 6 else 1e-5  # in int8 numbers that lie between two steps may go either way
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("version", "shape", "kept"),
    [(1, [32, 16], 4), (2, [16, 16], 2), (3, [16, 16], 2), (4, [16, 16], 2), (5, [16, 16], 2), (6, [16, 16], 2)],
)
def test_every_format_can_be_inspected(version, shape, kept):
    layers = inspect_checkpoint(FIXTURES / f"format-{version}")["layers"]
    fc1 = next(layer for layer in layers if layer["shape"] == [32, 16])
    assert (fc1["stored_shape"], fc1["kept_blocks"]) == (shape, kept)


@pytest.mark.parametrize("version", [4, 5, 6])
def test_cut_heads_are_told(version):
    found = inspect_checkpoint(FIXTURES / f"format-{version}")
    (heads,) = found["heads"]
    assert [heads[key] for key in ("heads", "head_size", "dense_heads", "dense_head_size")] == [1, 6, 2, 8]
    sizes = {layer["name"]: (layer["stored_shape"], layer["shape"]) for layer in found["layers"]}
    assert sizes[heads["query"]] == ([6, 16], [16, 16])
    assert sizes[heads["out"]] == ([16, 6], [16, 16])


def test_merging_is_told():
    folder = FIXTURES / "format-5"
    tokens = inspect_checkpoint(folder)["tokens"]
    assert (list(tokens["leave"]), tokens["patches"]) == ([5, 4, 0], 16)
    assert schedule_of(AutoModelForImageClassification.from_pretrained(folder)) == TokenSchedule((5, 4, 0), 16)
    assert all(inspect_checkpoint(FIXTURES / f"format-{version}")["tokens"] is None for version in range(1, 5))


def test_what_merges_shows_in_the_answer():
    """Else the logits of format 5 would be no witness."""
    dense = AutoModelForImageClassification.from_pretrained(FIXTURES / "format-5").dequantize()
    stored = torch.tensor(json.loads((FIXTURES / "format-5/logits.json").read_text()))
    assert (dense(PICTURE).logits - stored).abs().max() > 1e-3


@pytest.mark.parametrize("opened", [AutoModelForImageClassification.from_pretrained, inspect_checkpoint])
def test_code_of_an_older_format_says_that_a_newer_one_reads_it(opened, monkeypatch):
    for version in range(2, FORMAT_VERSION + 1):
        monkeypatch.setattr(blockprune_config, "FORMAT_VERSION", version - 1)
        with pytest.raises(BlockSparseFormatError, match=f"reads 1 to {version - 1}, got {version}; a newer"):
            opened(FIXTURES / f"format-{version}")


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_saving_again_writes_the_same_tensors(version, tmp_path):
    folder = FIXTURES / f"format-{version}"
    AutoModelForImageClassification.from_pretrained(folder).save_pretrained(tmp_path)
    again, before = (load_file(path / "model.safetensors") for path in (tmp_path, folder))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
