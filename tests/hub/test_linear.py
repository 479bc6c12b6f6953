"""`BlockSparseLinear` beside the `nn.Linear` it stands in for."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from hf_blockprune import BlockSparseFormatError, BlockSparseLinear

IN, OUT = 40, 56
BLOCK_SHAPES = [(16, 16), (8, 8), (5, 3), (64, 32)]


def entry_mask(mask, block_shape):
    return torch.kron(mask, torch.ones(block_shape, dtype=torch.bool))[:OUT, :IN]


def layers(block_shape=(16, 16), *, bias=True, dtype=torch.float32, seed=0):
    """(block-sparse layer, Linear with the removed blocks set to zero, mask)."""
    torch.manual_seed(seed)
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    mask = torch.rand(-(-OUT // block_shape[0]), -(-IN // block_shape[1])) < 0.5
    mask[0, 0] = True
    sparse = BlockSparseLinear.from_dense(linear, mask, block_shape)
    masked = copy.deepcopy(linear)
    masked.weight.data[~entry_mask(mask, block_shape)] = 0
    return sparse, masked, mask


@pytest.fixture
def sparse():
    return layers()[0]


def shape_id(shape):
    return "x".join(map(str, shape))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=shape_id)
def test_equals_the_masked_linear(block_shape, bias):
    sparse, masked, mask = layers(block_shape, bias=bias)
    x = torch.randn(3, 7, IN)
    torch.testing.assert_close(sparse(x), masked(x))
    assert torch.equal(sparse.mask(), mask)
    assert sparse.nnz_blocks == int(mask.sum())
    assert sparse.density == pytest.approx(mask.float().mean().item())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=shape_id)
def test_to_dense_gives_the_masked_linear_back(block_shape, bias):
    sparse, masked, _ = layers(block_shape, bias=bias)
    dense = sparse.to_dense()
    assert type(dense) is nn.Linear
    assert (dense.in_features, dense.out_features) == (IN, OUT)
    assert dense.state_dict().keys() == masked.state_dict().keys()
    for name, value in dense.state_dict().items():
        assert torch.equal(value, masked.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_and_mode_are_taken_from_the_linear(dtype):
    linear = nn.Linear(IN, OUT, dtype=dtype).eval()
    sparse = BlockSparseLinear.from_dense(linear, torch.ones(4, 3, dtype=torch.bool), (16, 16))
    assert {p.dtype for p in sparse.parameters()} == {dtype}
    assert not sparse.training
    assert not sparse.to_dense().training


def test_the_linear_it_was_made_from_is_left_alone():
    linear = nn.Linear(IN, OUT)
    before = copy.deepcopy(linear.state_dict())
    sparse = BlockSparseLinear.from_dense(linear, torch.ones(4, 3, dtype=torch.bool), (16, 16))
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.zero_()
    for name, value in linear.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("width", [IN - 1, IN + 1, 48], ids=["narrower", "wider", "as wide as the blocks reach"])
def test_inputs_of_another_width_are_refused(sparse, width):
    with pytest.raises((RuntimeError, ValueError)):
        sparse(torch.randn(2, width))


def empty_like(sparse):
    return BlockSparseLinear(IN, OUT, sparse.block_shape, sparse.nnz_blocks, bias=sparse.bias is not None)


def test_state_dict_round_trip(sparse):
    other = empty_like(sparse)
    assert other.load_state_dict(sparse.state_dict()) == ([], [])
    x = torch.randn(5, IN)
    assert torch.equal(other(x), sparse(x))
    assert torch.equal(other.mask(), sparse.mask())


def set_entry(name, index, value):
    def change(state):
        state[name][index] = value

    return change


def widen(name):
    def change(state):
        state[name] = state[name].long()

    return change


BAD_STATES = {
    "col past the last": (set_entry("col_indices", 0, 3), "col_indices"),
    "col negative": (set_entry("col_indices", 0, -1), "col_indices"),
    "crow starts late": (set_entry("crow_indices", 0, 1), "crow_indices"),
    "crow overshoots": (set_entry("crow_indices", 1, 1000), "crow_indices"),
    "crow ends early": (set_entry("crow_indices", -1, 0), "crow_indices"),
}


@pytest.mark.parametrize("bad", BAD_STATES)
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "inside a model"])
def test_bad_indices_are_refused_on_load(sparse, bad, nested):
    change, tensor = BAD_STATES[bad]
    state = copy.deepcopy(sparse.state_dict())
    change(state)
    target = empty_like(sparse)
    if nested:
        target = nn.Sequential(nn.ReLU(), target)
        state = {f"1.{name}": value for name, value in state.items()}
    with pytest.raises(BlockSparseFormatError, match=tensor):
        target.load_state_dict(state)


@pytest.mark.parametrize("name", ["crow_indices", "col_indices"])
def test_indices_of_another_dtype_are_refused_where_they_would_be_assigned(sparse, name):
    state = copy.deepcopy(sparse.state_dict())
    widen(name)(state)
    with pytest.raises(BlockSparseFormatError, match=rf"{name}.*int32"):
        empty_like(sparse).load_state_dict(state, assign=True)


def test_a_pattern_that_is_not_loaded_is_refused(sparse):
    with pytest.raises(BlockSparseFormatError, match="crow_indices"):
        empty_like(sparse).load_state_dict({"weight": sparse.weight, "bias": sparse.bias}, strict=False)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_training_changes_kept_blocks_only(optimizer):
    sparse, _, mask = layers()
    before = sparse.to_dense().weight.detach()
    pattern = sparse.crow_indices.clone(), sparse.col_indices.clone()
    step = optimizer(sparse.parameters(), lr=0.1)
    for _ in range(3):
        step.zero_grad()
        sparse(torch.randn(32, IN)).square().mean().backward()
        step.step()
    after = sparse.to_dense().weight.detach()
    kept = entry_mask(mask, (16, 16))
    assert (after[kept] != before[kept]).all()
    assert not after[~kept].any()
    assert torch.equal(sparse.crow_indices, pattern[0])
    assert torch.equal(sparse.col_indices, pattern[1])


def test_training_follows_the_masked_linear():
    sparse, masked, mask = layers(dtype=torch.float64)
    x, target = torch.randn(64, IN, dtype=torch.float64), torch.randn(64, OUT, dtype=torch.float64)
    for module in (sparse, masked):
        step = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(4):
            step.zero_grad()
            nn.functional.mse_loss(module(x), target).backward()
            if module is masked:
                masked.weight.grad[~entry_mask(mask, (16, 16))] = 0
            step.step()
    torch.testing.assert_close(sparse.to_dense().weight, masked.weight)
    torch.testing.assert_close(sparse.bias, masked.bias)


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_equal_and_independent(sparse, duplicate):
    twin = duplicate(sparse)
    x = torch.randn(5, IN)
    expected = sparse(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(sparse(x), expected)
    bad = copy.deepcopy(sparse.state_dict())
    bad["col_indices"][0] = -1
    with pytest.raises(BlockSparseFormatError, match="col_indices"):
        twin.load_state_dict(bad)


def test_moving_to_a_float_dtype_leaves_the_indices_whole(sparse):
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16
    assert half.crow_indices.dtype == half.col_indices.dtype == torch.int32
    half.check()
    torch.testing.assert_close(
        half(torch.ones(1, IN).bfloat16()).float(), sparse(torch.ones(1, IN)), rtol=0.05, atol=0.05
    )


def test_repr_tells_sizes_and_density():
    sparse = BlockSparseLinear.from_dense(nn.Linear(4, 6), torch.tensor([[True, False]] * 3), (2, 2))
    assert repr(sparse) == (
        "BlockSparseLinear(in_features=4, out_features=6, bias=True, block_shape=(2, 2), density=0.500)"
    )


@pytest.mark.parametrize("nnz_blocks", [-1, 13])
def test_an_impossible_number_of_blocks_is_refused(nnz_blocks):
    with pytest.raises(BlockSparseFormatError, match=rf"nnz_blocks: {nnz_blocks} is not between 0"):
        BlockSparseLinear(IN, OUT, (16, 16), nnz_blocks)


def test_a_layer_without_blocks_gives_its_bias():
    linear = nn.Linear(IN, OUT)
    sparse = BlockSparseLinear.from_dense(linear, torch.zeros(4, 3, dtype=torch.bool), (16, 16))
    assert sparse.density == 0
    assert torch.equal(sparse(torch.randn(3, IN)), linear.bias.expand(3, -1))


def test_a_dense_form_with_outputs_and_inputs_in_their_places():
    sparse = BlockSparseLinear.from_dense(nn.Linear(4, 6), torch.ones(3, 2, dtype=torch.bool), (2, 2))
    rows, cols = torch.tensor([1, 2, 3, 5, 6, 7]), torch.tensor([0, 2, 4, 6])
    dense = sparse.to_dense((8, 7), rows=rows, cols=cols)
    assert (dense.out_features, dense.in_features) == (8, 7)
    x = torch.randn(3, 7)
    torch.testing.assert_close(dense(x)[:, rows], sparse(x[:, cols]))
    assert not dense.weight[[0, 4]].any()
    assert not dense.weight[:, 1::2].any()
    assert not dense.bias[[0, 4]].any()
