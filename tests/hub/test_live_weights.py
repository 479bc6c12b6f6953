"""Whoever writes to a layer's tensors, by whatever way: the next product is that of what they hold then."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoModelForImageClassification

from hf_blockprune.hub.blockprune_backends import available_backends, choose_backend
from hf_blockprune.hub.blockprune_layout import BlockSparseFormatError
from hf_blockprune.hub.blockprune_linear import BlockSparseLinear
from hf_blockprune.hub.blockprune_quantizer import sparsify

from ..conftest import tiny_model
from ..test_layerwise import logits_of, random_masks
from .test_ops import MAX_RELATIVE_ERROR

OUT, IN = 96, 80
BLOCK_SHAPES = [(16, 16), (8, 8), (12, 20), (1, 1), (32, 64)]
# Ways to multiply all weights by a number, as tools do it.
WRITES = {
    "data": lambda p, f: p.data.mul_(f),
    "copied into data": lambda p, f: p.data.copy_(p.data * f),
    "new data": lambda p, f: setattr(p, "data", p.data * f),
    "numpy": lambda p, f: p.data.float().numpy().__imul__(f) if p.dtype == torch.float32 else p.data.mul_(f),
    "detached": lambda p, f: p.detach().mul_(f),
    "foreach": lambda p, f: torch._foreach_mul_([p.data], f),
    "set": lambda p, f: p.data.set_((p.data * f).contiguous()) if p.numel() else None,
}


def layer_of(block_shape, density, dtype):
    torch.manual_seed(0)
    grid = -(-OUT // block_shape[0]), -(-IN // block_shape[1])
    mask = torch.rand(grid) < density
    return BlockSparseLinear.from_dense(nn.Linear(IN, OUT).to(dtype), mask, block_shape)


def right(layer, x):
    """In double precision, from the stored blocks one by one."""
    dense = torch.zeros(OUT, IN, dtype=torch.float64)
    rows, cols = layer.block_shape
    crow, col = layer.crow_indices.tolist(), layer.col_indices.tolist()
    for row in range(len(crow) - 1):
        for block in range(crow[row], crow[row + 1]):
            place = dense[row * rows : (row + 1) * rows, col[block] * cols : (col[block] + 1) * cols]
            place.copy_(layer.weight.detach()[block, : place.shape[0], : place.shape[1]].double())
    return x.double() @ dense.T + layer.bias.detach().double()


def assert_right(layer, x):
    expected = right(layer, x)
    error = torch.linalg.vector_norm(layer(x).detach().double() - expected)
    assert error <= MAX_RELATIVE_ERROR[x.dtype] * torch.linalg.vector_norm(expected)


def usable(name, layer, x):
    try:
        return choose_backend(x, layer.arguments(), name) == name
    except ValueError:
        return False


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", *available_backends()])
def test_every_write_is_seen(backend, block_shape, density, dtype, inference, monkeypatch):
    monkeypatch.delenv("BLOCKPRUNE_BACKEND", raising=False)
    layer, x = layer_of(block_shape, density, dtype), torch.randn(7, IN).to(dtype)
    if backend != "auto":
        if not usable(backend, layer, x):
            return  # which is refused by name: tested with the backends
        monkeypatch.setenv("BLOCKPRUNE_BACKEND", backend)
    layer.requires_grad_(not inference)
    for write in WRITES.values():
        assert_right(layer, x)
        for parameter in layer.parameters():
            write(parameter, 1.5)
    assert_right(layer, x)


@pytest.mark.parametrize("backend", ["dense", "cpu", "reference"])
@pytest.mark.parametrize("block_shape", [(16, 16), (8, 8), (12, 20)], ids=str)
def test_indices_that_are_written_through_data_count(backend, block_shape, monkeypatch):
    layer, x = layer_of(block_shape, 0.5, torch.float32), torch.randn(7, IN)
    if not usable(backend, layer, x):
        return
    monkeypatch.setenv("BLOCKPRUNE_BACKEND", backend)
    assert_right(layer, x)
    free = BlockSparseLinear.from_dense(nn.Linear(IN, OUT), layer.mask().flip(0, 1), block_shape)
    layer.crow_indices.data.copy_(free.crow_indices)
    layer.col_indices.data.copy_(free.col_indices)
    assert_right(layer, x)
    if backend != "reference":  # which torch itself keeps from reading elsewhere
        layer.col_indices.data[0] = 10**6
        with pytest.raises(BlockSparseFormatError, match="col_indices"):
            layer(x)


def test_averages_that_are_swapped_in_and_out(monkeypatch):
    """As evaluation with averaged weights does it, on the whole model and beside its dense form."""
    monkeypatch.delenv("BLOCKPRUNE_BACKEND", raising=False)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = sparsify(tiny_model(), random_masks(tiny_model()), (8, 8))
    first = logits_of(model, pixels)
    kept = [p.data.clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 0.9)
    dense = copy.deepcopy(model).dequantize()
    torch.testing.assert_close(logits_of(model, pixels), logits_of(dense, pixels), rtol=1e-4, atol=1e-4)
    for parameter, value in zip(model.parameters(), kept, strict=True):
        parameter.data.copy_(value)
    torch.testing.assert_close(logits_of(model, pixels), first, rtol=1e-6, atol=1e-6)


def test_weights_are_contiguous_whatever_happened_to_the_model(tmp_path):
    model = sparsify(tiny_model(), random_masks(tiny_model()), (8, 8))
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    for each in (model, loaded, copy.deepcopy(loaded), copy.deepcopy(loaded).to(torch.bfloat16)):
        assert all(value.is_contiguous() for value in each.state_dict().values())


def test_tools_that_flatten_parameters_work(tmp_path):
    model = sparsify(tiny_model(), random_masks(tiny_model()), (8, 8))
    pixels = torch.randn(2, 3, 32, 32)
    expected = logits_of(model, pixels)
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    vector = parameters_to_vector(model.parameters())
    with torch.no_grad():
        vector_to_parameters(vector * 2, model.parameters())
        assert not torch.allclose(logits_of(model, pixels), expected, atol=1e-2)
        vector_to_parameters(vector, model.parameters())
    torch.testing.assert_close(logits_of(model, pixels), expected)
    assert all(len(t.view(-1).view(torch.uint8)) for t in model.state_dict().values() if t.numel())
    model.load_state_dict(load_file(tmp_path / "state.safetensors"))
    torch.testing.assert_close(logits_of(model, pixels), expected)


def test_an_optimizer_that_flattens_gradients_trains():
    layer = layer_of((8, 8), 0.5, torch.float32)
    x, wanted = torch.randn(64, IN), torch.randn(64, OUT)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), wanted)
        loss.backward()
        return loss

    before = closure().item()
    optimizer.step(closure)
    assert closure().item() < 0.9 * before
