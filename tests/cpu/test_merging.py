"""Tokens merged by the compiled kernels: as the plain reader of the format merges them, whatever the processor."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageClassification

from hf_blockprune._cpu.library import CpuLibrary, find_library
from hf_blockprune._cpu.merging import CpuMerger
from hf_blockprune.hub import blockprune_merging
from hf_blockprune.hub.blockprune_merging import Groups, merge, use_merger, whole
from tests.conftest import ROOT
from tests.cpu.test_backend import instruction_sets
from tests.hub.test_merging import APART, Tie, assert_as_read, cases, merge_one, split

LIBRARY, WHY_NOT = find_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=WHY_NOT)
MERGERS = {name: CpuMerger(CpuLibrary(name)) for name in instruction_sets()}
each_isa = pytest.mark.parametrize("isa", list(MERGERS))


@pytest.fixture
def mergers(monkeypatch):
    """What merges, by kind of device; others may be put there."""
    found = {}
    monkeypatch.setattr(blockprune_merging, "_MERGERS", found)
    return found


def merge_here(merger, states, alike, groups, leave, prefix):
    """`merge` with one merger."""
    step = blockprune_merging._step(states.shape[1] - prefix, leave)
    states, *groups = merger(states, alike, *groups, leave, prefix, step)
    return states, Groups(*groups)


def in_torch(states, alike, groups, leave, prefix):
    """`merge` with torch's operators, in double precision but for the comparison."""
    held = dict(blockprune_merging._MERGERS)
    blockprune_merging._MERGERS.clear()
    try:
        return merge(states.double(), alike, groups, leave, prefix)
    finally:
        blockprune_merging._MERGERS.update(held)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def has_ties(alike, leave, prefix):
    """Whether rounding may decide which patches leave, or where they go."""
    may, into = split(alike.shape[1] - prefix, leave)
    directions = torch.nn.functional.normalize(alike[:, prefix:].double(), dim=-1)
    similarity = directions[:, may] @ directions[:, into].mT
    best = similarity.max(-1).values.sort().values
    two = similarity.topk(min(2, len(into)), -1).values
    gaps = [best.diff(), two[..., 0] - two[..., 1]] if len(into) > 1 else [best.diff()]
    return any(bool((gap < APART).any()) for gap in gaps)


@each_isa
@settings(deadline=None)
@given(case=cases(), width=st.integers(1, 70), features=st.integers(2, 70))
def test_merging_is_what_the_format_says(isa, case, width, features):
    images, patches, prefix, layers, seed = case
    states = random(seed, images, prefix + patches, width)
    groups = whole(states)
    wanted = [[(state, [number]) for number, state in enumerate(image)] for image in states.tolist()]
    for number, leave in enumerate(layers):
        alike = random(seed + number + 1, images, states.shape[1], features)
        try:
            pairs = zip(wanted, alike.tolist(), strict=True)
            wanted = [merge_one(tokens, read, leave, prefix) for tokens, read in pairs]
        except Tie:
            assume(False)
        states, groups = merge_here(MERGERS[isa], states, alike, groups, leave, prefix)
        assert_as_read(states.double(), groups, wanted)


@each_isa
@settings(deadline=None, max_examples=40)
@given(
    images=st.integers(1, 9),
    patches=st.integers(2, 260),
    share=st.floats(0, 1),
    features=st.integers(8, 200),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_images_of_many_patches_merge_as_in_torch(isa, images, patches, share, features, threads, seed):
    """More than fill any tile or panel; on any number of threads the same bits."""
    leave = 1 + round(share * (patches - 2))
    alike, states = random(seed, images, patches + 1, features), random(seed + 1, images, patches + 1, 20)
    assume(not has_ties(alike, leave, 1))
    groups = whole(states)
    expected, wanted = in_torch(states, alike, groups, leave, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        merged, found = merge_here(MERGERS[isa], states, alike, groups, leave, 1)
        torch.set_num_threads(1)
        again, _ = merge_here(MERGERS[isa], states, alike, groups, leave, 1)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.sizes, wanted.sizes)
    assert torch.equal(found.places, wanted.places)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged, again)


@each_isa
def test_bfloat16_is_rounded_once(isa):
    """The nearest bfloat16 of each mean, where many tokens go into few."""
    states, alike = random(0, 3, 50, 37).bfloat16(), random(1, 3, 50, 64).bfloat16()
    assert not has_ties(alike, 45, 1)
    expected, wanted = in_torch(states, alike, whole(states), 45, 1)
    merged, found = merge_here(MERGERS[isa], states, alike, whole(states), 45, 1)
    assert torch.equal(found.places, wanted.places)
    torch.testing.assert_close(merged.double(), expected, rtol=2**-8, atol=1e-6)
    assert torch.equal(merged[:, :1], states[:, :1])


@each_isa
def test_equal_tokens_go_into_the_first(isa):
    """All patches of a blank picture are alike: the order of their places decides."""
    states = torch.arange(9.0).view(1, 9, 1)
    merged, groups = merge_here(MERGERS[isa], states, torch.ones(1, 9, 24), whole(states), 2, 1)
    # Of patches 1 to 8 the second, fourth, .. may leave; two of them go into the first.
    assert merged.flatten().tolist() == [0, 6, 8, pytest.approx((1 + 2 + 4) / 3), 3, 5, 7]
    assert groups.places.tolist() == [[0, 3, 3, 4, 3, 5, 1, 6, 2]]


@each_isa
@pytest.mark.parametrize("features", [torch.zeros(1, 9, 16), torch.full((1, 9, 16), float("nan"))])
def test_tokens_that_are_like_nothing_merge_all_the_same(isa, features):
    states = random(0, 1, 9, 5)
    merged, groups = merge_here(MERGERS[isa], states, features, whole(states), 3, 0)
    assert groups.sizes.sum() == 9
    torch.testing.assert_close((merged * groups.sizes[..., None]).sum(1), states.sum(1))


@each_isa
def test_tensors_with_gaps(isa):
    states, alike = random(0, 12, 2, 30).transpose(0, 1), random(1, 2, 12, 40)[..., ::2]
    found = merge_here(MERGERS[isa], states, alike, whole(states), 4, 1)
    expected = merge_here(MERGERS[isa], states.contiguous(), alike.contiguous(), whole(states), 4, 1)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(*pair) for pair in zip(found[1], expected[1], strict=True))


@each_isa
@pytest.mark.parametrize("place", [-1, 9, 2**40])
def test_places_of_no_token_are_refused(isa, place):
    states = random(0, 1, 9, 5)
    groups = whole(states)
    groups = Groups(groups.sizes, groups.places.clone())
    groups.places[0, 4] = place
    with pytest.raises(IndexError, match="places: of 9 tokens"):
        merge_here(MERGERS[isa], states, states, groups, 3, 1)


@each_isa
def test_what_the_kernels_do_not_take_is_left_to_torch(isa):
    states = random(0, 1, 9, 5)
    groups = whole(states)
    merger = MERGERS[isa]
    assert merger(states.double(), states.double(), *groups, 3, 1, 2) is None
    assert merger(states.half(), states.half(), *groups, 3, 1, 2) is None
    assert merger(states, states.bfloat16(), *groups, 3, 1, 2) is None
    assert merger(states, states, groups.sizes.double(), groups.places, 3, 1, 2) is None
    assert merger(states, states, groups.sizes, groups.places.int(), 3, 1, 2) is None


def test_who_merges(mergers):
    """The merger of a device, but for calls that somebody differentiates, transforms or records."""
    calls = []

    def merger(states, *args):
        calls.append(states)

    use_merger("cpu", merger)
    states = random(0, 2, 9, 5)
    expected = merge(states, states, whole(states), 3, 1)
    assert len(calls) == 1
    learned = states.clone().requires_grad_()
    with torch.no_grad():
        merge(learned, learned, whole(states), 3, 1)
    assert len(calls) == 2
    merged, _ = merge(learned, learned, whole(states), 3, 1)
    merged.square().sum().backward()
    assert learned.grad is not None
    assert bool(learned.grad.abs().sum() > 0)
    # vmap gives one image after the other
    one = torch.func.vmap(lambda own: merge(own[None], own[None], whole(own[None]), 3, 1)[0][0])(states)
    torch.testing.assert_close(one, expected[0])
    with torch.autocast("cpu", torch.bfloat16):
        merge(states, states, whole(states), 3, 1)
    compiled = torch.compile(merge, fullgraph=True, backend="eager")(states, states, whole(states), 3, 1)
    torch.testing.assert_close(compiled[0], expected[0])
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_model_answers_alike(mergers, dtype):
    model = AutoModelForImageClassification.from_pretrained(ROOT / "tests/fixtures/format-5", dtype=dtype).eval()
    pixels = random(0, 3, 3, 16, 16).to(dtype)
    expected = model(pixels).logits
    for merger in MERGERS.values():
        counted = []
        mergers["cpu"] = lambda *args, merger=merger, counted=counted: counted.append(1) or merger(*args)
        tolerance = {} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(model(pixels).logits, expected, **tolerance)
        assert counted
