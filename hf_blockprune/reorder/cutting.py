"""Hidden units that pruning left without a writer and a reader, cut out of the shapes themselves."""

from transformers import PreTrainedModel

from ..hub.blockprune_linear import BlockSparseLinear
from ..hub.blockprune_quantizer import update_config
from ..model.structure import TransformerLayer
from ..score.blocks import used_units


def cut_hidden_units(model: PreTrainedModel, layers: list[TransformerLayer]) -> dict[str, int]:
    """Cut units of the MLPs whose fc1 rows and fc2 columns hold no block (see `used_units`); the function stays.

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
        stays = used_units(fc1.mask(), fc2.mask(), fc1.block_shape, fc1.out_features)
        counts[layer.fc1] = int((~stays).sum())
        if counts[layer.fc1]:
            model.set_submodule(layer.fc1, fc1.cut(rows=stays[::rows]))
            model.set_submodule(layer.fc2, fc2.cut(cols=stays[::cols]))
    update_config(model)
    return counts
