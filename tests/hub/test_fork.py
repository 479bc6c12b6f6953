"""A process that loads a model may fork before it first uses it, as servers do: loading starts no threads."""

import os
import subprocess
import sys

import pytest
from transformers import ViTImageProcessor

from hf_blockprune import BlockPruneConfig, BlockPruner

from ..conftest import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")]

# Loads, forks, and answers in the child; the answer must be that of a process that did not fork.
SERVER = """
import multiprocessing, sys
import torch
{imports}
from transformers import AutoModel, AutoModelForImageClassification

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
model = {load}.eval()
pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(model.dtype)


def answer(queue):
    with torch.no_grad():
        queue.put(model(pixel_values=pixels)[0].double().sum().item())


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        with torch.no_grad():
            return model(pixel_values=pixels[index : index + 1])[0]


context = multiprocessing.get_context("fork")
queue = context.Queue()
child = context.Process(target=answer, args=(queue,))
child.start()
child.join(60)
assert not child.is_alive(), "the child hangs"
in_child = queue.get()
workers = torch.utils.data.DataLoader(Pictures(), num_workers=1, multiprocessing_context="fork", timeout=60)
assert len(list(workers)) == 4
with torch.no_grad():
    here = model(pixel_values=pixels)[0].double().sum().item()
assert abs(here - in_child) <= 1e-3 * abs(here) + 1e-3, (here, in_child)
print("answers")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide enough that torch would share out its loops over each tensor among threads, indices included."""
    folder = tmp_path_factory.mktemp("fork") / "pruned"
    model = tiny_model(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    settings = {"method": "magnitude", "block_shape": (2, 4), "budget": {"metric": "sparsity", "ratio": 0.6}}
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    pruner = BlockPruner(model, processor, BlockPruneConfig(**settings))
    pruner.prune()
    pruner.save_pretrained(folder)
    return folder


CLASSIFIER = "AutoModelForImageClassification.from_pretrained(folder{})"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("imports", "load"),
    [
        ("import hf_blockprune", CLASSIFIER.format("")),
        ("import hf_blockprune", CLASSIFIER.format(", dtype=torch.bfloat16")),
        ("import hf_blockprune", "AutoModel.from_pretrained(folder)"),
        ("", CLASSIFIER.format(", trust_remote_code=True")),
    ],
    ids=["classifier", "bfloat16", "encoder", "its own code"],
)
def test_a_child_answers(folder, imports, load, threads):
    code = SERVER.format(imports=imports, load=load)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder), str(threads)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert done.stdout.strip().endswith("answers"), done.stdout + done.stderr[-2000:]
