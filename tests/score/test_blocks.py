"""Block arithmetic against plain loops, with blocks that do not divide the matrix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_blockprune import ConfigError
from hf_blockprune.hub import blockprune_layout
from hf_blockprune.score.blocks import block_sizes, block_sums, check_block_fits, expand_mask, grid_shape

SIZES = st.integers(1, 9)
SHAPES = st.tuples(SIZES, SIZES)
SEEDS = st.integers(0, 1000)


def block_of(position, block_shape):
    return position[0] // block_shape[0], position[1] // block_shape[1]


def positions(shape):
    return [(i, j) for i in range(shape[0]) for j in range(shape[1])]


def random_matrix(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(shape=SHAPES, block_shape=SHAPES)
def test_grid_covers_the_matrix_and_no_more(shape, block_shape):
    rows, cols = grid_shape(shape, block_shape)
    assert {block_of(p, block_shape) for p in positions(shape)} == set(positions((rows, cols)))
    assert blockprune_layout.grid_shape(*shape, block_shape) == (rows, cols)


@settings(deadline=None)
@given(shape=SHAPES, block_shape=SHAPES, leading=st.lists(st.integers(1, 3), max_size=2), seed=SEEDS)
def test_block_sums_against_loops(shape, block_shape, leading, seed):
    matrix = random_matrix(seed, *leading, *shape)
    expected = torch.zeros(*leading, *grid_shape(shape, block_shape), dtype=torch.float64)
    for i, j in positions(shape):
        block_row, block_col = block_of((i, j), block_shape)
        expected[..., block_row, block_col] += matrix[..., i, j]
    torch.testing.assert_close(block_sums(matrix, block_shape), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(shape=SHAPES, block_shape=SHAPES)
def test_block_sizes_against_loops(shape, block_shape):
    expected = torch.zeros(grid_shape(shape, block_shape), dtype=torch.float64)
    for position in positions(shape):
        expected[block_of(position, block_shape)] += 1
    sizes = block_sizes(shape, block_shape)
    assert sizes.dtype == torch.float64
    assert torch.equal(sizes, expected)
    assert sizes.sum() == math.prod(shape)


@settings(deadline=None)
@given(shape=SHAPES, block_shape=SHAPES, seed=SEEDS)
def test_expand_mask_against_loops(shape, block_shape, seed):
    mask = random_matrix(seed, *grid_shape(shape, block_shape)) > 0
    full = expand_mask(mask, shape, block_shape)
    assert full.shape == shape
    assert full.dtype == torch.bool
    for position in positions(shape):
        assert full[position] == mask[block_of(position, block_shape)]


@settings(deadline=None)
@given(shape=SHAPES, block_shape=SHAPES, seed=SEEDS)
def test_expanded_mask_is_what_the_stored_format_keeps(shape, block_shape, seed):
    """The two halves of the package cut matrices in the same way."""
    matrix = random_matrix(seed, *shape)
    mask = random_matrix(seed + 1, *grid_shape(shape, block_shape)) > 0
    packed = blockprune_layout.pack(matrix, mask, block_shape)
    assert torch.equal(blockprune_layout.unpack(packed, *shape), matrix * expand_mask(mask, shape, block_shape))


@settings(deadline=None)
@given(shape=SHAPES, block_shape=SHAPES)
def test_only_blocks_larger_than_the_matrix_are_refused(shape, block_shape):
    if block_shape[0] <= shape[0] and block_shape[1] <= shape[1]:
        assert check_block_fits("layer.0", shape, block_shape) is None
        return
    with pytest.raises(ConfigError, match=r"^block_shape: .* is larger than layer\.0 .*choose a smaller block"):
        check_block_fits("layer.0", shape, block_shape)
