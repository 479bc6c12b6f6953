"""Everything that block-sparse layers of a model do together where nobody looks at them one by one, and its undoing."""

from torch import nn

from .blockprune_fusion import fuse_activations, share_inputs, unfuse_activations
from .blockprune_layers import block_sparse_layers
from .blockprune_tokens import work_as_before, work_by_halves


def fuse(model: nn.Module) -> None:
    """Let block-sparse layers work together, in place; predictions stay the same, but for rounding."""
    fuse_activations(model)
    share_inputs(model)
    work_by_halves(model, [name for name, _ in block_sparse_layers(model)])


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`, in place."""
    unfuse_activations(model)
    work_as_before(model)
    for _, layer in block_sparse_layers(model):
        layer.shared_input = None
