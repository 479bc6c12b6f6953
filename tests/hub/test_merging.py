"""Tokens merge as docs/format.md says: against a reader written from its words, with plain loops in float64."""

import json
import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForImageClassification

from hf_blockprune.hub.blockprune_merging import attention_bias, averaged, merge, restore, whole
from hf_blockprune.hub.blockprune_tokens import TokenSchedule, mergeable_layers
from hf_blockprune.model.structure import find_transformer_layers
from tests.conftest import ROOT

APART = 1e-5  # similarities that are closer may change places where float32 rounds otherwise
WIDTH = 4


class Tie(Exception):
    """Two similarities are as good as equal, so that either may win."""


def split(patches, leave):
    """(positions that may leave, positions that they may go into)."""
    step = 2
    while patches - math.ceil(patches / step) < leave:
        step += 1
    return [p for p in range(patches) if p % step], [p for p in range(patches) if p % step == 0]


def cosine(one, other):
    lengths = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
    return sum(a * b for a, b in zip(one, other, strict=True)) / lengths


def apart(values):
    """Values in falling order, of which no two are alike."""
    ordered = sorted(values, reverse=True)
    if any(larger - smaller < APART for larger, smaller in pairwise(ordered)):
        raise Tie
    return ordered


def merge_one(tokens, compared, leave, prefix):
    """Merge the tokens of one image.

    Args:
        tokens: (state, the numbers of the tokens of the whole image that it stands for) of each.
        compared: what the attention read of each.
        leave: how many go.
        prefix: tokens before the patches.
    """
    first, patches, compared = tokens[:prefix], tokens[prefix:], compared[prefix:]
    sources, targets = split(len(patches), leave)
    best = {}
    for source in sources:
        alike = {target: cosine(compared[source], compared[target]) for target in targets}
        similarity = apart(alike.values())[0]
        best[source] = similarity, next(target for target in targets if alike[target] == similarity)
    falling = apart(similarity for similarity, _ in best.values())
    order = sorted(sources, key=lambda source: falling.index(best[source][0]))
    groups = {target: [patches[target]] for target in targets}
    for source in order[:leave]:
        groups[best[source][1]].append(patches[source])
    return [*first, *(patches[source] for source in order[leave:]), *(mean(group) for group in groups.values())]


def mean(group):
    """The token that stands for several: the mean of their states, each as often as it has patches."""
    members = [number for _, own in group for number in own]
    state = [sum(state[i] * len(own) for state, own in group) / len(members) for i in range(len(group[0][0]))]
    return state, members


def assert_as_read(states, groups, wanted):
    """Tensors of all images say what the plain reader found."""
    for image, tokens in enumerate(wanted):
        assert groups.sizes[image].tolist() == [len(members) for _, members in tokens]
        places = {number: place for place, (_, members) in enumerate(tokens) for number in members}
        assert groups.places[image].tolist() == [places[number] for number in range(len(places))]
        expected = torch.tensor([state for state, _ in tokens], dtype=torch.float64)
        torch.testing.assert_close(states[image], expected, rtol=1e-6, atol=1e-6)


@st.composite
def cases(draw):
    """(images, patches, prefix, how many leave at each of some layers, seed)."""
    patches = draw(st.integers(2, 14))
    left, leave = patches, []
    for _ in range(draw(st.integers(1, 3))):
        if left > 1:
            leave.append(draw(st.integers(1, left - 1)))
            left -= leave[-1]
    return draw(st.integers(1, 3)), patches, draw(st.integers(0, 3)), leave, draw(st.integers(0, 2**31))


def random(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@settings(deadline=None)
@given(case=cases())
def test_merging_is_what_the_format_says(case):
    """Layer after layer, so that tokens of several patches merge as well."""
    images, patches, prefix, layers, seed = case
    generator = torch.Generator().manual_seed(seed)
    states = random(generator, images, prefix + patches, WIDTH)
    groups = whole(states)
    wanted = [[(state, [number]) for number, state in enumerate(image)] for image in states.tolist()]
    for leave in layers:
        compared = random(generator, *states.shape)
        try:
            pairs = zip(wanted, compared.tolist(), strict=True)
            wanted = [merge_one(tokens, read, leave, prefix) for tokens, read in pairs]
        except Tie:
            assume(False)
        states, groups = merge(states, compared, groups, leave, prefix)
        assert_as_read(states, groups, wanted)


@settings(deadline=None)
@given(case=cases())
def test_nothing_is_lost(case):
    images, patches, prefix, layers, seed = case
    generator = torch.Generator().manual_seed(seed)
    before = states = random(generator, images, prefix + patches, WIDTH)
    groups = whole(states)
    for leave in layers:
        states, groups = merge(states, random(generator, *states.shape), groups, leave, prefix)
    assert states.shape[1] == prefix + patches - sum(layers)
    assert groups.sizes.sum(1).tolist() == [prefix + patches] * images
    assert groups.sizes[:, :prefix].eq(1).all()
    assert torch.equal(states[:, :prefix], before[:, :prefix])
    torch.testing.assert_close((states * groups.sizes[..., None]).sum(1), before.sum(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(averaged(before, groups), states, rtol=1e-6, atol=1e-6)
    restored = restore(states, groups)
    assert restored.shape == before.shape
    torch.testing.assert_close(averaged(restored, groups), states)
    for image in range(images):
        for number, place in enumerate(groups.places[image].tolist()):
            assert torch.equal(restored[image, number], states[image, place])


@pytest.mark.parametrize("leave", range(1, 7))
def test_half_may_leave_and_then_more(leave):
    """Of seven patches those at odd places may leave, then two of three, and so on."""
    sources, targets = split(7, leave)
    assert targets == {3: [0, 2, 4, 6], 4: [0, 3, 6], 5: [0, 4], 6: [0]}[max(leave, 3)]
    states = torch.eye(7, dtype=torch.float64)[None]
    compared = random(torch.Generator().manual_seed(0), 1, 7, WIDTH)
    merged, groups = merge(states, compared, whole(states), leave, 0)
    # Row i of the identity says which share patch i has of a token.
    assert all((row > 0).sum() == size for row, size in zip(merged[0], groups.sizes[0].tolist(), strict=True))
    assert groups.places[0, targets].tolist() == list(range(len(sources) - leave, 7 - leave))


def test_the_most_alike_leave():
    """Patch 1 is most like 2, and 3 like 0; the former pair is the more alike."""
    angles = torch.tensor([0.0, 1.0, 1.1, 0.5, 3.0])
    compared = torch.stack([angles.cos(), angles.sin()], -1)[None]
    states = torch.arange(5.0).view(1, 5, 1)
    merged, groups = merge(states, compared, whole(states), 1, 0)
    assert merged.flatten().tolist() == [3, 0, 1.5, 4]
    assert groups.places.tolist() == [[1, 2, 2, 0, 3]]
    assert attention_bias(groups, torch.float64).flatten().tolist() == [0, 0, pytest.approx(math.log(2)), 0]


def test_lengths_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    states, compared = random(generator, 2, 9, WIDTH), random(generator, 2, 9, WIDTH)
    scaled = compared * torch.arange(1, 10, dtype=torch.float64)[:, None]
    for one, other in zip(
        merge(states, compared, whole(states), 3, 1), merge(states, scaled, whole(states), 3, 1), strict=True
    ):
        torch.testing.assert_close(one, other)


@given(patches=st.integers(1, 2**31 - 1), own=st.integers(1, 2**20), leave=st.lists(st.integers(0, 2**18), max_size=3))
def test_other_images_lose_as_large_a_share(patches, own, leave):
    assume(sum(leave) < own)
    found = TokenSchedule(tuple(leave), own).remaining(patches)
    left = [own - sum(leave[: number + 1]) for number in range(len(leave))]
    exact = [Fraction(patches * there, own) + Fraction(1, 2) for there in left]
    assert found == [max(1, math.floor(number)) for number in exact]
    assert all(1 <= after <= before for before, after in pairwise([patches, *found]))
    assert TokenSchedule(tuple(leave), own).remaining(own) == left


def attention_by_hand(model, names, heads, read, sizes):
    """What an attention writes, [tokens, width], of what it reads; a token counts as often as it has patches."""
    query, key, value = (model.get_submodule(name)(read).chunk(heads, -1) for name in names.names()[:3])
    mixed = []
    for head in range(heads):
        logits = query[head] @ key[head].T / math.sqrt(query[head].shape[-1])
        mixed.append((logits + torch.tensor(sizes).log()).softmax(-1) @ value[head])
    return model.get_submodule(names.out)(torch.cat(mixed, -1))


@torch.no_grad()
def test_a_stored_model_answers_as_the_format_says():
    """The layers of the dense model, one after the other, with the reader above between attention and MLP."""
    folder = ROOT / "tests" / "fixtures" / "format-5"
    dense = AutoModelForImageClassification.from_pretrained(folder).dequantize().double()
    leave = json.loads((folder / "config.json").read_text())["quantization_config"]["tokens"]["leave"]
    linears = {name: module for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    found = find_transformer_layers(dense, linears)
    layers, prefix = mergeable_layers(dense, [layer.query for layer in found])
    states = dense.vit.embeddings(torch.linspace(-1, 1, 3 * 16 * 16).double().view(1, 3, 16, 16))[0]
    members = [[number] for number in range(len(states))]
    for layer, names, count in zip(layers, found, leave, strict=True):
        read = layer.layernorm_before(states)
        sizes = [float(len(own)) for own in members]
        states = states + attention_by_hand(dense, names, dense.config.num_attention_heads, read, sizes)
        if count:
            tokens = list(zip(states.tolist(), members, strict=True))
            values, members = zip(*merge_one(tokens, read.tolist(), count, prefix), strict=True)
            states = torch.tensor(values, dtype=torch.float64)
        inner = dense.get_submodule(names.fc1)(layer.layernorm_after(states))
        states = states + dense.get_submodule(names.fc2)(nn.functional.gelu(inner))
    assert [len(own) for own in members] != [1] * len(members)
    place = {number: token for token, own in enumerate(members) for number in own}
    restored = states[[place[number] for number in range(len(place))]]
    logits = dense.classifier(dense.vit.layernorm(restored)[0])
    expected = torch.tensor(json.loads((folder / "logits.json").read_text())[0]).double()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
