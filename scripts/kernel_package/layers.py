"""Layers without a state of their own: `kernels` puts their forward pass in place of another layer's."""

import torch
from torch import nn

from .blockprune_ops import block_sparse_linear


class BlockSparseLinear(nn.Module):
    """The forward pass of `hf_blockprune.BlockSparseLinear`, each layer by itself."""

    can_torch_compile = True

    weight: torch.Tensor
    crow_indices: torch.Tensor
    col_indices: torch.Tensor
    bias: torch.Tensor | None
    out_features: int
    activation: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return block_sparse_linear(
            x,
            self.weight,
            self.crow_indices,
            self.col_indices,
            self.bias,
            out_features=self.out_features,
            activation=self.activation,
        )
