"""The main job on a real DeiT-Ti and real photographs, where they are at hand."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_blockprune import BlockPruneConfig, BlockPruner
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from tests.conftest import whole_masks

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def model_path(shared):
    return shared / "models/deit-tiny-patch16-224"


@pytest.fixture(scope="module")
def photographs(shared, tmp_path_factory):
    """The first 60 of the labelled photographs, as a folder of their own."""
    source = shared / "data/nips2017/evaluation"
    folder = tmp_path_factory.mktemp("photographs")
    lines = (source / "metadata.csv").read_text().splitlines()[:61]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    for line in lines[1:]:
        name = line.partition(",")[0]
        (folder / name).symlink_to(source / name)
    return folder


@pytest.fixture(scope="module")
def pruned(model_path, shared, photographs, tmp_path_factory):
    """DeiT-Ti with 90 % of its FLOPs, by taylor on 64 images."""
    config = BlockPruneConfig(
        method="taylor",
        block_shape=(16, 16),
        budget={"metric": "flops", "ratio": 0.9},
        calibration={"samples": 64, "batch_size": 16},
    )
    pruner = BlockPruner.from_pretrained(model_path, config)
    pruner.prune(shared / "data/imagenet-sample/calibration")
    pruner.evaluate(photographs, against=model_path)
    output = tmp_path_factory.mktemp("real") / "out"
    pruner.save_pretrained(output)
    return output


def test_budget_and_file_size(pruned):
    values = inspect_checkpoint(pruned)
    assert 0.8955 <= values["flops_ratio"] <= 0.9
    assert values["dense_flops"] == pytest.approx(2.507e9, rel=1e-3)
    stored = sum(p.numel() * 4 for p in AutoModelForImageClassification.from_pretrained(pruned).state_dict().values())
    assert values["size_bytes"] <= 1.02 * stored


def test_loaded_model_equals_the_masked_dense_one(pruned, model_path, photographs):
    loaded = AutoModelForImageClassification.from_pretrained(pruned)
    dense = AutoModelForImageClassification.from_pretrained(model_path)
    for name, mask in whole_masks(loaded, dense).items():
        dense.get_submodule(name).weight.data *= mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
    processor = AutoImageProcessor.from_pretrained(pruned)
    pictures = [Image.open(path).convert("RGB") for path in sorted(photographs.glob("*.jpg"))[:4]]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).logits, dense(pixels).logits, atol=1e-5, rtol=1e-5)


def test_report_compares_with_the_dense_model(pruned):
    evaluation = json.loads((pruned / "blockprune_report.json").read_text())["evaluation"]
    assert evaluation["num_images"] == 60
    assert evaluation["baseline_top1"] > 0.75
    assert evaluation["top1"] > 0.4


def test_pipeline_names_what_is_on_a_photograph(pruned, photographs):
    metadata = dict(line.split(",") for line in (photographs / "metadata.csv").read_text().splitlines()[1:])
    classify = pipeline("image-classification", model=str(pruned))
    labels = classify.model.config.id2label
    names = list(metadata)[:20]
    right = sum(classify(str(photographs / name), top_k=1)[0]["label"] == labels[int(metadata[name])] for name in names)
    assert right >= 8
