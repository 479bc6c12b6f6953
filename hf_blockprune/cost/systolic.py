"""Systolic arrays: what a Linear takes on one, analysed in closed form or simulated element by element."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..hub.blockprune_systolic import DATAFLOWS, Fold, any_in_tiles, block_sparse_cycles, dense_cycles, folds, makespan
from .pe_array import ProcessingArray

__all__ = ["Array", "Run", "analyse", "block_sparse_cycles", "dense_cycles", "simulate"]


@dataclass(frozen=True)
class Array:
    """One or several equal arrays of multiply-add elements.

    Args:
        rows, cols: elements of each.
        dataflow: "ws", "os" or "is": what stays in the array, weights, outputs or inputs.
        overlap: whether a fold is loaded while the one before is still worked on (double buffering).
        arrays: how many work side by side.
        sram_elements: numbers that fit into on-chip memory beside what streams; None for any number.

    Raises:
        ValueError: unknown dataflow, or fewer than one of something.
    """

    rows: int
    cols: int
    dataflow: str = "os"
    overlap: bool = False
    arrays: int = 1
    sram_elements: int | None = None

    def __post_init__(self) -> None:
        if self.dataflow not in DATAFLOWS:
            raise ValueError(f"unknown dataflow {self.dataflow!r}; choose one of {DATAFLOWS}")
        for name in ("rows", "cols", "arrays"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Run:
    """What a product took.

    Attributes:
        cycles: until its last sum.
        macs: multiplications, those with zeros inside of kept tiles included.
        utilisation: share of all elements' cycles in which they multiplied.
        sram_reads, sram_writes: numbers that moved between on-chip memory and arrays.
        dram_elements: numbers that moved between arrays' memory and the world.
        y: the product, where it was simulated.
    """

    cycles: int
    macs: int
    utilisation: float
    sram_reads: int
    sram_writes: int
    dram_elements: int
    y: np.ndarray | None = None


@dataclass(frozen=True)
class _Tile:
    """What one fold multiplies: indices of tokens, features and outputs."""

    tokens: np.ndarray
    features: np.ndarray
    outputs: np.ndarray


def analyse(tokens: int, kept: np.ndarray, array: Array) -> Run:
    """What a Linear takes, in closed form.

    Args:
        tokens: M.
        kept: bool [out_features, in_features], True where a weight is kept.
        array: what it runs on.
    """
    work = folds(tokens, kept, rows=array.rows, cols=array.cols, dataflow=array.dataflow)
    cycles = makespan(work, arrays=array.arrays, overlap=array.overlap)
    return _run(cycles, tokens, kept, array)


def simulate(x: np.ndarray, weight: np.ndarray, array: Array, kept: np.ndarray | None = None) -> Run:
    """Multiply on simulated elements, fold by fold, each fold's cycles counted as they pass.

    Args:
        x: [tokens, in_features].
        weight: [out_features, in_features].
        array: what it runs on.
        kept: bool like weight; tiles, features or outputs without any True are left out. All by default.

    Example:
        >>> run = simulate(np.ones((2, 3)), np.ones((4, 3)), Array(2, 2, "os"))
        >>> run.cycles, run.y.tolist()
        (9, [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]])
    """
    kept = np.ones(weight.shape, dtype=bool) if kept is None else kept
    y = np.zeros((len(x), len(weight)))
    work = []
    for tile in _tiles(len(x), kept, array):
        elements = ProcessingArray(array.rows, array.cols)
        part = weight[np.ix_(tile.outputs, tile.features)].T
        y[np.ix_(tile.tokens, tile.outputs)] += elements.run(
            x[np.ix_(tile.tokens, tile.features)], part, array.dataflow
        )
        streamed = len({"ws": tile.tokens, "os": tile.features, "is": tile.outputs}[array.dataflow])
        work.append(Fold(streamed, elements.cycles, max(streamed, array.rows)))
    cycles = makespan(work, arrays=array.arrays, overlap=array.overlap)
    return _run(cycles, len(x), kept, array, y)


def _tiles(tokens: int, kept: np.ndarray, array: Array) -> Iterator[_Tile]:
    """The folds of a product as indices, in no particular order."""
    outputs, inputs = kept.shape
    every = np.arange(tokens)
    if array.dataflow == "ws":
        for out, feature in _pairs(outputs, array.cols, inputs, array.rows):
            if kept[np.ix_(out, feature)].any():
                yield _Tile(every, feature, out)
    elif array.dataflow == "os":
        for token, out in _pairs(tokens, array.rows, outputs, array.cols):
            features = kept[out].any(0).nonzero()[0]
            if len(features):
                yield _Tile(token, features, out)
    else:
        for token, feature in _pairs(tokens, array.cols, inputs, array.rows):
            out = kept[:, feature].any(1).nonzero()[0]
            if len(out):
                yield _Tile(token, feature, out)


def _pairs(first: int, size: int, second: int, other: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every stretch of `size` of `first` with every stretch of `other` of `second`."""
    for a in range(0, first, size):
        for b in range(0, second, other):
            yield np.arange(a, min(a + size, first)), np.arange(b, min(b + other, second))


def _run(cycles: int, tokens: int, kept: np.ndarray, array: Array, y: np.ndarray | None = None) -> Run:
    """Traffic by what folds read and write; sums in progress pass through on-chip memory unless they stay."""
    outputs, inputs = kept.shape
    if array.dataflow == "ws":
        tiles = any_in_tiles(kept, array.cols, array.rows)
        heights, widths = _sizes(outputs, array.cols), _sizes(inputs, array.rows)
        weights = int((tiles * np.outer(heights, widths)).sum())
        written = tokens * int((tiles.sum(1) * heights).sum())
        reads = (
            weights + tokens * int((tiles.sum(0) * widths).sum()) + written - tokens * int(heights[tiles.any(1)].sum())
        )
        passes = int(tiles.any(1).sum())
    elif array.dataflow == "os":
        features = any_in_tiles(kept, array.cols, 1).sum(1)
        heights = _sizes(outputs, array.cols)
        weights = int((features * heights).sum())
        reads = int(features.sum()) * tokens + -(-tokens // array.rows) * weights
        written = tokens * int(heights[features > 0].sum())
        passes = int((features > 0).sum())
    else:
        streamed, widths = any_in_tiles(kept, 1, array.rows).sum(0), _sizes(inputs, array.rows)
        weights = int((streamed * widths).sum())
        written = tokens * int(streamed.sum())
        first = tokens * int(kept.any(1).sum())  # the first sum of an output is not read back
        reads = -(-tokens // array.cols) * weights + tokens * int(widths[streamed > 0].sum()) + written - first
        passes = 1
    macs = tokens * weights
    fits = array.sram_elements is None or tokens * inputs <= array.sram_elements
    dram = tokens * inputs * (1 if fits else max(passes, 1)) + weights + tokens * outputs
    elements = array.rows * array.cols * array.arrays
    return Run(cycles, macs, macs / max(1, elements * (cycles + 1)), reads, written, dram, y)


def _sizes(length: int, size: int) -> np.ndarray:
    """Of the stretches that a length is cut into."""
    return np.minimum(size, length - np.arange(0, length, size))
