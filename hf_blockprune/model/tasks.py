"""What a model's outputs mean: classes of which one is right, classes that are each right or not, or numbers.

Each task is a distribution over labels that the outputs are the parameters of. All else follows from it: the loss is
the negative log-likelihood without constants, the true Fisher's labels are drawn from it, and the divergence of two
models is the Kullback-Leibler divergence of their distributions.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig


NO_LABEL = -1
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class SingleLabel:
    """One class an image: a softmax over the outputs. Labels are class indices, int64 [images], NO_LABEL for none."""

    outputs: int
    problem = SINGLE

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of outputs [images, classes], [images]."""
        return F.cross_entropy(outputs, labels, reduction="none")

    def sample(self, outputs: Tensor, index: Tensor, seed: int) -> Tensor:
        """A label an image from the model's own prediction; the image's position determines the draw."""
        uniform = torch.cat([torch.rand(1, generator=g) for g in _generators(index, seed)])
        cumulative = outputs.detach().double().softmax(dim=-1).cumsum(dim=-1)
        uniform = uniform.to(cumulative.device, cumulative.dtype)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, uniform).squeeze(1).clamp(max=outputs.shape[-1] - 1)

    def divergence(self, wanted: Tensor, have: Tensor) -> Tensor:
        """KL(wanted || have) in nats from outputs [images, classes], [images]."""
        return F.kl_div(have.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)

    def hard(self, wanted: Tensor) -> Tensor:
        """The labels that outputs take for the most likely."""
        return wanted.argmax(-1)


@dataclass(frozen=True)
class MultiLabel:
    """Several classes an image, by a sigmoid of each output. Labels are zeros and ones, float [images, classes]."""

    outputs: int
    problem = MULTI

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Binary cross entropy of outputs [images, classes], the sum over classes, [images]."""
        return F.binary_cross_entropy_with_logits(outputs, labels.to(outputs), reduction="none").sum(-1)

    def sample(self, outputs: Tensor, index: Tensor, seed: int) -> Tensor:
        """Labels of each image from the model's own prediction; the image's position determines the draw."""
        uniform = torch.stack([torch.rand(outputs.shape[-1], generator=g) for g in _generators(index, seed)])
        return (uniform.to(outputs.device) < outputs.detach().float().sigmoid()).to(outputs)

    def divergence(self, wanted: Tensor, have: Tensor) -> Tensor:
        """KL(wanted || have) in nats from outputs [images, classes], the sum over classes, [images]."""
        share = wanted.sigmoid()
        yes = share * (F.logsigmoid(wanted) - F.logsigmoid(have))
        no = (1 - share) * (F.logsigmoid(-wanted) - F.logsigmoid(-have))
        return (yes + no).sum(-1)

    def hard(self, wanted: Tensor) -> Tensor:
        """The labels that outputs take for the most likely."""
        return (wanted > 0).to(wanted)


@dataclass(frozen=True)
class Regression:
    """Numbers: each output is the mean of a normal distribution. Labels are numbers, float [images, outputs].

    Attributes:
        variance: of each normal distribution; it is the unit that a divergence is measured in.
    """

    outputs: int
    variance: float = 1.0
    problem = REGRESSION

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Half the squared error of outputs [images, outputs], the sum over outputs, [images]."""
        return (outputs - labels.to(outputs)).square().sum(-1) / 2

    def sample(self, outputs: Tensor, index: Tensor, seed: int) -> Tensor:
        """Labels of each image, normal about the model's own prediction; the image's position determines the draw."""
        noise = torch.stack([torch.randn(outputs.shape[-1], generator=g) for g in _generators(index, seed)])
        return outputs.detach() + noise.to(outputs)

    def divergence(self, wanted: Tensor, have: Tensor) -> Tensor:
        """KL(wanted || have) in nats: half the squared distance over the variance, the sum over outputs, [images]."""
        return (wanted - have).square().sum(-1) / (2 * self.variance)

    def scaled(self, wanted: Tensor) -> "Regression":
        """In units of how much a model's answers [images, outputs] vary, so that divergences have none."""
        spread = float(wanted.double().var(0, unbiased=False).sum()) if len(wanted) else 0.0
        return Regression(self.outputs, spread or self.variance)


Task = SingleLabel | MultiLabel | Regression


def task_of(config: "PreTrainedConfig", *, several: bool = False) -> Task:
    """What a model's outputs mean, by the rule of transformers.

    Args:
        config: the model's; `problem_type` decides, where it is None one output is a number, and more are classes.
        several: whether the labels at hand are several numbers an image; where `problem_type` is None, more than one
            output are then classes that are each right or not.

    Raises:
        ModelError: `problem_type` is none, or does not fit the number of outputs.
    """
    problem, outputs = getattr(config, "problem_type", None), config.num_labels
    if problem is None:
        problem = REGRESSION if outputs == 1 else MULTI if several else SINGLE
    kinds = {SINGLE: SingleLabel, MULTI: MultiLabel, REGRESSION: Regression}
    if problem not in kinds:
        raise ModelError(
            f"problem_type: expected one of {', '.join(kinds)}, got {problem!r}; set it in the model's config"
        )
    if problem == SINGLE and outputs == 1:
        raise ModelError(
            "the model has one output, which is no choice among classes; set problem_type in its config to "
            f"{MULTI!r} for a class that is there or not, or to {REGRESSION!r} for a number"
        )
    return kinds[problem](outputs)


def missing(labels: Tensor) -> Tensor:
    """Which images have no label, bool [images]."""
    return labels.flatten(1).isnan().any(1) if labels.is_floating_point() else labels == NO_LABEL


def _generators(index: Tensor, seed: int) -> list[torch.Generator]:
    """One for each image; an image's draws depend on its position alone, not on processes or batches."""
    return [torch.Generator().manual_seed(seed * SEED_STRIDE + i) for i in index.tolist()]
