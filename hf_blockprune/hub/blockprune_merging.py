"""Merging of alike tokens, as tensors: which patches leave, into which others, and how to see all of them again.

After Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv 2210.09461): some patches may leave, each
into the one among the others that it is most alike, and those that are most alike do. A token stands for as many
patches as its size says, in averages and in attention. Alike are here the inputs of the attention; ToMe compares its
keys.

How many leave is known before, so shapes depend on nothing but the size of the image.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Which patches the tokens of each image stand for.

    Attributes:
        sizes: how many, float32 [images, tokens]; 1 for those that are no patches, which come first.
        places: where each token of the whole image is now, int64 [images, all tokens].
    """

    sizes: Tensor
    places: Tensor


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
    sources, targets, back = _split(states.shape[1] - prefix, leave, states.device)
    compared = torch.nn.functional.normalize(alike[:, prefix:].detach().float(), dim=-1)
    best, target = (compared[:, sources] @ compared[:, targets].transpose(1, 2)).max(-1)
    order = best.argsort(dim=-1, descending=True)
    gone, stays = order[:, :leave], order[:, leave:]
    into = target.gather(1, gone)

    patches, sizes = states[:, prefix:], groups.sizes[:, prefix:]
    source_sizes, target_sizes = sizes[:, sources], sizes[:, targets]
    gone_sizes = source_sizes.gather(1, gone)
    sums = target_sizes.scatter_add(1, into, gone_sizes)
    # Shares of one, and not sums of sizes, as half precision has no large numbers.
    shares = (gone_sizes / sums.gather(1, into)).to(states.dtype)[..., None]
    merged = patches[:, targets] * (target_sizes / sums).to(states.dtype)[..., None]
    candidates = patches[:, sources]
    merged = merged.scatter_add(1, _wide(into, merged), candidates.gather(1, _wide(gone, merged)) * shares)

    kept = candidates.gather(1, _wide(stays, merged))
    new_sizes = torch.cat([groups.sizes[:, :prefix], source_sizes.gather(1, stays), sums], 1)
    moved = _moved(order, into, sums.shape[1])[:, back] + prefix
    first = torch.arange(prefix, device=states.device).expand(states.shape[0], -1)
    places = torch.cat([first, moved], 1).gather(1, groups.places)
    return torch.cat([states[:, :prefix], kept, merged], 1), Groups(new_sizes, places)


def _split(patches: int, leave: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of patches that may leave and of those that they may go into, and where each is in both joined.

    Every second one may leave, or more where more must. All are made where they are used: a copy from the host could
    be no part of a CUDA graph.
    """
    step = _step(patches, leave)
    targets = torch.arange(0, patches, step, device=device)
    number = torch.arange(patches - targets.shape[0], device=device)
    sources = number + number // (step - 1) + 1
    position = torch.arange(patches, device=device)
    back = torch.where(position % step == 0, sources.shape[0] + position // step, position - position // step - 1)
    return sources, targets, back


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


def _moved(order: Tensor, into: Tensor, targets: int) -> Tensor:
    """Where each patch that might leave, and then each of the others, is afterwards; [images, patches].

    Args:
        order: of those that might leave, those that do first.
        into: number of the other patch that each of them goes into.
        targets: how many others there are.
    """
    images, kept = order.shape[0], order.shape[1] - into.shape[1]
    number = torch.arange(kept + targets, device=order.device).expand(images, -1)
    # Gathered and not scattered: where none stays, OpenVINO refuses the scatter of nothing.
    sources = torch.cat([into + kept, number[:, :kept]], 1).gather(1, order.argsort(-1))
    return torch.cat([sources, number[:, kept:]], 1)


def _wide(index: Tensor, like: Tensor) -> Tensor:
    """An index of tokens as one of all their features."""
    return index[..., None].expand(-1, -1, like.shape[-1])


def restore(states: Tensor, groups: Groups) -> Tensor:
    """Give every patch the state of the token that stands for it, [images, all tokens, width]."""
    return states.gather(1, _wide(groups.places, states))


def averaged(states: Tensor, groups: Groups) -> Tensor:
    """Mean over what each token stands for, [images, tokens, width], of states [images, all tokens, width]."""
    sums = states.new_zeros(states.shape[0], groups.sizes.shape[1], states.shape[-1])
    return sums.scatter_add(1, _wide(groups.places, states), states) / groups.sizes[..., None].to(states.dtype)
