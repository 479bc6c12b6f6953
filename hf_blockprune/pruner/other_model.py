"""The other model that one is compared with, or learns from: one reading of `against` and of `teacher`."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from ..errors import ModelError
from ..evaluate.accuracy import Outputs, Predictions
from ..evaluate.fidelity import Embeddings
from ..hub.blockprune_layers import is_pruned
from .loaded_model import LoadedModel

AGAINST, TEACHER = "to compare with (against=, --against)", "as teacher"  # what it is wanted for
ENCODER = "is an encoder, which has no accuracy"
ANSWERS = (Predictions, Outputs, Embeddings)


def misfit(name: str, wanted: str, why: str | None = None) -> ModelError:
    """The error where another model is missing or does not fit.

    Args:
        name: of the model at hand.
        wanted: `AGAINST` or `TEACHER`.
        why: what is wrong, a sentence that begins with that name.
    """
    return ModelError(f"{name}{f' {why};' if why else ':'} name the dense model it was pruned from {wanted}")


Answers = TypeVar("Answers", bound=Predictions | Outputs | Embeddings)


@dataclass
class OtherModel(Generic[Answers]):
    """Another model, or what it answered; loaded when it is asked for, so that what costs less is looked at first.

    Args:
        asker: the model at hand.
        given: a name, a folder or a pruner; None where there are answers.
        answers: `Predictions`, `Outputs` or `Embeddings`, None where the model itself is there to ask.
    """

    asker: LoadedModel
    given: str | Path | LoadedModel | None
    answers: Answers | None = None

    @cached_property
    def pruner(self) -> LoadedModel:
        """The model with its processor.

        Raises:
            ModelError: it cannot be loaded.
        """
        assert self.given is not None
        if isinstance(self.given, (str, Path)):
            return type(self.asker).from_pretrained(self.given, accelerator=self.asker.accelerator)
        return self.given

    @cached_property
    def is_dense(self) -> bool:
        """Whether it is no pruned one; of mere answers nobody knows, and they are believed."""
        return self.answers is not None or not is_pruned(self.pruner.model)

    @property
    def named(self) -> dict[str, str]:
        """For reports: its name as `against`, where it has one and is dense."""
        return {"against": self.pruner.name} if self.answers is None and self.is_dense else {}


def find_other(
    asker: LoadedModel, given: object, wanted: str = AGAINST, *, answers: tuple[type[Answers], ...] = ()
) -> OtherModel[Answers] | None:
    """What a caller means by another model; None where he named none.

    Args:
        asker: the model at hand.
        given: a name, a folder or a `BlockPruner`, or answers of one.
        wanted: `AGAINST` or `TEACHER`.
        answers: kinds of answers that do as well.

    Raises:
        ModelError: it is something else.
    """
    if given is None:
        return None
    if isinstance(given, (str, Path, LoadedModel)):
        return OtherModel(asker, given)
    if isinstance(given, answers):
        return OtherModel(asker, None, given)
    cannot = "cannot be compared with" if wanted == AGAINST else "cannot learn from"
    raise misfit(asker.name, wanted, f"{cannot} {type(given).__name__}")
