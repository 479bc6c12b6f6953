"""Evaluation mode for as long as something is measured: dropout would make it another thing each time."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode; afterwards each is as it was, those frozen in training included.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4).eval()).train(True)
        >>> _ = model[1].eval()
        >>> with evaluating(model):
        ...     model[0].training
        False
        >>> model[0].training, model[1].training
        (True, False)
    """
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
