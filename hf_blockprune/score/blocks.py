"""Cutting matrices into blocks, for the half of the package that decides what to remove."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError


def grid_shape(shape: tuple[int, int], block_shape: tuple[int, int]) -> tuple[int, int]:
    """(block rows, block columns) that cover a matrix of `shape`, counting partly filled edge blocks."""
    return math.ceil(shape[0] / block_shape[0]), math.ceil(shape[1] / block_shape[1])


def block_sums(matrix: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """Sum of each block.

    Args:
        matrix: [..., out_features, in_features].
        block_shape: (rows, cols).

    Returns:
        [..., block_rows, block_cols].

    Example:
        >>> block_sums(torch.ones(3, 4), (2, 2))
        tensor([[4., 4.],
                [2., 2.]])
    """
    rows, cols = block_shape
    height, width = matrix.shape[-2:]
    block_rows, block_cols = grid_shape((height, width), block_shape)
    padded = F.pad(matrix, (0, block_cols * cols - width, 0, block_rows * rows - height))
    return padded.view(*matrix.shape[:-2], block_rows, rows, block_cols, cols).sum(dim=(-3, -1))


def block_sizes(shape: tuple[int, int], block_shape: tuple[int, int]) -> Tensor:
    """Number of matrix entries in each block, float64 [block_rows, block_cols]; edge blocks hold fewer."""
    grid = grid_shape(shape, block_shape)
    height = torch.full((grid[0],), block_shape[0], dtype=torch.float64)
    width = torch.full((grid[1],), block_shape[1], dtype=torch.float64)
    height[-1] = shape[0] - (grid[0] - 1) * block_shape[0]
    width[-1] = shape[1] - (grid[1] - 1) * block_shape[1]
    return height[:, None] * width[None, :]


def expand_mask(mask: Tensor, shape: tuple[int, int], block_shape: tuple[int, int]) -> Tensor:
    """A block mask [block_rows, block_cols] as an entry mask [out_features, in_features]."""
    full = mask.repeat_interleave(block_shape[0], dim=0).repeat_interleave(block_shape[1], dim=1)
    return full[: shape[0], : shape[1]]


def used_units(writer: Tensor, reader: Tensor, block_shape: tuple[int, int], units: int) -> Tensor:
    """Which hidden units of an MLP stay when those without a block on either side are cut; bool [units].

    Units go in groups that are whole blocks on both sides. One group stays where all could go.

    Args:
        writer: the mask of fc1, whose outputs they are.
        reader: the mask of fc2, whose inputs they are.
        block_shape: (rows, cols).
        units: how many there are.
    """
    rows, cols = block_shape
    group = math.lcm(rows, cols)
    made = writer.any(dim=1).repeat_interleave(rows)[:units]
    read = reader.any(dim=0).repeat_interleave(cols)[:units]
    used = F.pad(made | read, (0, -units % group)).view(-1, group).any(dim=1)
    if not used.any():
        used[0] = True
    return used.repeat_interleave(group)[:units]


def check_block_fits(name: str, shape: tuple[int, int], block_shape: tuple[int, int]) -> None:
    """Refuse a block larger than the matrix it should cut.

    Raises:
        ConfigError: naming the layer.
    """
    if block_shape[0] > shape[0] or block_shape[1] > shape[1]:
        raise ConfigError(
            f"block_shape: {block_shape[0]}x{block_shape[1]} is larger than {name} ({shape[0]}x{shape[1]}); "
            "choose a smaller block or list the layer in ignore"
        )
