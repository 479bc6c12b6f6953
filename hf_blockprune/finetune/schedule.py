"""What training does at each step: pure functions of the step, so that a run that goes on has nothing to restore."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningRates:
    """The learning rate of each step: a straight line up to the peak, and half a cosine down from it.

    Args:
        peak: the highest rate.
        last: that at the end.
        first: that of the first step, where there is a warm-up.
        warmup_steps: steps of the line.
        steps: of the whole training.

    Example:
        >>> rates = LearningRates(peak=1.0, last=0.0, first=0.5, warmup_steps=2, steps=6)
        >>> [round(rates.at(step), 3) for step in range(6)]
        [0.5, 0.75, 1.0, 0.854, 0.5, 0.146]
    """

    peak: float
    last: float
    first: float
    warmup_steps: int
    steps: int

    def at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.first + (self.peak - self.first) * step / self.warmup_steps
        way = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.last + (self.peak - self.last) * (1 + math.cos(math.pi * min(1.0, way))) / 2


@dataclass(frozen=True)
class PruningSteps:
    """How much is kept after which step (Zhu and Gupta 2017, arXiv 1710.01878).

    kept(t) = goal + (begin - goal) (1 - (t - first) / (last - first))^3

    Args:
        begin: share of the dense model's cost before.
        goal: share after the last choice of blocks.
        first, last: steps between which blocks go.
        every: steps from one choice to the next.

    Example:
        >>> steps = PruningSteps(begin=1.0, goal=0.5, first=0, last=4, every=2)
        >>> [steps.kept_after(step) for step in range(6)]
        [None, None, 0.5625, None, 0.5, None]
    """

    begin: float
    goal: float
    first: int
    last: int
    every: int

    def kept_after(self, step: int) -> float | None:
        """The share to keep once so many steps are done; None where no blocks are chosen."""
        if step == self.last:
            return self.goal
        if not self.first < step < self.last or (step - self.first) % self.every:
            return None
        rest = 1 - (step - self.first) / (self.last - self.first)
        return self.goal + (self.begin - self.goal) * rest**3
