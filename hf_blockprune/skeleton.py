"""A model without its weights, on the meta device: it says what the model would do, and computes nothing."""

from typing import Any

import torch
from torch import Tensor, nn

from .copying import deep_copy, replaced_forward
from .hub.blockprune_fusion import unfuse
from .hub.blockprune_quantizer import block_sparse_layers

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CHANNEL_NAMES = ("num_channels", "in_channels", "in_chans")


def skeleton(model: nn.Module) -> Any:
    """A copy of a model on the meta device, block-sparse layers dense, in evaluation mode; no weight is copied.

    It is made of the model itself, not of its class and config: constructors may take more than a config. What others
    hooked to the model is neither copied nor called.
    """
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    tensors += [value for module in model.modules() for value in vars(module).values() if torch.is_tensor(value)]
    memo: dict[int, Any] = {id(tensor): _weightless(tensor) for tensor in tensors}
    for module in model.modules():
        memo |= {id(hooks): type(hooks)() for name in HOOKS if (hooks := getattr(module, name, None)) is not None}
    made: Any = deep_copy(model, memo)
    if any(hasattr(module, "_hf_hook") for module in made.modules()):
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(made)  # they would move inputs to where the weights lie
    for module in made.modules():
        if replaced_forward(module):
            del module.forward
    unfuse(made)
    for name, module in list(block_sparse_layers(made)):
        rows, cols = module.dense_shape or (module.out_features, module.in_features)
        linear = nn.Linear(cols, rows, module.bias is not None, device="meta", dtype=module.weight.dtype)
        made.set_submodule(name, linear)
    return made.eval()


def _weightless(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def channels_of(config: Any, model: nn.Module | None = None) -> int:
    """Channels of the images that a model takes: what its config says, or its first convolution, or 3."""
    for holder in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        for name in CHANNEL_NAMES:
            if isinstance(found := getattr(holder, name, None), int):
                return found
    modules = model.modules() if model is not None else ()
    return next((module.in_channels for module in modules if isinstance(module, nn.Conv2d)), 3)
