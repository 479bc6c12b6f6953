"""Merging of alike tokens, as tensors: which patches leave, into which others, and how to see all of them again.

After Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv 2210.09461): some patches may leave, each
into the one among the others that it is most alike, and those that are most alike do. A token stands for as many
patches as its size says, in averages and in attention. Alike are here the inputs of the attention; ToMe compares its
keys.

How many leave is known before, so shapes depend on nothing but the size of the image.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .blockprune_direct import are_plain

EPSILON = 1e-12  # least length of a direction


class Groups(NamedTuple):
    """Which patches the tokens of each image stand for.

    Attributes:
        sizes: how many, float32 [images, tokens]; 1 for those that are no patches, which come first.
        places: where each token of the whole image is now, int64 [images, all tokens].
    """

    sizes: Tensor
    places: Tensor


class Merged(NamedTuple):
    """What `merge` gives, as plain tensors: states [images, tokens, width], and `Groups`' sizes and places."""

    states: Tensor
    sizes: Tensor
    places: Tensor


class Merger(Protocol):
    """Merges tokens that nobody differentiates: `merge`, with its groups taken apart.

    Every `step`th patch stays in any case. None for tensors that it does not take.
    """

    def __call__(
        self, states: Tensor, alike: Tensor, sizes: Tensor, places: Tensor, leave: int, prefix: int, step: int
    ) -> Merged | None: ...


# By device type; one for all copies of this file in a process, as with `blockprune_backends`.
_MERGERS: dict[str, Merger] = vars(torch.ops.blockprune).setdefault("mergers", {})


def use_merger(device_type: str, merger: Merger) -> None:
    """Let tokens on a kind of device merge with another function.

    Args:
        device_type: whose tensors it takes.
        merger: it must find what `merge` finds, but for rounding.
    """
    _MERGERS[device_type] = merger


def whole(states: Tensor) -> Groups:
    """Groups of one each, for states [images, tokens, width]."""
    images, tokens = states.shape[:2]
    sizes = torch.ones(images, tokens, dtype=torch.float32, device=states.device)
    return Groups(sizes, torch.arange(tokens, device=states.device).expand(images, -1))


def attention_bias(groups: Groups, dtype: torch.dtype) -> Tensor:
    """What attention's logits get, so that a token counts as often as it has patches; [images, 1, 1, tokens]."""
    return groups.sizes.log().to(dtype)[:, None, None, :]


def merge(states: Tensor, alike: Tensor, groups: Groups, leave: int, prefix: int) -> tuple[Tensor, Groups]:
    """Let patches go into others that they are alike, each image by itself.

    Args:
        states: [images, tokens, width].
        alike: what is compared, by its direction, [images, tokens, any width].
        groups: of the tokens.
        leave: how many patches go, from 1; one at least stays.
        prefix: tokens before the patches, which stay as they are.

    Returns:
        The states [images, tokens - leave, width], and their groups. Patches that might have left come before those
        that others went into.
    """
    count = states.shape[1] - prefix
    step = _step(count, leave)
    if are_plain(states, alike, *groups) and (merger := _MERGERS.get(states.device.type)) is not None:
        merged = merger(states, alike, *groups, leave, prefix, step)
        if merged is not None:
            return merged[0], Groups(*merged[1:])
    best, target = _nearest(alike[:, prefix:], step)
    order = best.argsort(dim=-1, descending=True)
    kept = order.shape[1] - leave
    number = torch.arange(states.shape[1] - leave, device=states.device).expand(states.shape[0], -1)
    candidates = order + order // (step - 1) + (prefix + 1)
    gone = candidates[:, :leave]
    into = target.gather(1, order[:, :leave]) + (prefix + kept)
    others = number[:, : count - order.shape[1]] * step + prefix
    stays = torch.cat([number[:, :prefix], candidates[:, leave:], others], 1)

    stay_sizes, gone_sizes = groups.sizes.gather(1, stays), groups.sizes.gather(1, gone)
    sizes = stay_sizes.scatter_add(1, into, gone_sizes)
    # Shares of one, and not sums of sizes, as half precision has no large numbers.
    merged = _rows(states, stays) * _column(stay_sizes / sizes, states)
    more = _rows(states, gone) * _column(gone_sizes / sizes.gather(1, into), states)
    merged = merged.index_add(0, _flat(into, number.shape[1]), more).unflatten(0, number.shape)

    moved = torch.zeros_like(groups.places[:, : states.shape[1]]).scatter(1, stays, number).scatter(1, gone, into)
    return merged, Groups(sizes, moved.gather(1, groups.places))


def _nearest(alike: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """(how alike, number among those that stay of the one) of each patch that may leave, [images, patches that may].

    Every `step`th of the patches [images, patches, width] stays in any case. They are taken apart as views: index
    tensors would take longer, and a copy of them from the host could be no part of a CUDA graph.
    """
    alike = alike.detach().float()
    alike = alike / torch.linalg.vector_norm(alike, dim=-1, keepdim=True).clamp_min(EPSILON)
    count = alike.shape[1]
    rows = -(-count // step)
    table = torch.nn.functional.pad(alike, (0, 0, 0, rows * step - count)) if count % step else alike
    table = table.unflatten(1, (rows, step))
    similarity = table[:, :, 1:].flatten(1, 2)[:, : count - rows] @ table[:, :, 0].transpose(1, 2)
    best, target = similarity.max(-1)
    return best, target


def _flat(index: Tensor, tokens: int) -> Tensor:
    """Tokens of each image [images, any] as rows of all images' tokens together, [images * any]."""
    images = torch.arange(index.shape[0], device=index.device)[:, None]
    return (index + images * tokens).flatten()


def _rows(states: Tensor, index: Tensor) -> Tensor:
    """States of tokens [images, any], as [images * any, width]; whole rows are a fraction of the work of a gather."""
    return states.flatten(0, 1).index_select(0, _flat(index, states.shape[1]))


def _column(shares: Tensor, states: Tensor) -> Tensor:
    return shares.to(states.dtype).flatten()[:, None]


def split_sizes(patches: int, leave: int) -> tuple[int, int]:
    """(patches that may leave, patches that they may go into), where so many are to leave."""
    targets = -(-patches // _step(patches, leave))
    return patches - targets, targets


def _step(patches: int, leave: int) -> int:
    """One patch in so many stays in any case."""
    step = 2
    while patches - -(-patches // step) < leave:
        step += 1
    return step


def _wide(index: Tensor, like: Tensor) -> Tensor:
    """An index of tokens as one of all their features."""
    return index[..., None].expand(-1, -1, like.shape[-1])


def restore(states: Tensor, groups: Groups) -> Tensor:
    """Give every patch the state of the token that stands for it, [images, all tokens, width]."""
    return _rows(states, groups.places).unflatten(0, groups.places.shape)


def averaged(states: Tensor, groups: Groups) -> Tensor:
    """Mean over what each token stands for, [images, tokens, width], of states [images, all tokens, width]."""
    sums = states.new_zeros(states.shape[0], groups.sizes.shape[1], states.shape[-1])
    return sums.scatter_add(1, _wide(groups.places, states), states) / groups.sizes[..., None].to(states.dtype)
