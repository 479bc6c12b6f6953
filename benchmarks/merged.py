"""Schedules of tokens for models of random weights: as many patches leave each layer as leave a share of the FLOPs."""

import _root  # noqa: F401
from transformers import PreTrainedModel

from hf_blockprune import BlockPruneConfig
from hf_blockprune.cost.flops import count_flops, merged_flops
from hf_blockprune.hub.blockprune_tokens import TokenSchedule, forget_schedule, set_schedule
from hf_blockprune.model.targets import find_targets


def merge(model: PreTrainedModel, dense: PreTrainedModel, share: float) -> PreTrainedModel:
    """The model, in which tokens merge.

    Args:
        model: with the dense one's layers, perhaps block-sparse.
        dense: a ViT that reads its class token, left without merging unless it is the model.
        share: of the dense model's FLOPs that it would have with tokens that merge; more where no more patches leave.
    """
    names, flops, layers = find_targets(dense, BlockPruneConfig()), count_flops(dense), dense.config.num_hidden_layers
    patches = (dense.config.image_size // dense.config.patch_size) ** 2
    schedule = TokenSchedule((0,) * layers, patches)
    for leave in range(1 + (patches - 1) // max(1, layers - 1)):
        unread = patches - 1 - leave * (layers - 1)  # of which the last layer is rid before its MLP
        schedule = TokenSchedule((*[leave] * (layers - 1), unread), patches)
        set_schedule(dense, schedule, names)
        if merged_flops(dense, flops).total <= share * flops.total:
            break
    forget_schedule(dense)
    set_schedule(model, schedule, names)
    return model
