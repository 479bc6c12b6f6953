"""What is kept of tensors is forgotten when they change or die."""

import gc

import pytest
import torch

from hf_blockprune.hub.blockprune_prepared import PreparedCache


@pytest.fixture
def cache():
    return PreparedCache()


def total(cache, *tensors, key=()):
    return cache.get(tensors, key, lambda: sum(t.sum().item() for t in tensors))


def test_is_made_once(cache):
    x = torch.ones(3)
    assert total(cache, x) == 3
    assert cache.get((x,), (), lambda: pytest.fail("made again")) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x.copy_(torch.full((3,), 2.0)),
        lambda x: x[1:].add_(1.5),
        lambda x: x.detach().add_(1),
    ],
    ids=["in place", "copied into", "through a view", "through detach"],
)
def test_is_made_again_after_a_change(cache, change):
    x = torch.ones(3)
    total(cache, x)
    change(x)
    assert total(cache, x) == 6


def test_keys_tell_values_apart(cache):
    x = torch.ones(3)
    assert cache.get((x,), "a", lambda: 1) == 1
    assert cache.get((x,), "b", lambda: 2) == 2
    assert cache.get((x,), "a", lambda: 3) == 1


def test_tensors_at_an_address_that_was_freed_are_others(cache):
    """The allocator hands out the same address again and again."""
    seen = set()
    for value in range(50):
        x = torch.full((1000,), float(value))
        seen.add(x.data_ptr())
        assert total(cache, x) == 1000 * value
        del x
    assert len(seen) < 50


def test_values_of_dead_tensors_are_dropped(cache):
    for value in range(10):
        total(cache, torch.full((10 + value,), 1.0))
    gc.collect()
    total(cache, torch.ones(3))
    assert len(cache) <= 2


def test_a_tensor_without_a_version_is_never_trusted(cache):
    with torch.inference_mode():
        x = torch.ones(3)
        assert total(cache, x) == 3
        x.add_(1)
        assert total(cache, x) == 6
