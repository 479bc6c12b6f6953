"""The kernels as a repository for the `kernels` package."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch
from torch import nn

from hf_blockprune import BlockSparseLinear
from hf_blockprune._cpu.library import PATH as LIBRARY
from hf_blockprune.hub.blockprune_ops import block_sparse_linear
from tests.conftest import ROOT

CPU = [] if not LIBRARY.exists() else [f"torch-stable-abi26-cpu-{platform.machine()}-linux"]
BUILDS = ["torch-cpu", "torch-cuda", *CPU]
SCRIPT = [sys.executable, str(ROOT / "scripts/kernel_repo.py")]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repo") / "hf-blockprune-kernels"
    subprocess.run([*SCRIPT, str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    return BlockSparseLinear.from_dense(nn.Linear(80, 48), torch.rand(3, 5) < 0.5, (16, 16))


def alone(script, **environment):
    """What a process prints in which `kernels` alone loads ours."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd="/", env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_build_is_there_with_its_digest(repo):
    assert sorted(path.name for path in (repo / "build").iterdir()) == sorted(BUILDS)
    for build in BUILDS:
        metadata = json.loads((repo / "build" / build / "metadata.json").read_text())
        found = kernels._rust.Digest.hash_variant(kernels._rust.DigestAlgorithm.SHA256, repo / "build" / build)
        assert found.files == metadata["digest"]["files"]
        assert metadata["backend"]["type"] == ("cuda" if "cuda" in build else "cpu")


@pytest.mark.parametrize("build", BUILDS)
def test_products_are_those_of_the_package(repo, layer, tmp_path, build):
    """On every backend, with gradients, in a process that loads neither hf_blockprune nor transformers."""
    x, residual = torch.randn(5, 80), torch.randn(5, 48)
    arguments = {"out_features": 48, "activation": "gelu", "residual": residual}
    live = x.clone().requires_grad_()
    expected = block_sparse_linear(live, *layer.arguments()[:4], **arguments, backend="reference")
    expected.sum().backward()
    case = {"x": x, "layer": [t.detach() for t in layer.arguments()[:4]], "arguments": arguments}
    torch.save({**case, "expected": expected.detach(), "gradient": live.grad}, tmp_path / "case.pt")
    printed = alone(f"""
import pathlib, sys, torch
from kernels import get_local_kernel
kernel = get_local_kernel(pathlib.Path({str(repo / "build" / build)!r}))
case = torch.load({str(tmp_path / "case.pt")!r})
x = case["x"].requires_grad_()
for backend in ["auto", *kernel.available_backends()]:
    x.grad = None
    y = kernel.block_sparse_linear(x, *case["layer"], **case["arguments"], backend=backend)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), case["expected"])
    torch.testing.assert_close(x.grad, case["gradient"])
assert not {{"hf_blockprune", "transformers"}} & set(sys.modules)
print(*kernel.available_backends())
""", TRITON_INTERPRET="1")  # fmt: skip
    assert {"reference", "dense", "triton"} <= set(printed)
    assert ("cpu" in printed) == (build in CPU)


def test_the_best_build_for_this_machine_is_taken(repo):
    kernel = kernels.get_local_kernel(repo, backend="cpu")
    assert Path(kernel.__file__).parent.name == (CPU or ["torch-cpu"])[0]
    mask = torch.rand(2, 3) < 0.5
    weight = torch.randn(32, 48)
    packed = kernel.pack(weight, mask, (16, 16))
    x = torch.randn(4, 48)
    whole = weight * mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
    torch.testing.assert_close(kernel.block_sparse_linear(x, *packed, out_features=32), x @ whole.T)


def test_each_build_has_an_op_of_its_own(repo, layer):
    """Several builds, and the package, in one process."""
    loaded = [kernels.get_local_kernel(repo / "build" / build) for build in BUILDS]
    assert len({kernel.__name__ for kernel in loaded}) == len(BUILDS)
    x = torch.randn(3, 80)
    for kernel in loaded:
        with torch.inference_mode():
            y = kernel.block_sparse_linear(x, *layer.arguments()[:4], out_features=48)
        torch.testing.assert_close(y, layer(x).detach())
        op = getattr(torch.ops, kernel.__name__)
        assert op.block_sparse_linear is not torch.ops.blockprune.block_sparse_linear
        assert vars(op)["backend_registry"] is not vars(torch.ops.blockprune)["backend_registry"]


def test_the_layer_replaces_ours(repo):
    printed = alone(f"""
import pathlib, torch
import kernels
from hf_blockprune import BlockSparseLinear
kernels.replace_kernel_forward_from_hub(BlockSparseLinear, "BlockSparseLinear")
layer = BlockSparseLinear.from_dense(torch.nn.Linear(32, 32), torch.eye(2).bool(), (16, 16))
x = torch.randn(3, 32)
expected = layer(x)
layers = kernels.LocalLayerRepository(pathlib.Path({str(repo)!r}), layer_name="BlockSparseLinear")
mode = kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE
with kernels.use_kernel_mapping({{"BlockSparseLinear": {{"cpu": layers}}}}):
    layer = kernels.kernelize(layer, mode=mode, device="cpu")
print(layer.forward.__func__.__module__)
torch.testing.assert_close(layer(x), expected)
torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), expected)
""")
    assert printed[0].startswith("_hf_blockprune_kernels_cpu_")


def test_nothing_is_overwritten_and_nothing_left_out(repo, tmp_path):
    for arguments, message in (([repo], "exists"), ([tmp_path / "new", "--library", "no.so"], "no file")):
        done = subprocess.run([*SCRIPT, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "new").exists()
