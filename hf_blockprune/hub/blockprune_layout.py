"""Block-sparse weight matrices: how they are packed, unpacked and checked.

A weight of shape (out_features, in_features) is cut into blocks of `block_shape = (rows, cols)`. Only the kept
blocks are stored, row by row as in torch's BSR layout:

    weight        [nnz_blocks, rows, cols]   the kept blocks
    crow_indices  [block_rows + 1]  int32    where each block row starts in `weight`
    col_indices   [nnz_blocks]      int32    the block column of each kept block, increasing within a row

Where the block does not divide the matrix, the last block row or column is filled with zeros when packing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# A block may be larger than the matrix, up to this: whoever turns the matrix dense fills up the rest with zeros.
MAX_OVERHANGING_BLOCK = 1024


class BlockSparseFormatError(ValueError):
    """A block-sparse matrix breaks a rule of its format. The message names the tensor and the rule."""


class BackendError(ValueError):
    """What was asked to multiply with a block-sparse matrix is unknown, or cannot do it."""


class PackedWeight(NamedTuple):
    """The three tensors that hold a block-sparse matrix (shapes in the module's docstring)."""

    weight: Tensor
    crow_indices: Tensor
    col_indices: Tensor


def grid_shape(out_features: int, in_features: int, block_shape: tuple[int, int]) -> tuple[int, int]:
    """Number of (block rows, block columns) that cover a matrix, counting partly filled edge blocks."""
    return -(-out_features // block_shape[0]), -(-in_features // block_shape[1])  # floats would round large sizes


def pack(weight: Tensor, mask: Tensor, block_shape: tuple[int, int]) -> PackedWeight:
    """Keep the blocks of a dense matrix that a mask selects.

    Args:
        weight: dense matrix [out_features, in_features].
        mask: bool [block_rows, block_cols], True where a block is kept.
        block_shape: (rows, cols) of a block.

    Raises:
        BlockSparseFormatError: the mask does not fit the matrix.

    Example:
        >>> packed = pack(torch.eye(4), torch.eye(2, dtype=torch.bool), (2, 2))
        >>> packed.weight.shape, packed.crow_indices.tolist(), packed.col_indices.tolist()
        (torch.Size([2, 2, 2]), [0, 1, 2], [0, 1])
    """
    rows, cols = block_shape
    grid = grid_shape(weight.shape[0], weight.shape[1], block_shape)
    if tuple(mask.shape) != grid or mask.dtype != torch.bool:
        raise BlockSparseFormatError(
            f"mask: expected bool {grid} for a {tuple(weight.shape)} matrix in {rows}x{cols} blocks, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    mask = mask.to(weight.device)
    padded = F.pad(weight, (0, grid[1] * cols - weight.shape[1], 0, grid[0] * rows - weight.shape[0]))
    blocks = padded.view(grid[0], rows, grid[1], cols).transpose(1, 2)
    crow = F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)).to(torch.int32)
    col = mask.nonzero()[:, 1].to(torch.int32)
    return PackedWeight(blocks[mask].contiguous(), crow, col)


def block_rows_of(crow_indices: Tensor, nnz_blocks: int) -> Tensor:
    """Block row of each stored block, int64 [nnz_blocks]."""
    # By search, which writes nowhere outside of its result, whatever the indices are.
    blocks = torch.arange(nnz_blocks, dtype=crow_indices.dtype, device=crow_indices.device)
    return torch.searchsorted(crow_indices[1:].contiguous(), blocks, right=True)


def block_mask(packed: PackedWeight, block_cols: int) -> Tensor:
    """The bool mask [block_rows, block_cols] that `pack` was given."""
    mask = torch.zeros(len(packed.crow_indices) - 1, block_cols, dtype=torch.bool, device=packed.col_indices.device)
    mask[block_rows_of(packed.crow_indices, len(packed.col_indices)), packed.col_indices.long()] = True
    return mask


def expand_mask(mask: Tensor, shape: Sequence[int], block_shape: tuple[int, int]) -> Tensor:
    """A block mask [block_rows, block_cols] as an entry mask [out_features, in_features]."""
    full = mask.repeat_interleave(block_shape[0], dim=0).repeat_interleave(block_shape[1], dim=1)
    return full[: shape[0], : shape[1]]


def unpack(packed: PackedWeight, out_features: int, in_features: int) -> Tensor:
    """The dense matrix [out_features, in_features] with zeros where blocks were removed.

    Example:
        >>> dense = torch.arange(6.0).view(2, 3)
        >>> torch.equal(unpack(pack(dense, torch.tensor([[True, True]]), (2, 2)), 2, 3), dense)
        True
    """
    nnz, rows, cols = packed.weight.shape
    grid = grid_shape(out_features, in_features, (rows, cols))
    dense = packed.weight.new_zeros(grid[0] * rows, grid[1] * cols)
    blocks = dense.view(grid[0], rows, grid[1], cols).transpose(1, 2)
    blocks[block_rows_of(packed.crow_indices, nnz), packed.col_indices.long()] = packed.weight
    return dense[:out_features, :in_features].contiguous()


def check_shapes(
    name: str,
    shapes: dict[str, tuple[int, ...]],
    *,
    nnz_blocks: int,
    out_features: int,
    in_features: int,
    block_shape: tuple[int, int],
) -> None:
    """Refuse tensors whose shapes do not follow from the declared sizes; reads no tensor data.

    Args:
        name: the layer, for the message.
        shapes: shape of each of `weight`, `crow_indices`, `col_indices` as found.

    Raises:
        BlockSparseFormatError: naming the first tensor that is missing or has another shape.
    """
    for block_size, size in zip(block_shape, (out_features, in_features), strict=True):
        if not 1 <= block_size <= max(size, MAX_OVERHANGING_BLOCK):
            raise BlockSparseFormatError(
                f"{name}: blocks of {block_shape[0]}x{block_shape[1]} do not fit a {out_features}x{in_features} matrix"
            )
    block_rows, block_cols = grid_shape(out_features, in_features, block_shape)
    if not 0 <= nnz_blocks <= block_rows * block_cols:
        raise BlockSparseFormatError(
            f"{name}: {nnz_blocks} kept blocks declared, but a {out_features}x{in_features} matrix has "
            f"{block_rows * block_cols} blocks of {block_shape[0]}x{block_shape[1]}"
        )
    expected = {
        "weight": (nnz_blocks, *block_shape),
        "crow_indices": (block_rows + 1,),
        "col_indices": (nnz_blocks,),
    }
    for tensor_name, shape in expected.items():
        found = shapes.get(tensor_name)
        if found is None:
            raise BlockSparseFormatError(f"{name}.{tensor_name}: missing from the checkpoint, expected shape {shape}")
        if tuple(found) != shape:
            raise BlockSparseFormatError(
                f"{name}.{tensor_name}: shape {tuple(found)} in the checkpoint, but config.json declares "
                f"{nnz_blocks} kept blocks and so {shape}"
            )


def check_indices(name: str, crow_indices: Tensor, col_indices: Tensor, block_cols: int) -> None:
    """Refuse index tensors that would make a kernel read outside its arrays or count a block twice.

    Raises:
        BlockSparseFormatError: naming the tensor and the rule it breaks.
    """
    for tensor_name, indices in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        if indices.dtype != torch.int32:
            raise BlockSparseFormatError(f"{name}.{tensor_name}: must be int32, got {indices.dtype}")
    # In NumPy, which starts no threads: a process may load a model and fork before it starts any.
    crow, col = crow_indices.detach().cpu().numpy(), col_indices.detach().cpu().numpy()
    if not len(crow) or crow[0] != 0 or crow[-1] != len(col):
        raise BlockSparseFormatError(
            f"{name}.crow_indices: must start at 0 and end at {len(col)}, the number of kept blocks"
        )
    if (crow[1:] < crow[:-1]).any():
        raise BlockSparseFormatError(f"{name}.crow_indices: must not decrease")
    if len(col) and (col.min() < 0 or col.max() >= block_cols):
        raise BlockSparseFormatError(f"{name}.col_indices: every block column must lie in [0, {block_cols})")
    # A row's first block may have any column; every later one must lie to the right of its neighbour.
    increases = col[1:] > col[:-1]
    first = crow[(crow > 0) & (crow < len(col))]
    increases[first - 1] = True
    if not increases.all():
        raise BlockSparseFormatError(f"{name}.col_indices: must strictly increase within a block row")


def check_packed(name: str, packed: PackedWeight, out_features: int, in_features: int) -> None:
    """Refuse tensors that are not a block-sparse matrix of this size; kernels read where indices point to.

    Raises:
        BlockSparseFormatError: naming the tensor and the rule it breaks.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in packed._asdict().items()}
    block_shape = (packed.weight.shape[1], packed.weight.shape[2])
    check_shapes(
        name,
        shapes,
        nnz_blocks=len(packed.weight),
        out_features=out_features,
        in_features=in_features,
        block_shape=block_shape,
    )
    block_cols = grid_shape(out_features, in_features, block_shape)[1]
    check_indices(name, packed.crow_indices, packed.col_indices, block_cols)


class RowOrders(NamedTuple):
    """Two orders to go through block rows, int32 [block_rows] on the indices' device: every block row once.

    Attributes:
        longest_first: rows with more blocks before those with fewer.
        in_order: 0, 1, 2, ...
    """

    longest_first: Tensor
    in_order: Tensor


def row_orders(crow_indices: Tensor) -> RowOrders:
    """The orders of a matrix's block rows."""
    longest_first = crow_indices.diff().argsort(descending=True, stable=True).to(torch.int32)
    return RowOrders(longest_first, torch.arange(len(longest_first), dtype=torch.int32, device=crow_indices.device))
