"""What a training run holds beside its model, as plain tensors: of one process, of several, or sharded over them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def whole(tensor: Tensor) -> Tensor:
    """A tensor without gradient; one that is sharded over processes is put together on each of them."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Write a plain tensor's values into one that may be sharded."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)  # type: ignore
    tensor.copy_(value)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters and buffers, whole, on the CPU."""
    return {name: whole(value).cpu().clone() for name, value in model.state_dict().items()}


class Average:
    """An exponential average of weights: average <- decay average + (1 - decay) weight after each step.

    Args:
        parameters: what is averaged, by name; the average begins at their values.
        decay: share of the average that stays.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """After a step."""
        for name, value in self.values.items():
            value.lerp_(parameters[name].detach(), 1 - self.decay)


def moments_of(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state as plain tensors by "moment/parameter", whole, on the CPU; empty before the first step."""
    return {
        f"{moment}/{name}": whole(optimizer.state[parameter][moment]).cpu().clone()
        for name, parameter in parameters.items()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def set_moments(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], moments: dict[str, Tensor]
) -> None:
    """Give AdamW the state that `moments_of` returned."""
    for name, parameter in parameters.items():
        if f"step/{name}" not in moments:
            continue
        state = {"step": moments[f"step/{name}"].clone()}
        for moment in MOMENTS[:2]:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            fill(state[moment], moments[f"{moment}/{name}"])
        optimizer.state[parameter] = state


def decay_groups(
    model: nn.Module, parameters: dict[str, nn.Parameter], weight_decay: float
) -> list[dict[str, list[nn.Parameter] | float]]:
    """Parameter groups of an optimizer: weights of matrices, which decay, and all others, which do not.

    Args:
        model: a transformers model, dense or with block-sparse layers.
        parameters: those that learn, by name.
        weight_decay: share of a weight that goes at each step, times the learning rate.

    Returns:
        For each group that is not empty its `params` and its `weight_decay`.
    """
    decaying = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "BlockSparseLinear"
    }
    some = [parameter for name, parameter in parameters.items() if name in decaying]
    others = [parameter for name, parameter in parameters.items() if name not in decaying]
    groups: list[dict[str, list[nn.Parameter] | float]] = [
        {"params": some, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def freeze_unused(model: nn.Module, pixels: Tensor) -> None:
    """Take parameters that predictions do not depend on out of the training: processes would wait for their gradients.

    Args:
        model: a transformers image classifier.
        pixels: [1, channels, height, width].
    """
    model(pixel_values=pixels).logits.sum().backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
        parameter.grad = None
