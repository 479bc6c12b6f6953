"""Scales of layers' branches, folded into the Linears before them."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..model.families import family_of
from ..model.structure import layer_names, part_names
from .changes import Changes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def fold_scales(model: "PreTrainedModel", changes: Changes | None = None) -> int:
    """Multiply the scales of layers' branches into the Linears before them, in place; the function stays the same.

    What a Linear adds to the residual stream is then its own output, as in a plain ViT.

    Args:
        model: any; those without such scales stay as they are.
        changes: notes what is done, so that it can be undone.

    Returns:
        Number of scales that are ones now.
    """
    family, changes, count = family_of(model), changes or Changes(), 0
    if family is None:
        return 0
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    parameters = dict(model.named_parameters())
    for prefix in layer_names(model):
        names = part_names(prefix, family, linears)
        for part, scale_name in family.scales.items():
            scale = parameters.get(f"{prefix}.{scale_name}")
            if scale is None or names[part] is None:
                continue
            linear = linears[names[part]]
            changes.overwrite(linear.weight, linear.weight * scale[:, None])
            if linear.bias is not None:
                changes.overwrite(linear.bias, linear.bias * scale)
            changes.overwrite(scale, torch.ones_like(scale))
            count += 1
    return count
