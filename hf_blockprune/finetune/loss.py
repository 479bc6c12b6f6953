"""Losses of training with labels and with a dense model's answers; each gives one number an image."""

from collections.abc import Sequence

from torch import Tensor

from ..errors import ModelError
from ..model.tasks import SINGLE, MultiLabel, SingleLabel, Task


def label_losses(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """The task's loss with labels that may be smoothed and mixed, [images].

    Args:
        task: what outputs mean.
        outputs: [images, outputs].
        targets: [images, outputs]; for one class an image shares of the classes, of which a row of zeros, for an image
            without a label, has no loss.
    """
    if task.problem == SINGLE:
        return -(targets * outputs.log_softmax(-1)).sum(-1)
    return task.losses(outputs, targets)


def soft_distillation(task: Task, outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of predictions at a temperature T (arXiv 1503.02531), [images].

    Args:
        task: what outputs mean.
        outputs: the student's, [images, outputs].
        wanted: the teacher's, of the same shape.
        temperature: T; the factor T^2 keeps gradients as large as they are at 1.
    """
    return task.divergence(wanted / temperature, outputs / temperature) * temperature**2


def hard_distillation(task: SingleLabel | MultiLabel, outputs: Tensor, wanted: Tensor) -> Tensor:
    """The task's loss with the labels that the teacher takes for the most likely (arXiv 2012.12877), [images].

    Args:
        task: what outputs mean.
        outputs: the student's, [images, outputs].
        wanted: the teacher's, of the same shape.
    """
    return task.losses(outputs, task.hard(wanted))


def hidden_distance(have: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean squared distance of hidden states over the variance of the teacher's, the mean over layers, [images].

    Each image has a variance of its own, so that an image's loss does not depend on those beside it.

    Args:
        have: the student's after each layer, [images, ...].
        wanted: the teacher's, of the same number and shapes.

    Raises:
        ModelError: they differ in number or shape.
    """
    shapes = [[tuple(states.shape) for states in side] for side in (have, wanted)]
    if shapes[0] != shapes[1] or not have:
        raise ModelError(
            "distillation.hidden_weight: the teacher's hidden states have other shapes than the model's; name the "
            "dense model that it was pruned from, or set hidden_weight to 0"
        )
    total = have[0].new_zeros(len(have[0]))
    for mine, other in zip(have, wanted, strict=True):
        spread = other.flatten(1).var(1, unbiased=False).clamp(min=1e-12)
        total = total + (mine - other).square().flatten(1).mean(1) / spread
    return total / len(have)
