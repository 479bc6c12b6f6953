"""Whatever writes into a layer's tensors, however it does so, the next call multiplies with what they hold then."""

import copy
import os
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_blockprune import BlockSparseFormatError, BlockSparseLinear
from hf_blockprune.hub.blockprune_backends import LayerArguments, available_backends, choose_backend
from hf_blockprune.hub.blockprune_layout import pack
from hf_blockprune.hub.blockprune_ops import block_sparse_linear
from tests.hub.test_ops import assert_matches

OUT, IN = 96, 80
BLOCK_SHAPES = [(16, 16), (8, 8), (12, 20), (1, 1), (32, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = [
    name for name in ("auto", *available_backends()) if name != "triton" or os.environ.get("TRITON_INTERPRET") == "1"
]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


def sparse_layer(block_shape=(16, 16), dtype=torch.float32, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(IN, OUT).to(dtype)
    for parameter in linear.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    grid = -(-OUT // block_shape[0]), -(-IN // block_shape[1])
    return BlockSparseLinear.from_dense(linear, torch.rand(grid, generator=generator) < density, block_shape)


def brute_force(layer, x):
    """In double precision, entry by entry of the format."""
    rows, cols = layer.block_shape
    dense = torch.zeros(layer.grid_shape[0] * rows, layer.grid_shape[1] * cols, dtype=torch.float64)
    starts = layer.crow_indices.tolist()
    for row in range(layer.grid_shape[0]):
        for block in range(starts[row], starts[row + 1]):
            col = int(layer.col_indices[block])
            dense[row * rows : (row + 1) * rows, col * cols : (col + 1) * cols] = layer.weight[block].detach().double()
    return x.double() @ dense[:OUT, :IN].T + layer.bias.detach().double()


def tokens(dtype):
    return torch.randn(13, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def call(layer, x, backend):
    return block_sparse_linear(
        x, layer.weight, layer.crow_indices, layer.col_indices, layer.bias, out_features=OUT, backend=backend
    ).detach()


def runs(layer, x, backend):
    try:
        choose_backend(x, layer.arguments(), backend)
    except ValueError:
        return False
    return True


def other_pattern(layer):
    """As many blocks in other places."""
    block_rows, block_cols = layer.grid_shape
    places = torch.randperm(block_rows * block_cols, generator=torch.Generator().manual_seed(2))[: layer.nnz_blocks]
    mask = torch.zeros(block_rows * block_cols, dtype=torch.bool)
    mask[places] = True
    packed = pack(torch.zeros(OUT, IN), mask.view(layer.grid_shape), layer.block_shape)
    layer.crow_indices.data.copy_(packed.crow_indices)
    layer.col_indices.data.copy_(packed.col_indices)


def shift_columns(layer):
    """Rows whose blocks leave room move by one column."""
    for begin, end in pairwise(layer.crow_indices.tolist()):
        if end > begin and layer.col_indices[end - 1] + 1 < layer.grid_shape[1]:
            layer.col_indices.data[begin:end] += 1


def replace_weight(layer):
    layer.weight.data = layer.weight.data * -2


def assign_state(layer):
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["weight"] *= -2
    layer.load_state_dict(state, assign=True)


def write_with_numpy(layer):
    view = layer.weight.detach()
    view = view.view(torch.int16) if view.dtype == torch.bfloat16 else view
    view.numpy()[:1] = 0


CHANGES = {
    "weights scaled": lambda layer: layer.weight.data.mul_(1.5),
    "weights copied into": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),
    "one weight": lambda layer: layer.weight.data.view(-1)[-1:].fill_(50),
    "numpy": write_with_numpy,
    "other storage": replace_weight,
    "state assigned": assign_state,
    "bias": lambda layer: layer.bias.data.add_(3),
    "columns": shift_columns,
    "pattern": other_pattern,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_changes_that_torch_does_not_record_count(backend, block_shape, change):
    tried = 0
    for dtype in DTYPES:
        layer, x = sparse_layer(block_shape, dtype), tokens(dtype)
        if not runs(layer, x, backend):
            continue
        before = call(layer, x, backend)
        assert_matches(before, brute_force(layer, x), dtype)
        change(layer)
        assert_matches(call(layer, x, backend), brute_force(layer, x), dtype)
        tried += 1
    assert tried or backend == "triton"  # which knows block heights of its own


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_layer_that_keeps_all_its_blocks(backend):
    layer, x = sparse_layer(density=1.1), tokens(torch.float32)
    for factor in (1, -3, 0.5):
        layer.weight.data.mul_(factor)
        assert_matches(call(layer, x, backend), brute_force(layer, x), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_copy_and_its_original_go_their_own_ways(backend):
    layer, x = sparse_layer(), tokens(torch.float32)
    call(layer, x, backend)
    twin = copy.deepcopy(layer)
    twin.weight.data.neg_()
    for each in (layer, twin):
        assert_matches(call(each, x, backend), brute_force(each, x), torch.float32)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("reference", "auto", "triton")])
def test_indices_written_behind_torchs_back_are_checked(backend):
    layer, x = sparse_layer(), tokens(torch.float32)
    call(layer, x, backend)
    layer.col_indices.data[-1] = 2**30
    with pytest.raises(BlockSparseFormatError, match="col_indices"):
        call(layer, x, backend)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no interpreter")
@pytest.mark.parametrize("wild", [-(2**31), -1, 5, 2**31 - 1])
@pytest.mark.parametrize("name", ["crow_indices", "col_indices"])
@torch.no_grad()
def test_the_gpu_kernel_reads_nothing_outside_of_its_arrays(name, wild):
    """Where a check would make the host wait: other rows come out right, and every value was read from inside."""
    layer, x = sparse_layer(), tokens(torch.float32)
    expected = call(layer, x, "triton")
    getattr(layer, name).data[-1] = wild
    out = call(layer, x, "triton")
    assert torch.equal(out[:, :-16], expected[:, :-16])
    assert out.isfinite().all()


def test_an_average_of_the_weights_is_swapped_in_and_out():
    layer, x = sparse_layer(), tokens(torch.float32)
    average = [p.detach().clone() * 0.25 for p in layer.parameters()]
    with torch.no_grad():
        trained = layer(x)
        kept = [p.detach().clone() for p in layer.parameters()]
        for values, expected_scale in ((average, 0.25), (kept, 1.0)):
            for parameter, value in zip(layer.parameters(), values, strict=True):
                parameter.data.copy_(value)
            torch.testing.assert_close(layer(x), trained * expected_scale)


@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=str)
def test_parameters_are_contiguous_whatever_becomes_of_a_layer(block_shape):
    layer = sparse_layer(block_shape)
    empty = BlockSparseLinear(IN, OUT, block_shape, layer.nnz_blocks)
    empty.load_state_dict(layer.state_dict())
    converted, twin = copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer)
    for each in (layer, empty, converted, twin, layer.cut()):
        assert all(tensor.is_contiguous() for tensor in each.state_dict().values())


def test_parameters_go_through_a_vector():
    layer, x = sparse_layer(), tokens(torch.float32)
    vector = nn.utils.parameters_to_vector(layer.parameters())
    assert vector.numel() == sum(p.numel() for p in layer.parameters())
    nn.utils.vector_to_parameters(vector * 2, layer.parameters())
    assert_matches(layer(x).detach(), brute_force(layer, x), torch.float32)


def test_a_state_is_stored_as_it_is(tmp_path):
    layer = sparse_layer()
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    for name, tensor in load_file(tmp_path / "layer.safetensors").items():
        assert torch.equal(tensor, layer.state_dict()[name])
    assert layer.weight.detach().view(torch.uint8).numel() == 4 * layer.weight.numel()


def test_an_optimizer_that_flattens_parameters_trains():
    layer, x = sparse_layer(), tokens(torch.float32)
    target = torch.zeros(13, OUT)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=5)

    def loss():
        optimizer.zero_grad()
        value = nn.functional.mse_loss(layer(x), target)
        value.backward()
        return value

    before = loss().item()
    optimizer.step(loss)
    assert loss().item() < before


def test_layouts_of_other_origin_are_read_right():
    layer, x = sparse_layer(), tokens(torch.float32)
    weight = layer.weight.detach().transpose(1, 2).contiguous().transpose(1, 2)
    indices = [torch.stack([t, t], dim=1)[:, 0] for t in (layer.crow_indices, layer.col_indices)]
    assert not weight.is_contiguous()
    for backend in BACKENDS:
        arguments = LayerArguments(weight, *indices, layer.bias.detach(), OUT)
        out = block_sparse_linear(x, *arguments[:4], out_features=OUT, backend=backend)
        assert_matches(out, brute_force(layer, x), torch.float32)
