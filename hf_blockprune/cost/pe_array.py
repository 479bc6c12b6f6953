"""A systolic array, cycle by cycle: what each processing element holds, and what it hands to its neighbours.

Slow on purpose. It computes real products, and its cycles are counted, not calculated; the closed forms of
`hub.blockprune_systolic` must equal both.
"""

import numpy as np

from ..hub.blockprune_systolic import DATAFLOWS


class ProcessingArray:
    """Multiply-add elements in rows and columns; operands move one step a cycle.

    Args:
        rows, cols: elements.

    Attributes:
        cycles: that passed.
    """

    def __init__(self, rows: int, cols: int) -> None:
        self.rows, self.cols = rows, cols
        self.cycles = 0

    def stationary_weights(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """x [tokens, inputs] times weight [inputs, outputs]; weights stay, x enters from the left, sums leave below.

        Args:
            x: inputs <= rows.
            weight: outputs <= cols.
        """
        held = np.zeros((self.rows, self.cols))
        padded = self._fill(weight, self.rows, self.cols)
        for step in range(self.rows):  # weights sink down, the last row first
            held = np.vstack([padded[self.rows - 1 - step], held[:-1]])
            self.cycles += 1
        tokens = len(x)
        entering = self._skewed(self._fill(x, tokens, self.rows).T)
        moving, sums = np.zeros((self.rows, self.cols)), np.zeros((self.rows, self.cols))
        out = np.zeros((tokens, self.cols))
        for step in range(tokens + self.rows + self.cols - 2):
            left = entering[:, step] if step < entering.shape[1] else np.zeros(self.rows)
            moving = np.hstack([left[:, None], moving[:, :-1]])
            sums = np.vstack([np.zeros(self.cols), sums[:-1]]) + moving * held
            for col in range(self.cols):
                token = step - (self.rows - 1) - col
                if 0 <= token < tokens:
                    out[token, col] = sums[-1, col]
            self.cycles += 1
        return out[:, : weight.shape[1]]

    def stationary_outputs(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """The same product; sums stay, x enters from the left and weights from above.

        Args:
            x: [tokens, inputs], tokens <= rows.
            weight: [inputs, outputs], outputs <= cols.
        """
        inputs = x.shape[1]
        from_left = self._skewed(self._fill(x, self.rows, inputs))
        from_above = self._skewed(self._fill(weight, inputs, self.cols).T).T
        right, down, sums = (np.zeros((self.rows, self.cols)) for _ in range(3))
        for step in range(inputs + self.rows + self.cols - 2):
            left = from_left[:, step] if step < from_left.shape[1] else np.zeros(self.rows)
            above = from_above[step] if step < len(from_above) else np.zeros(self.cols)
            right = np.hstack([left[:, None], right[:, :-1]])
            down = np.vstack([above, down[:-1]])
            sums += right * down
            self.cycles += 1
        return sums[: len(x), : weight.shape[1]]

    def run(self, x: np.ndarray, weight: np.ndarray, dataflow: str) -> np.ndarray:
        """One fold of x @ weight."""
        if dataflow == "ws":
            return self.stationary_weights(x, weight)
        if dataflow == "os":
            return self.stationary_outputs(x, weight)
        if dataflow == "is":  # the transposed product with stationary weights
            return self.stationary_weights(weight.T, x.T).T
        raise ValueError(f"unknown dataflow {dataflow!r}; choose one of {DATAFLOWS}")

    @staticmethod
    def _fill(values: np.ndarray, height: int, width: int) -> np.ndarray:
        """Zeros where the tile is smaller than the array."""
        filled = np.zeros((height, width))
        filled[: values.shape[0], : values.shape[1]] = values
        return filled

    @staticmethod
    def _skewed(values: np.ndarray) -> np.ndarray:
        """Row i shifted i cycles to the right, [rows, cycles]."""
        rows, length = values.shape
        skewed = np.zeros((rows, length + rows - 1))
        for row in range(rows):
            skewed[row, row : row + length] = values[row]
        return skewed
