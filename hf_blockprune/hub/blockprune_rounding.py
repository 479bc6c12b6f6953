"""Models whose block-sparse layers are in int8, made of floating ones and back."""

from typing import TypeVar

from transformers.modeling_utils import PreTrainedModel

from .blockprune_headers import SCALE_NAME
from .blockprune_int8_linear import Int8BlockSparseLinear
from .blockprune_layers import block_sparse_layers, is_int8, is_pruned
from .blockprune_layout import BlockSparseFormatError
from .blockprune_names import unstorable
from .blockprune_quantizer import choose_storage, update_config
from .blockprune_together import fuse, unfuse

Model = TypeVar("Model", bound=PreTrainedModel)


def quantize(model: Model) -> Model:
    """Round the weights of a model's block-sparse layers to int8, in place; for inference.

    What is left dense stays as it is: patch embedding, norms, classifier. `model.dequantize()` gives back Linears of
    the rounded weights.

    Args:
        model: a pruned `PreTrainedModel`; one that is in int8 already is left alone.

    Returns:
        The model, ready for inference and `save_pretrained`.

    Raises:
        BlockSparseFormatError: it has no block-sparse layers, a weight is not finite, or scales could not be stored;
            nothing was changed.
    """
    layers = {name: layer for name, layer in block_sparse_layers(model) if not is_int8(layer)}
    if not is_pruned(model):
        raise BlockSparseFormatError(f"{type(model).__name__}: has no block-sparse layers to quantize")
    if lost := unstorable(model, layers, (SCALE_NAME,)):
        raise BlockSparseFormatError(f"{lost[0]}: its {SCALE_NAME} would not be found again in a checkpoint")
    rounded = {}
    for name, layer in layers.items():
        try:
            rounded[name] = Int8BlockSparseLinear.from_float(layer)
        except BlockSparseFormatError as error:
            raise BlockSparseFormatError(f"{name}.{error}") from error
    unfuse(model)
    for name, layer in rounded.items():
        model.set_submodule(name, layer)
    fuse(model)
    update_config(model)
    return model


def unquantize(model: Model) -> Model:
    """Give block-sparse layers in int8 floating weights again, in place: those that the whole numbers stand for."""
    unfuse(model)
    for name, layer in list(block_sparse_layers(model)):
        if is_int8(layer):
            model.set_submodule(name, layer.to_float())
    choose_storage(model)
    fuse(model)
    update_config(model)
    return model
