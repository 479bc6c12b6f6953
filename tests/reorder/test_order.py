"""Packing: saliency gathers in few blocks, as far as exchanges lead."""

import pytest
import torch

from hf_blockprune.reorder.order import Profile, group_sums, pack
from hf_blockprune.score.blocks import block_sums


def roots(order, profiles):
    return sum(float(group_sums(p.saliency[order].double(), p.size).sqrt().sum()) for p in profiles)


@pytest.mark.parametrize("shape", [(8, 4), (5, 3), (1, 7), (12, 1)])
def test_groups_of_a_profile_are_blocks(shape):
    saliency = torch.rand(12, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = block_sums(saliency, shape)
    by_rows, by_cols = Profile.of_rows(saliency, shape), Profile.of_cols(saliency, shape)
    torch.testing.assert_close(group_sums(by_rows.saliency, by_rows.size), blocks)
    torch.testing.assert_close(group_sums(by_cols.saliency, by_cols.size).t(), blocks)


def test_interleaved_kinds_of_features_are_parted():
    """Six kinds of features, each of worth in lines of its own: groups of one kind are the best there is."""
    kinds = torch.arange(48) % 6
    saliency = torch.eye(6)[kinds] * torch.rand(48, 1, generator=torch.Generator().manual_seed(0))
    order = pack(torch.arange(48), [Profile(saliency, 8)], sweeps=8)
    assert sorted(order.tolist()) == list(range(48))
    assert all(len(set(group.tolist())) == 1 for group in kinds[order].split(8))


@pytest.mark.parametrize("sizes", [(8, 8), (7, 5), (1, 16), (48, 3), (64, 1)])
def test_no_exchange_packs_better_than_the_result(sizes):
    generator = torch.Generator().manual_seed(2)
    profiles = [Profile(torch.rand(48, 12, generator=generator) ** 6, size) for size in sizes]
    start = torch.randperm(48, generator=generator)
    order = pack(start, profiles, sweeps=50)
    assert sorted(order.tolist()) == list(range(48))
    best = roots(order, profiles)
    assert best <= roots(start, profiles)
    for i in range(48):
        for j in range(i):
            other = order.clone()
            other[[i, j]] = order[[j, i]]
            assert roots(other, profiles) > best - 1e-5 * best
