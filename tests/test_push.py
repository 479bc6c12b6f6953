"""Push to a Hub and load from it, in processes of their own."""

import os
import subprocess
import sys

import pytest

from .conftest import ROOT
from .fake_hub import FakeHub

PUSH = """
import sys
from hf_blockprune import BlockPruneConfig, BlockPruner, Budget

config = BlockPruneConfig(block_shape=(16, 16), method="magnitude", budget=Budget("flops", 0.75))
pruner = BlockPruner.from_pretrained(sys.argv[1], config)
pruner.prune()
pruner.push_to_hub(sys.argv[2])
"""

LOAD = """
import sys
import hf_blockprune
from transformers import AutoModelForImageClassification, pipeline

model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
print(sum(isinstance(module, hf_blockprune.BlockSparseLinear) for module in model.modules()))
print(len(pipeline("image-classification", model=sys.argv[1])(sys.argv[2])))
"""


@pytest.mark.slow
def test_push_then_load(vit_folder, images, tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}

    def run(script, *arguments):
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split()

    with FakeHub({}, uploads=tmp_path / "hub") as hub:
        env["HF_ENDPOINT"] = hub.endpoint
        run(PUSH, vit_folder, "someone/pruned")
        assert run(LOAD, "someone/pruned", images / "picture_000.png") == ["12", "5"]
    pushed = tmp_path / "hub/someone/pruned"
    assert {"README.md", "config.json", "model.safetensors", "blockprune_layout.py"} <= {
        p.name for p in pushed.iterdir()
    }
    assert 'from_pretrained("someone/pruned")' in (pushed / "README.md").read_text()
