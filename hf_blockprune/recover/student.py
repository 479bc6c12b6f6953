"""The model that learns in a recovery: dense, so that all of it can learn, with removed blocks as zeros that cannot."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from ..hub.blockprune_fusion import unfuse
from ..hub.blockprune_layout import pack
from ..hub.blockprune_quantizer import block_sparse_layers
from ..model.copying import copied
from ..score.blocks import expand_mask


class _Scaled(nn.Module):
    """A parametrization that multiplies each row and each column of a weight by a factor of its own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.ones_like(weight[:, :1]))
        self.cols = nn.Parameter(torch.ones_like(weight[:1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.rows * self.cols


def dense_copy(model: nn.Module) -> nn.Module:
    """The model in single precision, with removed blocks as zeros that get no gradient, and factors that learn."""
    student = nn.Module.float(copied(model))  # transformers refuses to cast what it takes for quantised
    unfuse(student)
    for name, module in list(block_sparse_layers(student)):
        linear = module.to_dense()
        removed = ~expand_mask(module.mask(), tuple(linear.weight.shape), module.block_shape)
        student.set_submodule(name, linear)
        linear.weight.register_hook(lambda grad, removed=removed: grad.masked_fill(removed, 0))
        register_parametrization(linear, "weight", _Scaled(linear.weight.detach()))
    return student.eval()


@torch.no_grad()
def write_back(student: nn.Module, model: nn.Module) -> None:
    """Give a block-sparse model the weights of its `dense_copy`, in place."""
    sparse = dict(block_sparse_layers(model))
    for name, module in sparse.items():
        linear: Any = student.get_submodule(name)
        whole = linear.weight  # layers may hold it so, or its kept blocks
        packed = module.weight.dim() == 3
        module.weight.copy_(pack(whole, module.mask(), module.block_shape).weight if packed else whole)
        if module.bias is not None:
            module.bias.copy_(linear.bias)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in sparse:
            parameter.copy_(student.get_parameter(name))
