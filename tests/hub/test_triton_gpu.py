"""What only a GPU can show: graphs, streams without waits, long tensors, and the shapes of real models."""

import pytest
import torch
from torch import nn

from hf_blockprune import BlockPruneConfig, micro_batch, sparsify
from hf_blockprune.hub.blockprune_linear import BlockSparseLinear
from hf_blockprune.model.targets import find_targets
from hf_blockprune.score.blocks import grid_shape
from tests.conftest import tiny_model
from tests.hub.test_ops import MAX_RELATIVE_ERROR, shape_id

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_CACHE", str(tmp_path))


def layer_of(out_features, in_features, block_shape, dtype, density=0.5):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(grid_shape((out_features, in_features), block_shape), generator=generator) < density
    linear = nn.Linear(in_features, out_features)
    return BlockSparseLinear.from_dense(linear, mask, block_shape).to("cuda", dtype)


def sparse_model(**changes):
    model = tiny_model(**changes)
    generator = torch.Generator().manual_seed(0)
    targets = find_targets(model, BlockPruneConfig(block_shape=(16, 16)))
    masks = {
        name: torch.rand(grid_shape(tuple(linear.weight.shape), (16, 16)), generator=generator) < 0.5
        for name, linear in targets.items()
    }
    return sparsify(model, masks, (16, 16)).cuda().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_shape", [(16, 16), (32, 32), (64, 32), (64, 1), (32, 4), (128, 64)], ids=shape_id)
@pytest.mark.parametrize(("out_features", "in_features"), [(768, 768), (3072, 768), (768, 3072)])
@pytest.mark.parametrize("tokens", [197, 3152])
def test_shapes_of_real_models(monkeypatch, out_features, in_features, block_shape, dtype, tokens):
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", "triton")
    layer = layer_of(out_features, in_features, block_shape, dtype)
    x = torch.randn(tokens, in_features, device="cuda", dtype=dtype)
    with torch.no_grad():
        expected = layer.to_dense().double()(x.double())
        error = (layer(x).double() - expected).norm() / expected.norm()
    assert error < MAX_RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("block_shape", [(64, 32), (64, 1)], ids=shape_id)
def test_nothing_waits_for_the_device_once_a_layer_is_known(monkeypatch, block_shape):
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", "triton")
    layer = layer_of(768, 768, block_shape, torch.bfloat16)
    x = torch.randn(197, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_recorded_in_a_graph(monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", "triton")
    layer = layer_of(768, 768, (64, 32), torch.bfloat16)
    x = torch.randn(197, 768, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_models(mode):
    torch._dynamo.reset()
    model = sparse_model()
    pixels = torch.randn(5, 3, 32, 32, device="cuda")
    with torch.inference_mode():
        expected = model(pixel_values=pixels).logits
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(3):
            torch.testing.assert_close(compiled(pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-4)


def test_auto_chooses_a_backend_and_models_run_in_parts():
    model = sparse_model()
    pixels = torch.randn(20, 3, 32, 32, device="cuda")
    with torch.inference_mode():
        expected = model.cpu()(pixel_values=pixels.cpu()).logits
        torch.testing.assert_close(model.cuda()(pixel_values=pixels).logits.cpu(), expected, rtol=1e-4, atol=1e-4)
        in_parts = micro_batch(model)(pixel_values=pixels).logits.cpu()
        torch.testing.assert_close(in_parts, expected, rtol=1e-4, atol=1e-4)


def test_more_than_two_to_the_31_elements(monkeypatch):
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", "triton")
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GB of memory")
    layer = layer_of(768, 768, (64, 32), torch.bfloat16)
    tokens = (1 << 31) // 768 + 1000
    x = torch.randn(tokens, 768, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y = layer(x)[-500:].double()
        expected = layer.to_dense().double()(x[-500:].double())
    assert (y - expected).norm() / expected.norm() < MAX_RELATIVE_ERROR[torch.bfloat16]
