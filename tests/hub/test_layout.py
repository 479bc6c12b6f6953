"""The block-sparse format: what goes in comes out, and what breaks a rule is refused by name."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_blockprune.hub.blockprune_layout import (
    BlockSparseFormatError,
    block_mask,
    block_rows_of,
    check_indices,
    check_shapes,
    grid_shape,
    pack,
    unpack,
)

INT32_EDGES = (-(2**31), 2**31 - 1)


@st.composite
def masked_matrices(draw):
    """(matrix, mask, block shape), with rows of blocks that are empty, full or mixed."""
    shape = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    block_shape = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rows, cols = (-(-size // block) for size, block in zip(shape, block_shape, strict=True))
    row_of_blocks = st.one_of(
        st.just([False] * cols), st.just([True] * cols), st.lists(st.booleans(), min_size=cols, max_size=cols)
    )
    mask = draw(st.lists(row_of_blocks, min_size=rows, max_size=rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return torch.randn(shape, generator=generator), torch.tensor(mask), block_shape


def entry_mask(mask, shape, block_shape):
    return torch.kron(mask, torch.ones(block_shape, dtype=torch.bool))[: shape[0], : shape[1]]


@settings(deadline=None, max_examples=150)
@given(masked_matrices())
def test_unpack_restores_kept_blocks_and_zeroes_the_rest(case):
    matrix, mask, block_shape = case
    packed = pack(matrix, mask, block_shape)
    expected = torch.where(entry_mask(mask, matrix.shape, block_shape), matrix, 0.0)
    assert torch.equal(unpack(packed, *matrix.shape), expected)
    assert torch.equal(block_mask(packed, mask.shape[1]), mask)


@settings(deadline=None, max_examples=100)
@given(masked_matrices())
def test_pack_stores_kept_blocks_row_by_row_with_zeros_past_the_edge(case):
    matrix, mask, (rows, cols) = case
    kept = [(i, j) for i in range(mask.shape[0]) for j in range(mask.shape[1]) if mask[i, j]]
    padded = torch.zeros(mask.shape[0] * rows, mask.shape[1] * cols)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    packed = pack(matrix, mask, (rows, cols))
    assert packed.weight.shape == (len(kept), rows, cols)
    for block, (i, j) in zip(packed.weight, kept, strict=True):
        assert torch.equal(block, padded[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols])
    assert packed.col_indices.tolist() == [j for _, j in kept]
    assert block_rows_of(packed.crow_indices, len(kept)).tolist() == [i for i, _ in kept]
    assert packed.crow_indices.tolist() == [sum(i < row for i, _ in kept) for row in range(mask.shape[0] + 1)]


@settings(deadline=None, max_examples=50)
@given(masked_matrices())
def test_what_pack_writes_passes_the_checks(case):
    matrix, mask, block_shape = case
    packed = pack(matrix, mask, block_shape)
    check_indices("layer", packed.crow_indices, packed.col_indices, mask.shape[1])
    check_shapes(
        "layer",
        {name: tuple(tensor.shape) for name, tensor in packed._asdict().items()},
        nnz_blocks=int(mask.sum()),
        out_features=matrix.shape[0],
        in_features=matrix.shape[1],
        block_shape=block_shape,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_survives_the_round_trip(dtype):
    matrix = torch.randn(6, 9).to(dtype)
    packed = pack(matrix, torch.ones(2, 3, dtype=torch.bool), (4, 4))
    assert packed.weight.dtype == dtype
    assert (packed.crow_indices.dtype, packed.col_indices.dtype) == (torch.int32, torch.int32)
    assert torch.equal(unpack(packed, 6, 9), matrix)


def test_pack_does_not_share_memory_with_the_matrix():
    matrix = torch.ones(4, 4)
    packed = pack(matrix, torch.ones(1, 1, dtype=torch.bool), (4, 4))
    matrix.zero_()
    assert torch.equal(packed.weight, torch.ones(1, 4, 4))


@pytest.mark.parametrize(
    ("shape", "block_shape", "expected"),
    [((64, 48), (16, 16), (4, 3)), ((65, 49), (16, 16), (5, 4)), ((3, 5), (64, 1), (1, 5)), ((7, 7), (5, 3), (2, 3))],
)
def test_grid_counts_partly_filled_edge_blocks(shape, block_shape, expected):
    assert grid_shape(*shape, block_shape) == expected


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 2, dtype=torch.bool),
        torch.ones(3, 3, dtype=torch.bool),
        torch.ones(6, dtype=torch.bool),
        torch.ones(2, 3),
    ],
    ids=["too narrow", "too tall", "flat", "not bool"],
)
def test_pack_refuses_a_mask_that_does_not_fit(mask):
    with pytest.raises(BlockSparseFormatError, match=r"^mask: expected bool \(2, 3\)"):
        pack(torch.ones(6, 9), mask, (4, 4))


# A 40x50 matrix in 16x16 blocks: a 3x4 grid.
GOOD_SHAPES = {"weight": (5, 16, 16), "crow_indices": (4,), "col_indices": (5,)}


def check_40x50(shapes, nnz_blocks=5):
    check_shapes("layer", shapes, nnz_blocks=nnz_blocks, out_features=40, in_features=50, block_shape=(16, 16))


@pytest.mark.parametrize("nnz_blocks", [0, 5, 12])
def test_shapes_that_follow_from_the_sizes_pass(nnz_blocks):
    check_40x50({"weight": (nnz_blocks, 16, 16), "crow_indices": (4,), "col_indices": (nnz_blocks,)}, nnz_blocks)


@pytest.mark.parametrize("name", list(GOOD_SHAPES))
def test_a_missing_tensor_is_named(name):
    shapes = {key: shape for key, shape in GOOD_SHAPES.items() if key != name}
    with pytest.raises(BlockSparseFormatError, match=rf"^layer\.{name}: missing"):
        check_40x50(shapes)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("weight", (4, 16, 16)),
        ("weight", (5, 16, 8)),
        ("weight", (5, 8, 16)),
        ("weight", (5, 256)),
        ("weight", (40, 50)),
        ("crow_indices", (3,)),
        ("crow_indices", (5,)),
        ("crow_indices", (4, 1)),
        ("crow_indices", ()),
        ("col_indices", (4,)),
        ("col_indices", (6,)),
        ("col_indices", (1, 5)),
    ],
    ids=str,
)
def test_a_wrong_shape_is_named(name, shape):
    with pytest.raises(BlockSparseFormatError, match=rf"^layer\.{name}: shape"):
        check_40x50(GOOD_SHAPES | {name: shape})


@pytest.mark.parametrize("nnz_blocks", [-1, 13, 2**40])
def test_an_impossible_number_of_blocks_is_refused_even_where_the_tensors_agree(nnz_blocks):
    shapes = {"weight": (nnz_blocks, 16, 16), "crow_indices": (4,), "col_indices": (nnz_blocks,)}
    with pytest.raises(BlockSparseFormatError, match=rf"^layer: {nnz_blocks} kept blocks declared.*12 blocks"):
        check_40x50(shapes, nnz_blocks)


GOOD_CROW, GOOD_COL, BLOCK_COLS = [0, 2, 2, 4], [0, 2, 1, 2], 3


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def test_good_indices_pass():
    check_indices("layer", int32(GOOD_CROW), int32(GOOD_COL), BLOCK_COLS)


@pytest.mark.parametrize(
    ("crow", "col", "tensor", "rule"),
    [
        (torch.tensor(GOOD_CROW), int32(GOOD_COL), "crow_indices", "int32"),
        (int32(GOOD_CROW).float(), int32(GOOD_COL), "crow_indices", "int32"),
        (int32(GOOD_CROW), torch.tensor(GOOD_COL), "col_indices", "int32"),
        (int32([1, 2, 2, 4]), int32(GOOD_COL), "crow_indices", "start at 0"),
        (int32([-1, 2, 2, 4]), int32(GOOD_COL), "crow_indices", "start at 0"),
        (int32([0, 2, 2, 3]), int32(GOOD_COL), "crow_indices", "end at 4"),
        (int32([0, 2, 2, 5]), int32(GOOD_COL), "crow_indices", "end at 4"),
        (int32([0, 3, 2, 4]), int32(GOOD_COL), "crow_indices", "not decrease"),
        (int32([0, 5, 5, 4]), int32(GOOD_COL), "crow_indices", "not decrease"),
        (int32([0, -2, 2, 4]), int32(GOOD_COL), "crow_indices", "not decrease"),
        (int32(GOOD_CROW), int32([-1, 2, 1, 2]), "col_indices", r"\[0, 3\)"),
        (int32(GOOD_CROW), int32([0, 2, 1, 3]), "col_indices", r"\[0, 3\)"),
        (int32(GOOD_CROW), int32([0, 2**31 - 1, 1, 2]), "col_indices", r"\[0, 3\)"),
        (int32(GOOD_CROW), int32([0, 0, 1, 2]), "col_indices", "strictly increase"),
        (int32(GOOD_CROW), int32([0, 2, 2, 1]), "col_indices", "strictly increase"),
    ],
    ids=[
        "crow int64",
        "crow float",
        "col int64",
        "crow starts late",
        "crow starts below 0",
        "crow ends early",
        "crow ends late",
        "crow decreases",
        "crow overshoots",
        "crow negative inside",
        "col negative",
        "col past the last",
        "col huge",
        "col twice",
        "col decreasing",
    ],
)
def test_each_broken_index_rule_is_named(crow, col, tensor, rule):
    with pytest.raises(BlockSparseFormatError, match=rf"^layer\.{tensor}: .*{rule}"):
        check_indices("layer", crow, col, BLOCK_COLS)


def rules_hold(crow, col, block_cols):
    """The format's rules, spelt out one by one over plain lists."""
    return (
        crow[0] == 0
        and crow[-1] == len(col)
        and all(a <= b for a, b in pairwise(crow))
        and all(0 <= c < block_cols for c in col)
        and all(a < b for start, end in pairwise(crow) for a, b in pairwise(col[start:end]))
    )


@st.composite
def index_lists(draw):
    """(crow, col, block_cols): right ones with up to two entries changed, or wholly random ones."""
    block_cols = draw(st.integers(1, 4))
    anything = st.integers(-1, 6) | st.sampled_from(INT32_EDGES)
    if draw(st.booleans()):
        return (
            draw(st.lists(anything, min_size=1, max_size=5)),
            draw(st.lists(anything, max_size=6)),
            block_cols,
        )
    rows = draw(st.lists(st.sets(st.integers(0, block_cols - 1)), max_size=4))
    crow = [sum(map(len, rows[:i])) for i in range(len(rows) + 1)]
    col = [c for row in rows for c in sorted(row)]
    for indices in draw(st.lists(st.sampled_from([crow, col]), max_size=2)):
        if indices:
            indices[draw(st.integers(0, len(indices) - 1))] = draw(anything)
    return crow, col, block_cols


@settings(deadline=None, max_examples=600)
@given(index_lists())
def test_check_indices_accepts_exactly_what_the_rules_allow(case):
    crow, col, block_cols = case
    try:
        check_indices("layer", int32(crow), int32(col), block_cols)
        accepted = True
    except BlockSparseFormatError:
        accepted = False
    assert accepted == rules_hold(crow, col, block_cols)
