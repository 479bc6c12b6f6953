"""The model that learns in a recovery: dense, so that all of it can learn, with removed blocks as zeros that cannot."""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedModel

from ..hub.blockprune_layers import block_sparse_layers
from ..hub.blockprune_layout import pack
from ..hub.blockprune_together import unfuse
from ..model.copying import copied
from ..model.layers import linear_in
from ..score.blocks import expand_mask

Model = TypeVar("Model", bound=PreTrainedModel)


class _Scaled(nn.Module):
    """A parametrization that multiplies each row and each column of a weight by a factor of its own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.ones_like(weight[:, :1]))
        self.cols = nn.Parameter(torch.ones_like(weight[:1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.rows * self.cols


def single_precision(model: Model) -> Model:
    """A copy in single precision; transformers itself refuses to cast what it takes for quantised."""
    copy = copied(model)
    nn.Module.float(copy)
    return copy


def dense_copy(model: Model) -> Model:
    """The model in single precision, with removed blocks as zeros that get no gradient, and factors that learn."""
    student = single_precision(model)
    unfuse(student)
    for name, module in list(block_sparse_layers(student)):
        linear = module.to_dense()
        removed = ~expand_mask(module.mask(), (linear.out_features, linear.in_features), module.block_shape)
        student.set_submodule(name, linear)
        linear.weight.register_hook(lambda grad, removed=removed: grad.masked_fill(removed, 0))
        register_parametrization(linear, "weight", _Scaled(linear.weight.detach()))
    return student.eval()


@torch.no_grad()
def write_back(student: nn.Module, model: nn.Module) -> None:
    """Give a block-sparse model the weights of its `dense_copy`, in place."""
    sparse = dict(block_sparse_layers(model))
    for name, module in sparse.items():
        linear = linear_in(student, name)
        whole = linear.weight  # layers may hold it so, or its kept blocks
        packed = module.weight.dim() == 3
        module.weight.copy_(pack(whole, module.mask(), module.block_shape).weight if packed else whole)
        if module.bias is not None:
            module.bias.copy_(linear.bias)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in sparse:
            parameter.copy_(student.get_parameter(name))
