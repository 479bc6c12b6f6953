"""Cycles of a systolic array, dense and block-sparse, as closed forms over folds.

A fold is one filling of the array: with stationary weights (WS) a tile of rows inputs x cols outputs stays and tokens
stream by; with stationary outputs (OS) a tile of rows tokens x cols outputs stays and input features stream by; with
stationary inputs (IS) a tile of rows inputs x cols tokens stays and outputs stream by. Counts are those of SCALE-Sim
(arXiv 1811.02883; version 3.0.0), whose last cycle has the number of cycles less one.

Removed weights save what their fold would have taken: whole folds (WS), or the features (OS) and outputs (IS) that a
fold would have streamed. Blocks need not have the array's size: what counts is which weights of a tile are kept.
"""

import heapq
from typing import NamedTuple

import numpy as np

DATAFLOWS = ("ws", "os", "is")


class Fold(NamedTuple):
    """One filling of the array.

    Attributes:
        streamed: tokens (WS), features (OS) or outputs (IS) that pass by.
        latency: cycles from its first to its last.
        interval: cycles after which the next fold may begin where folds overlap.
    """

    streamed: int
    latency: int
    interval: int


def fold_of(streamed: int, *, rows: int, cols: int, dataflow: str) -> Fold:
    """The cycles of a fold; stationary tiles take `rows` cycles to load before anything streams."""
    latency = streamed + rows + cols - 2 + (0 if dataflow == "os" else rows)
    return Fold(streamed, latency, max(streamed, rows))


def folds(tokens: int, kept: np.ndarray, *, rows: int, cols: int, dataflow: str) -> list[Fold]:
    """The folds of a Linear.

    Args:
        tokens: M.
        kept: bool [out_features, in_features], True where a weight is kept; any True in a tile keeps it.
        rows, cols: of the array.
        dataflow: "ws", "os" or "is".

    Raises:
        ValueError: unknown dataflow.
    """
    if dataflow == "ws":
        tiles = any_in_tiles(kept, cols, rows)
        counts = [tokens] * int(tiles.sum())
    elif dataflow == "os":
        features = any_in_tiles(kept, cols, 1).sum(1)
        counts = [int(count) for count in features if count for _ in range(-(-tokens // rows))]
    elif dataflow == "is":
        outputs = any_in_tiles(kept, 1, rows).sum(0)
        counts = [int(count) for count in outputs if count for _ in range(-(-tokens // cols))]
    else:
        raise ValueError(f"unknown dataflow {dataflow!r}; choose one of {DATAFLOWS}")
    return [fold_of(count, rows=rows, cols=cols, dataflow=dataflow) for count in counts]


def any_in_tiles(kept: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bool [tiles down, tiles across]: whether a tile holds any True; tiles at the edges may be cut off."""
    down, across = -(-kept.shape[0] // height), -(-kept.shape[1] // width)
    padded = np.zeros((down * height, across * width), dtype=bool)
    padded[: kept.shape[0], : kept.shape[1]] = kept
    return np.asarray(padded.reshape(down, height, across, width).any(axis=(1, 3)))


def makespan(work: list[Fold], *, arrays: int = 1, overlap: bool = False) -> int:
    """Cycles until all folds are done: the longest first, each on the array that is free first.

    Args:
        work: folds.
        arrays: number of arrays.
        overlap: whether an array loads the next fold while it still works on one (double buffering).
    """
    free = [(0, array) for array in range(arrays)]
    end = 0
    for fold in sorted(work, key=lambda fold: -fold.latency):
        start, array = heapq.heappop(free)
        heapq.heappush(free, (start + (fold.interval if overlap else fold.latency), array))
        end = max(end, start + fold.latency)
    return max(end - 1, 0)


def block_sparse_cycles(
    tokens: int,
    mask: np.ndarray,
    *,
    rows: int,
    cols: int,
    dataflow: str,
    overlap: bool = False,
    arrays: int = 1,
    block_shape: tuple[int, int] | None = None,
    shape: tuple[int, int] | None = None,
) -> int:
    """Cycles of a block-sparse Linear.

    Args:
        tokens: M.
        mask: bool [block_rows, block_cols], outputs down and inputs across.
        rows, cols: of the array.
        dataflow: "ws", "os" or "is".
        overlap: double buffering.
        arrays: how many work side by side.
        block_shape: (outputs, inputs) of a block; (cols, rows), a whole array, by default.
        shape: (out_features, in_features) where blocks do not divide it.

    Example:
        >>> block_sparse_cycles(197, np.ones((1, 11), dtype=bool), rows=32, cols=32, dataflow="os")
        2897
    """
    kept = weights_kept(np.asarray(mask, dtype=bool), block_shape or (cols, rows), shape)
    work = folds(tokens, kept, rows=rows, cols=cols, dataflow=dataflow)
    return makespan(work, arrays=arrays, overlap=overlap)


def weights_kept(mask: np.ndarray, block_shape: tuple[int, int], shape: tuple[int, int] | None = None) -> np.ndarray:
    """A mask of blocks as a mask of weights [out_features, in_features]."""
    full = mask.repeat(block_shape[0], 0).repeat(block_shape[1], 1)
    return full if shape is None else full[: shape[0], : shape[1]]


def dense_cycles(
    m: int,
    k: int,
    n: int,
    *,
    rows: int,
    cols: int,
    dataflow: str,
    overlap: bool = False,
    arrays: int = 1,
) -> int:
    """Cycles of a dense product of [m, k] with [k, n].

    Example:
        >>> dense_cycles(197, 768, 3072, rows=32, cols=32, dataflow="ws")
        670463
    """
    streamed, down, across = {"ws": (m, k, n), "os": (k, m, n), "is": (n, k, m)}.get(dataflow, (0, 0, 0))
    if not streamed:
        raise ValueError(f"unknown dataflow {dataflow!r}; choose one of {DATAFLOWS}")
    fold = fold_of(streamed, rows=rows, cols=cols, dataflow=dataflow)
    each = -(-(-(-down // rows) * -(-across // cols)) // arrays)  # all folds are alike
    return (each - 1) * (fold.interval if overlap else fold.latency) + fold.latency - 1
