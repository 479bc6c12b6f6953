"""Every family of models through the whole of what can be done with it, each thing by a test of its own.

`scripts/compatibility.py` runs this file for docs/compatibility.md: a test's name is a capability, its
parameter a family.
"""

import copy
import json

import onnxruntime
import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_blockprune import BlockPruneConfig, BlockPruner, RecoveryConfig
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from hf_blockprune.export.forms import export_checkpoint
from hf_blockprune.hub.blockprune_quantizer import block_sparse_layers
from tests.conftest import ALL_FAMILIES, tiny_model
from tests.hub.saved_models import run

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
CONFIG = BlockPruneConfig(
    block_shape=(8, 8), budget={"metric": "flops", "ratio": 0.75}, calibration={"samples": 24, "batch_size": 8}
)
LOAD_ALL = """
import json, sys
import torch
from transformers import AutoModelForImageClassification

folders, pixels, output = json.loads(sys.argv[1])
logits = {}
for family, folder in folders.items():
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits[family] = model(torch.load(pixels)).logits
torch.save(logits, output)
"""


@pytest.fixture(scope="module")
def pruners(images, processor):
    """A pruned model of every family."""
    made = {}
    for family in ALL_FAMILIES:
        made[family] = BlockPruner(tiny_model(family), processor, CONFIG, name=f"tiny-{family}")
        made[family].prune(images)
    return made


@pytest.fixture(scope="module")
def folders(pruners, tmp_path_factory):
    """Where each was saved."""
    parent = tmp_path_factory.mktemp("families")
    for family, pruner in pruners.items():
        pruner.save_pretrained(parent / family)
    return {family: parent / family for family in pruners}


@pytest.fixture(params=ALL_FAMILIES)
def pruner(request, pruners):
    return pruners[request.param]


@pytest.fixture(params=ALL_FAMILIES)
def folder(request, folders):
    return folders[request.param]


@torch.no_grad()
def logits_of(model):
    return model(pixel_values=PIXELS).logits


def divergence(dense, model):
    wanted, have = (logits_of(m).log_softmax(-1) for m in (dense, model))
    return float((wanted.exp() * (wanted - have)).sum(-1).mean())


def test_prune(pruner):
    report = pruner.report()
    assert 0.74 < report["flops_ratio"] <= 0.75
    sparse = dict(block_sparse_layers(pruner.model))
    assert len(sparse) == len(report["layers"])
    assert report["permutation"]["saliency_kept_after"] > report["permutation"]["saliency_kept_before"]
    dense = copy.deepcopy(pruner.model).dequantize()
    torch.testing.assert_close(logits_of(pruner.model), logits_of(dense), atol=1e-5, rtol=1e-5)
    # Scores and a refit on the very images are no luck: far better than the smallest blocks gone.
    family = pruner.name.removeprefix("tiny-")
    plain = BlockPruner(tiny_model(family), pruner.processor, CONFIG.replace(method="magnitude", refit=False))
    plain.prune()
    assert divergence(tiny_model(family), pruner.model) < 0.5 * divergence(tiny_model(family), plain.model)


def test_save(pruner, folders):
    folder = folders[pruner.name.removeprefix("tiny-")]
    stored = inspect_checkpoint(folder)
    assert stored["flops_ratio"] == pytest.approx(pruner.report()["flops_ratio"])
    assert stored["size_bytes"] < stored["dense_size_bytes"]
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    name = auto_map["AutoModelForImageClassification"].rpartition(".")[2]
    assert name == f"BlockPrune{type(pruner.model).__name__}"


def test_load(pruner, folders):
    folder = folders[pruner.name.removeprefix("tiny-")]
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert type(loaded) is type(pruner.model)
    torch.testing.assert_close(logits_of(loaded), logits_of(pruner.model), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def logits_without_the_package(folders, tmp_path_factory):
    """What a process without the package gets from each folder."""
    work = tmp_path_factory.mktemp("without")
    torch.save(PIXELS, work / "pixels.pt")
    paths = {family: str(folder) for family, folder in folders.items()}
    arguments = json.dumps([paths, str(work / "pixels.pt"), str(work / "logits.pt")])
    done = run(LOAD_ALL, work, arguments, package=False)
    assert done.returncode == 0, done.stderr
    return torch.load(work / "logits.pt")


@pytest.mark.slow
def test_load_without_the_package(pruner, logits_without_the_package):
    logits = logits_without_the_package[pruner.name.removeprefix("tiny-")]
    torch.testing.assert_close(logits, logits_of(pruner.model), atol=1e-5, rtol=1e-5)


def test_recover(pruner, images):
    family = pruner.name.removeprefix("tiny-")
    recovered = BlockPruner(
        copy.deepcopy(pruner.model), pruner.processor, CONFIG.replace(recovery=RecoveryConfig(epochs=2))
    )
    recovered._report = copy.deepcopy(pruner._report)
    recovered.recover(images, teacher=BlockPruner(tiny_model(family), pruner.processor))
    seen = recovered.report()["recovery"]["divergence"]
    assert set(seen) == {"pruned", "reconstruction", "distillation"}
    assert min(seen.values()) == seen[recovered.report()["recovery"]["kept"]]
    for name, module in block_sparse_layers(recovered.model):
        assert torch.equal(module.mask(), pruner.model.get_submodule(name).mask())


def test_compile(pruner):
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(pruner.model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits_of(compiled), logits_of(pruner.model), atol=1e-5, rtol=1e-5)


def test_export(pruner):
    model = copy.deepcopy(pruner.model).eval()
    with torch.no_grad():
        program = torch.export.export(model, (), {"pixel_values": PIXELS})
        logits = program.module()(pixel_values=PIXELS).logits
    torch.testing.assert_close(logits, logits_of(pruner.model), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_onnx(folder, tmp_path):
    export_checkpoint(folder, tmp_path / "model.onnx", "onnx")
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": PIXELS.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), logits_of(loaded), atol=1e-4, rtol=1e-4)
