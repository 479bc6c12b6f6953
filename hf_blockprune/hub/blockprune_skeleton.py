"""A model without its weights, on the meta device: it says what the model would do, and computes nothing."""

import copy
from types import FunctionType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from .blockprune_heads import restore_heads
from .blockprune_layers import block_sparse_layers
from .blockprune_together import unfuse
from .blockprune_tokens import forget_schedule

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

Module = TypeVar("Module", bound=nn.Module)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What accelerate puts on a module that it moves inputs or weights for.
MOVING, MOVED_FORWARD = "_hf_hook", "_old_forward"
COMPILED = "_orig_mod"  # what torch.compile calls the module that it puts itself around
CHANNEL_NAMES = ("num_channels", "in_channels", "in_chans")
NO_COPY = (TypeError, RuntimeError, NotImplementedError, copy.Error)  # what is raised by that which has none
OWN = ("_parameters", "_buffers", "_modules")  # are a copy's own in any case


def skeleton(model: Module) -> Module:
    """A copy of a model on the meta device, block-sparse layers dense, in evaluation mode; no weight is copied.

    Layers and attentions have the architecture's sizes, and no tokens merge. It is made of the model itself, not of its
    class and config: constructors may take more than a config. What others hooked to the model is neither copied nor
    called. Names are the model's, but for `COMPILED` in them.
    """
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [value for module in model.modules() for value in vars(module).values() if torch.is_tensor(value)]
    memo: dict[int, object] = {id(tensor): _weightless(tensor) for tensor in tensors}
    for module in model.modules():
        memo |= {id(hooks): type(hooks)() for name in HOOKS if (hooks := getattr(module, name, None)) is not None}
        if (moving := vars(module).get(MOVING)) is not None:
            memo[id(moving)] = moving  # it may hold the weights
    made = _uncompiled(deep_copy(model, memo))
    for module in made.modules():
        if MOVING in vars(module):  # would move inputs to where the weights lie
            for name in (MOVING, MOVED_FORWARD, "forward"):
                vars(module).pop(name, None)
        if replaced_forward(module):
            del module.forward
    unfuse(made)
    for name, module in list(block_sparse_layers(made)):
        rows, cols = module.dense_shape or (module.out_features, module.in_features)
        linear = nn.Linear(cols, rows, module.bias is not None, device="meta", dtype=module.dtype)
        made.set_submodule(name, linear)
    restore_heads(made)
    forget_schedule(made)
    return made.eval()


def _uncompiled(module: Module) -> Module:
    """A module without what `torch.compile` put around it and its parts, which it changes in place."""
    while COMPILED in module._modules:
        module = getattr(module, COMPILED)
    for name, part in module.named_children():
        module._modules[name] = _uncompiled(part)
    return module


def _weightless(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def channels_of(config: "PreTrainedConfig", model: nn.Module | None = None) -> int:
    """Channels of the images that a model takes: what its config says, or its first convolution, or 3."""
    for holder in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        for name in CHANNEL_NAMES:
            if isinstance(found := getattr(holder, name, None), int):
                return found
    modules = model.modules() if model is not None else ()
    return next((module.in_channels for module in modules if isinstance(module, nn.Conv2d)), 3)


def replaced_forward(module: nn.Module) -> bool:
    """Whether a function that holds a module, which it goes on calling in a copy, stands in place of forward."""
    found = vars(module).get("forward")
    if not isinstance(found, FunctionType):
        return False
    held = [*(found.__defaults__ or ()), *(found.__kwdefaults__ or {}).values()]
    held += [cell.cell_contents for cell in found.__closure__ or ()]
    return any(isinstance(getattr(value, "__self__", value), nn.Module) for value in held)


def deep_copy(model: Module, memo: dict[int, object]) -> Module:
    """A deep copy; what a module holds that has none is shared with the original.

    Args:
        model: any module.
        memo: what stands for what in the copy, by id, as of `copy.deepcopy`.
    """
    try:
        return copy.deepcopy(model, dict(memo))
    except NO_COPY:
        held = [value for part in model.modules() for name, value in vars(part).items() if name not in OWN]
        # A dictionary, such as that of hooks, is one of its own, so that what is added to one is not in the other.
        shared = {id(value): copy.copy(value) if isinstance(value, dict) else value for value in held}
        return copy.deepcopy(model, memo | {key: shared[key] for key in _without_copy(held, memo)})


def _without_copy(held: list[object], memo: dict[int, object]) -> set[int]:
    """Ids of values that cannot be copied."""
    found = set()
    for value in held:
        try:
            copy.deepcopy(value, dict(memo))
        except NO_COPY:
            found.add(id(value))
    return found
