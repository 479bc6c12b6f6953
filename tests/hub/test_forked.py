"""Servers that load a model and fork workers before any inference: each in a process that has computed nothing yet."""

import json
import os
import sys

import pytest
import torch

from hf_blockprune import BlockPruneConfig, BlockPruner
from tests.conftest import tiny_model
from tests.hub.saved_models import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="processes are not forked here"),
]

SERVER = """
import json, multiprocessing, sys, warnings

warnings.simplefilter("ignore")
source, threads, auto_class, kwargs, way = json.loads(sys.argv[1])
import torch, transformers

torch.set_num_threads(threads)
model = getattr(transformers, auto_class).from_pretrained(source, **kwargs).eval()


def answer():
    with torch.no_grad():
        return model(pixel_values=torch.zeros(8, 3, 32, 32, dtype=model.dtype))[0].float()


class Features(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return answer()


def work(connection):
    connection.send(answer().isfinite().all().item())


if way == "loader":
    options = {"num_workers": 2, "batch_size": None, "multiprocessing_context": "fork", "timeout": 30}
    answers = list(torch.utils.data.DataLoader(Features(), **options))
    print(torch.stack(answers).isfinite().all().item())
else:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    worker = fork.Process(target=work, args=(theirs,))
    worker.start()
    answered = ours.poll(40) and ours.recv()
    worker.kill()
    print(answered)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, processor):
    """One of ordinary blocks, and one whose index tensors are so long that torch would share work on them out."""
    folders = {}
    for name, block_shape, changes in (
        ("blocks", [16, 16], {}),
        ("long indices", [1, 1], {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}),
    ):
        config = BlockPruneConfig.from_dict(
            {
                "method": "magnitude",
                "refit": False,
                "block_shape": block_shape,
                "budget": {"metric": "density", "ratio": 0.5},
            }
        )
        pruner = BlockPruner(tiny_model(**changes), processor, config, name="tiny")
        pruner.prune()
        folders[name] = tmp_path_factory.mktemp("forked") / name.replace(" ", "-")
        pruner.save_pretrained(folders[name])
    return folders


@pytest.fixture
def serve(tmp_path):
    """What a server says of the answer of its worker."""

    def run_server(source, *, threads=2, auto_class="AutoModelForImageClassification", way="process", **options):
        environment = {"BLOCKPRUNE_STORAGE": options.pop("storage", "packed")}
        package = options.pop("package", True)
        arguments = json.dumps([str(source), threads, auto_class, options, way])
        done = run(SERVER, tmp_path, arguments, package=package, **environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    return run_server


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("name", ["blocks", "long indices"])
def test_a_worker_answers(serve, checkpoints, name, threads):
    assert serve(checkpoints[name], threads=threads) == "True"


@pytest.mark.parametrize("name", ["blocks", "long indices"])
def test_a_worker_answers_where_weights_are_unpacked(serve, checkpoints, name):
    assert serve(checkpoints[name], storage="unpacked") == "True"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_worker_answers_in_another_dtype(serve, checkpoints, dtype):
    assert serve(checkpoints["long indices"], dtype=dtype) == "True"


def test_a_worker_answers_where_the_checkpoint_brings_the_code(serve, checkpoints):
    assert serve(checkpoints["blocks"], package=False, trust_remote_code=True) == "True"


def test_a_worker_answers_with_a_model_without_a_head(serve, checkpoints):
    assert serve(checkpoints["blocks"], auto_class="AutoModel") == "True"


def test_data_loaders_run_a_model_in_their_workers(serve, checkpoints):
    assert serve(checkpoints["blocks"], way="loader") == "True"


def test_conversion_in_pieces_is_conversion():
    from hf_blockprune.hub.blockprune_quantizer import _converted

    x = torch.randn(3, 40_000)
    assert torch.equal(_converted(x, torch.bfloat16), x.to(torch.bfloat16))
    assert _converted(torch.ones(()), torch.float64).shape == ()
