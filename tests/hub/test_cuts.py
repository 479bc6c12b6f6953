"""What a checkpoint may say of smaller layers and attentions, and what is refused before anything is allocated."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from hf_blockprune import BlockSparseFormatError
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.cli import app
from hf_blockprune.hub.blockprune_config import FORMAT_VERSION, BlockPruneQuantizationConfig
from tests.conftest import ROOT, tiny_model
from tests.cutting import KEPT, cut_model

ATTENTION = "vit.encoder.layer.0.attention"
QUERY, KEY, VALUE = (f"{ATTENTION}.attention.{part}" for part in ("query", "key", "value"))
OUT = f"{ATTENTION}.output.dense"
FC1, FC2 = "vit.encoder.layer.0.intermediate.dense", "vit.encoder.layer.0.output.dense"
HEADS = {"query": QUERY, "key": KEY, "value": VALUE, "out": OUT, "heads": 1, "head_size": 6}
GOOD = {
    "block_shape": [8, 8],
    "layers": dict.fromkeys("qkvo", 1),
    "cut": {"q": [6, 16], "k": [6, 16], "v": [6, 16], "o": [16, 6]},
    "heads": [{"query": "q", "key": "k", "value": "v", "out": "o", "heads": 2, "head_size": 3}],
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of format 4 that a test may change: one head of 6 features out of two of 8."""
    return Path(shutil.copytree(ROOT / "tests/fixtures/format-4", tmp_path / "stranger"))


def edit(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values["quantization_config"])
    path.write_text(json.dumps(values))


def load(folder):
    return AutoModelForImageClassification.from_pretrained(folder)


OPENERS = pytest.mark.parametrize("opened", [load, inspect_checkpoint], ids=["from_pretrained", "inspect"])


def with_heads(**changes):
    return {**GOOD, "heads": [{**GOOD["heads"][0], **changes}]}


def test_a_config_with_heads():
    config = BlockPruneQuantizationConfig(**GOOD)
    assert config.to_dict() == {**GOOD, "quant_method": "blockprune", "format_version": FORMAT_VERSION}
    assert "heads" not in BlockPruneQuantizationConfig(**{**GOOD, "heads": []}).to_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**GOOD, "format_version": 3}, r"unknown keys \['heads'\] in format 3"),
        ({**GOOD, "heads": {}}, "must be a list"),
        ({**GOOD, "heads": [[]]}, r"heads\[0\]: must give query, key, value, out, heads, head_size"),
        ({**GOOD, "heads": [{"query": "q"}]}, r"heads\[0\]: must give"),
        (with_heads(more=1), r"heads\[0\]: must give"),
        (with_heads(key="q"), r"heads\[0\]: q is named twice"),
        ({**GOOD, "heads": GOOD["heads"] * 2}, r"heads\[1\]: q is named twice"),
        (with_heads(out="other"), r"heads\[0\]: 'other' is no layer of cut"),
        (with_heads(out=["o"]), r"heads\[0\]: \['o'\] is no layer of cut"),
        (with_heads(heads=0), r"heads\[0\].heads: a whole number from 1, got 0"),
        (with_heads(heads=True), r"heads\[0\].heads: a whole number from 1, got True"),
        (with_heads(heads=2.0), r"heads\[0\].heads: a whole number from 1, got 2.0"),
        (with_heads(head_size=-3), r"heads\[0\].head_size: a whole number from 1, got -3"),
        (with_heads(head_size=4), r"heads\[0\]: q and its partners are not cut to such heads"),
        (with_heads(head_size=10**4000, heads=10**4000), r"heads\[0\]: q and its partners are not cut to such heads"),
        ({**GOOD, "cut": {**GOOD["cut"], "o": [6, 16]}}, r"heads\[0\]: q and its partners"),
        ({**GOOD, "cut": {**GOOD["cut"], "k": [8, 16]}}, r"heads\[0\]: q and its partners"),
        ({key: value for key, value in GOOD.items() if key != "cut"}, "'q' is no layer of cut"),
    ],
)
def test_impossible_heads_are_refused(values, message):
    with pytest.raises(BlockSparseFormatError, match=message):
        BlockPruneQuantizationConfig(**values)


@OPENERS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("heads"), "is a layer of an attention, but quantization_config.heads says nothing"),
        (lambda config: config.update(heads=[]), "is a layer of an attention"),
        (lambda config: config.update(format_version=3), "unknown keys"),
        (lambda config: config["heads"][0].update(heads=3, head_size=2), "heads from 1 to 2, got 3"),
        (lambda config: config["heads"][0].update(key=VALUE, value=KEY), None),
        (lambda config: config["heads"][0].update(out=FC2), "are not cut to such heads"),
        (lambda config: config["heads"][0].update(key=OUT, out=KEY), "are not cut to such heads"),
        (lambda config: config["cut"].update({QUERY: [6, 12]}), "is not of 1 heads of 6 out of 2 of 8"),
        (lambda config: config["cut"].update({OUT: [8, 6]}), "is not of 1 heads of 6 out of 2 of 8"),
        (lambda config: config["cut"].pop(FC1), "has no layer after it|no layer"),
    ],
    ids=[
        "no heads",
        "empty heads",
        "older format",
        "too many heads",
        "key and value exchanged",
        "out of the MLP",
        "key and out exchanged",
        "fewer inputs of a query",
        "fewer outputs of out",
        "half of an MLP",
    ],
)
def test_what_is_said_must_fit(folder, opened, change, message):
    edit(folder, change)
    if message is None:  # both are of the same shape: what is where is the file's own affair
        opened(folder)
        return
    with pytest.raises(BlockSparseFormatError, match=message):
        opened(folder)


@OPENERS
def test_an_attention_without_heads_entry_is_no_mlp(folder, opened):
    """Its value and out have the sizes that fc1 and fc2 would have."""

    def change(config):
        config.update(heads=[], cut={VALUE: [6, 16], OUT: [16, 6]})

    edit(folder, change)
    with pytest.raises(BlockSparseFormatError, match=rf"{VALUE} is a layer of an attention"):
        opened(folder)


@OPENERS
def test_layers_of_several_attentions_are_refused(tmp_path, opened):
    cut_model(tiny_model(), ((2, 10), (2, 10))).save_pretrained(tmp_path)

    def change(config):
        first, second = config["heads"]
        first["key"], second["key"] = second["key"], first["key"]

    edit(tmp_path, change)
    with pytest.raises(BlockSparseFormatError, match="no query, key, value and out of one attention"):
        opened(tmp_path)


@OPENERS
def test_heads_that_must_stay_are_not_taken_from_a_file(tmp_path, opened):
    cut_model(tiny_model("beit"), ((3, 10), (3, 8))).save_pretrained(tmp_path)

    def change(config):
        config["heads"][1].update(heads=2, head_size=12)

    edit(tmp_path, change)
    with pytest.raises(BlockSparseFormatError, match="must keep 3 heads"):
        opened(tmp_path)


def test_tensors_of_another_size_are_refused(folder):
    edit(folder, lambda config: config["heads"][0].update(head_size=8))
    edit(folder, lambda config: config["cut"].update({n: [8, 16] for n in (QUERY, KEY, VALUE)} | {OUT: [16, 8]}))
    with pytest.raises(BlockSparseFormatError, match=r"(query|key|value).bias: shape \(6,\), expected \(8,\)"):
        load(folder)


def test_the_command_tells_what_was_cut(folder):
    done = CliRunner().invoke(app, ["inspect", str(folder)])
    assert done.exit_code == 0, done.output
    assert "features of heads: 6 of 16 in the attentions that were cut (1)" in done.output


@pytest.mark.parametrize("family", KEPT)
def test_inspection_tells_what_was_cut(family, tmp_path):
    model = cut_model(tiny_model(family), KEPT[family], share=0.7)
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert [(heads["heads"], heads["head_size"]) for heads in found["heads"]] == list(KEPT[family])
    names = {layer["name"]: layer for layer in found["layers"]}
    for heads in found["heads"]:
        features, dense = heads["heads"] * heads["head_size"], heads["dense_heads"] * heads["dense_head_size"]
        assert (names[heads["query"]]["stored_shape"][0], names[heads["query"]]["shape"][0]) == (features, dense)
        assert (names[heads["out"]]["stored_shape"][1], names[heads["out"]]["shape"][1]) == (features, dense)
