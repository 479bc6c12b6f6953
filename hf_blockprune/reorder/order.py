"""The order of features in which their saliency is packed into few blocks.

Two features of different groups exchange places as long as that lowers the sum, over all blocks, of the square root of
the block's saliency. The root is concave, so that the sum is low where few blocks hold much and the others little.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SWEEPS = 2
# Gains below this share of the whole are rounding.
LEAST_GAIN = 1e-6


@dataclass(frozen=True)
class Profile:
    """What features are worth in the blocks that groups of them form with other features.

    Attributes:
        saliency: of each feature in each line of blocks, [features, lines].
        size: features in a group.
    """

    saliency: Tensor
    size: int

    @classmethod
    def of_rows(cls, saliency: Tensor, block_shape: tuple[int, int]) -> "Profile":
        """Of the outputs of a Linear, from its entries' saliency [out, in]."""
        rows, cols = block_shape
        return cls(group_sums(saliency.t(), cols).t(), rows)

    @classmethod
    def of_cols(cls, saliency: Tensor, block_shape: tuple[int, int]) -> "Profile":
        """Of its inputs."""
        rows, cols = block_shape
        return cls(group_sums(saliency, rows).t(), cols)

    def part(self, chosen: Tensor) -> "Profile":
        """Of some features, in a new order."""
        return Profile(self.saliency[chosen], self.size)


class _Side:
    """A profile in the order so far."""

    def __init__(self, profile: Profile, order: Tensor) -> None:
        self.values = profile.saliency[order]
        self.group = torch.arange(len(order), device=order.device) // profile.size
        self.sums = group_sums(self.values, profile.size)
        self.roots = self.sums.sqrt().sum(dim=1)

    def changes(self, i: int) -> Tensor:
        """How the sum of roots would change if feature i and each other one exchanged places, [features]."""
        mine, values = self.values[i], self.values
        here = (self.sums[self.group[i]] - mine + values).clamp(min=0).sqrt().sum(dim=1)
        there = (self.sums[self.group] - values + mine).clamp(min=0).sqrt().sum(dim=1)
        changes = here + there - self.roots[self.group[i]] - self.roots[self.group]
        return torch.where(self.group == self.group[i], 0.0, changes)

    def exchange(self, i: int, j: int) -> None:
        self.values[[i, j]] = self.values[[j, i]]
        for k in (i, j):
            group = self.group[k]
            self.sums[group] = self.values[self.group == group].sum(dim=0)
            self.roots[group] = self.sums[group].sqrt().sum()


def pack(order: Tensor, profiles: list[Profile], sweeps: int = SWEEPS) -> Tensor:
    """Exchange features until no exchange packs saliency better, or at most `sweeps` times through all of them.

    Args:
        order: the order to begin with, int64 [features].
        profiles: of the features in their old order, one for each side on which they form blocks.
        sweeps: bound on the work.

    Returns:
        int64 [features]; feature i of the new order is feature order[i] of the old one.
    """
    order = order.clone()
    # Groups of one and a single group are the same in any order.
    sides = [_Side(profile, order) for profile in profiles if 1 < profile.size < len(order)]
    least = LEAST_GAIN * sum(float(side.roots.sum()) for side in sides)
    for _ in range(sweeps if sides else 0):
        exchanged = False
        for i in range(len(order)):
            changes = torch.stack([side.changes(i) for side in sides]).sum(dim=0)
            j = int(changes.argmin())
            if changes[j] < -least:
                order[[i, j]] = order[[j, i]]
                for side in sides:
                    side.exchange(i, j)
                exchanged = True
        if not exchanged:
            break
    return order


def group_sums(values: Tensor, size: int) -> Tensor:
    """Sums over each `size` following rows, [ceil(rows / size), columns]."""
    group = torch.arange(len(values), device=values.device) // size
    return values.new_zeros(int(group[-1]) + 1, values.shape[1]).index_add_(0, group, values)
