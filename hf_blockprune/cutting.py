"""Hidden units that pruning left without a writer and a reader, cut out of the shapes themselves."""

import math

from torch import Tensor, nn

from .hub.blockprune_linear import BlockSparseLinear
from .hub.blockprune_quantizer import update_config
from .structure import TransformerLayer


def cut_hidden_units(model: nn.Module, layers: list[TransformerLayer]) -> dict[str, int]:
    """Cut units of the MLPs whose fc1 rows and fc2 columns hold no block; the model's function stays the same.

    Units go in groups that are whole blocks on both sides. One group stays where all could go.

    Args:
        model: a transformers model whose fc1 and fc2 are `BlockSparseLinear`; changed in place.
        layers: the layers to look at.

    Returns:
        Number of units cut, by the name of their fc1.
    """
    counts = {}
    for layer in layers:
        fc1, fc2 = model.get_submodule(layer.fc1), model.get_submodule(layer.fc2)
        assert isinstance(fc1, BlockSparseLinear)
        assert isinstance(fc2, BlockSparseLinear)
        rows, cols = fc1.block_shape
        stays = _stays(fc1, fc2, math.lcm(rows, cols))
        counts[layer.fc1] = int((~stays).sum())
        if counts[layer.fc1]:
            model.set_submodule(layer.fc1, fc1.cut(rows=stays[::rows]))
            model.set_submodule(layer.fc2, fc2.cut(cols=stays[::cols]))
    update_config(model)
    return counts


def _stays(fc1: BlockSparseLinear, fc2: BlockSparseLinear, group: int) -> Tensor:
    """For each hidden unit, whether its group has a block on either side; bool [units]."""
    rows, cols = fc1.block_shape
    made = fc1.mask().any(dim=1).repeat_interleave(rows)[: fc1.out_features]
    read = fc2.mask().any(dim=0).repeat_interleave(cols)[: fc2.in_features]
    used = nn.functional.pad(made | read, (0, -len(made) % group)).view(-1, group).any(dim=1)
    if not used.any():
        used[0] = True
    return used.repeat_interleave(group)[: len(made)]
