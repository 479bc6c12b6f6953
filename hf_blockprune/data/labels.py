"""Labels of a data set as those of a model: class indices, sets of classes, or numbers; what does not fit, is none."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import logging

from ..errors import DataError
from ..model.tasks import MULTI, NO_LABEL, REGRESSION, SINGLE, task_of
from .class_names import ClassNames

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig


logger = logging.get_logger(__name__)
SHOWN = 5


class Labels:
    """Turns labels of a data set into those that a model's task takes.

    Args:
        class_names: the data set's names of its classes by index, None where it has none.
        model_config: of a transformers model.
        name: of the data set, for messages.
        listed: whether its labels are lists.
        fixed: the length of those lists where it is always the same.
        by: "name" finds classes by what they are called; "position" takes the data set's numbers for the model's.

    Attributes:
        task: what the model's outputs mean.
        usable: of the data set's classes, by index: the model's class, or None where that is unknown.
    """

    def __init__(
        self,
        class_names: Sequence[str] | None,
        model_config: "PreTrainedConfig",
        name: str,
        *,
        listed: bool = False,
        fixed: int | None = None,
        by: str = "name",
    ) -> None:
        self.task = task_of(model_config, several=listed)
        self.class_names, self.name, self.by, self.fixed = class_names, name, by, fixed
        self.classes = ClassNames.of(model_config)
        if listed and self.task.problem == SINGLE:
            raise DataError(
                f"{name}: the label column holds lists, not one label an image; name another as label_column, or, for "
                f"a model with several labels an image, set its config's problem_type to {MULTI!r}"
            )
        self.usable: list[int | None] | None = None
        if class_names is not None and self.task.problem != REGRESSION:
            self.usable = list(range(len(class_names))) if by == "position" else self._by_name(class_names)

    @property
    def outputs(self) -> int:
        """The model's number of classes."""
        return len(self.classes.names)

    def tensor(self, labels: Sequence[object]) -> Tensor:
        """Labels of some images as the task takes them; None where there is none."""
        values = [self(label) for label in labels]
        return torch.tensor(values, dtype=torch.int64 if self.task.problem == SINGLE else torch.float32)

    def __call__(self, label: object) -> int | list[float]:
        """A class index, or numbers by output.

        Raises:
            DataError: it is none of the model's classes, or no such thing as the task takes.
        """
        if self.task.problem == SINGLE:
            return self._index(label)
        if label is None or _is_nan(label):
            return [math.nan] * self.task.outputs
        return self._numbers(label) if self.task.problem == REGRESSION else self._several(label)

    def _index(self, label: object) -> int:
        """NO_LABEL for None, and for the -1 of `datasets`."""
        if isinstance(label, str):
            return self._named(label)
        if label is None or _is_nan(label):
            return NO_LABEL
        index = self._whole(label)
        if self.usable is not None and 0 <= index < len(self.usable):
            return self._used(index)
        return self._inside(index)

    def _inside(self, index: int) -> int:
        if not NO_LABEL <= index < self.outputs:
            last = self.outputs - 1
            raise DataError(
                f"{self.name}: label {index} lies outside the model's {self.outputs} classes (0 to {last}); use "
                "the model's class indices or give the class names of the model"
            )
        return index

    def _whole(self, label: object) -> int:
        if isinstance(label, bool):
            found = self.classes.find(str(label))
            if len(found) == 1:
                return next(iter(found))
            if self.outputs != 2:
                raise DataError(f"{self.name}: label {label} says yes or no, the model has {self.outputs} classes")
        if isinstance(label, (bool, int)) or (isinstance(label, float) and label.is_integer()):
            return int(label)
        raise DataError(
            f"{self.name}: label {label!r} is no class index; expected whole numbers from 0 to {self.outputs - 1}, or "
            f"names; for a model that predicts numbers, set its config's problem_type to {REGRESSION!r}"
        )

    def _named(self, label: str) -> int:
        found = self.classes.find(label) if self.by == "name" else set()
        number = self.classes.number(label)
        if len(found) == 1:
            return next(iter(found))
        if not found and number is not None:
            return number
        if found:
            raise DataError(f"{self.name}: label {label!r} may be {self._several_classes(found)}; use class indices")
        nearest = self.classes.nearest(label)
        raise DataError(
            f"{self.name}: label {label!r} is no class of the model; expected names such as "
            f"{nearest or next(iter(self.classes.names), None)!r}, class indices, or one folder a class"
        )

    def _several_classes(self, found: set[int]) -> str:
        return " or ".join(f"class {index} ({self.classes.names[index]!r})" for index in sorted(found)[:SHOWN])

    def _by_name(self, class_names: Sequence[str]) -> list[int | None]:
        """The model's class of each of the data set's, by whatever both know; else by number, or by position."""
        found = [self.classes.find(name) for name in class_names]
        if not any(found):
            return self._by_number(class_names)
        sure = [next(iter(classes)) if len(classes) == 1 else None for classes in found]
        # A list that is the model's own, but for names that are in doubt, settles those by their places.
        own = len(sure) == self.outputs and all(index in (None, place) for place, index in enumerate(sure))
        for place, index in enumerate(sure):
            if index is None and own and place in self._candidates(class_names[place]):
                sure[place] = place
        return sure

    def _candidates(self, name: str) -> set[int]:
        """Also of a name that was numbered to tell it from another, as "crane2"."""
        return self.classes.find(name) or self.classes.find(name.rstrip("0123456789").rstrip(" _-"))

    def _by_number(self, class_names: Sequence[str]) -> list[int | None]:
        numbers = [self.classes.number(name) for name in class_names]
        if None not in numbers:
            if self.classes.generic and numbers != list(range(len(numbers))):
                logger.warning(
                    f"{self.name}: the names of its classes are numbers and taken for class indices; where the model "
                    "numbers classes as the data set does, say labels_by position"
                )
            return numbers
        if self.classes.generic and len(class_names) == self.outputs and not any(n.isdecimal() for n in class_names):
            logger.warning(
                f"{self.name}: the model has no names for its classes, so the data set's {len(class_names)} are taken "
                f"in their order ({class_names[0]!r} for {self.classes.names[0]}, ...); set the model's config.id2label"
            )
            return list(range(len(class_names)))
        return [None] * len(class_names)

    def _used(self, index: int) -> int:
        assert self.usable is not None
        assert self.class_names is not None
        found = self.usable[index]
        if found is None:
            raise self._unknown([place for place, known in enumerate(self.usable) if known is None])
        return self._inside(found)

    def _unknown(self, places: Sequence[int]) -> DataError:
        """These of the data set's classes, by index, cannot be told for one of the model's."""
        assert self.class_names is not None
        said = []
        for place in places[:SHOWN]:
            name = self.class_names[place]
            found, nearest = self.classes.find(name), self.classes.nearest(name)
            hint = (
                f" (may be {self._several_classes(found)})" if found else f" (nearest: {nearest!r})" if nearest else ""
            )
            said.append(f"{name!r}{hint}")
        more = ", ..." if len(places) > SHOWN else ""
        return DataError(
            f"{self.name}: {len(places)} of its {len(self.class_names)} classes cannot be told for one of the model's: "
            f"{', '.join(said)}{more}; call them as the model's config.id2label does "
            f"({', '.join(map(repr, self.classes.names[:3]))}, ...), leave them out, or, where both number their "
            "classes alike, say labels_by position"
        )

    def _numbers(self, label: object) -> list[float]:
        parts = list(label) if isinstance(label, (list, tuple)) else [label]
        if self.class_names is not None:
            parts = [self.class_names[part] if isinstance(part, int) and part >= 0 else part for part in parts]
        numbers = [number for part in parts if (number := _number(part)) is not None]
        if not len(numbers) == len(parts) == self.task.outputs or not all(map(math.isfinite, numbers)):
            what = "a number" if self.task.outputs == 1 else f"{self.task.outputs} numbers"
            said = parts[0] if len(parts) == 1 else parts
            raise DataError(
                f"{self.name}: label {said!r} does not fit; the model predicts {what}, so each image needs {what}, all "
                "of them finite, or none at all"
            )
        return numbers

    def _several(self, label: object) -> list[float]:
        """Zeros and ones by class, from such, or from a list of classes."""
        if not isinstance(label, (list, tuple)):
            if self.outputs != 1:
                raise DataError(
                    f"{self.name}: label {label!r} is no list; the model has several labels an image, so each image "
                    f"needs a list of classes, or of {self.outputs} zeros and ones (in a folder: metadata.jsonl)"
                )
            label = [label]
        if self.usable is None and self._is_multi_hot(label):
            return [1.0 if part else 0.0 for part in label]
        chosen = [0.0] * self.outputs
        for part in label:
            index = self._index(part) if not isinstance(part, float) or part.is_integer() else None
            if index is None or index == NO_LABEL:
                raise DataError(
                    f"{self.name}: {part!r} in the label {label} is no class; expected class indices or names, or "
                    f"{self.outputs} zeros and ones"
                )
            chosen[index] = 1.0
        return chosen

    def _is_multi_hot(self, label: Sequence[object]) -> bool:
        """Zeros and ones by class; a list of two classes by index looks the same where the model has but two."""
        if len(label) != self.outputs or any(isinstance(part, str) or part not in (0, 1) for part in label):
            return False
        numbers = all(type(part) is int for part in label)
        if numbers and self.fixed is None and len(set(label)) == len(label) == 2:
            raise DataError(
                f"{self.name}: label {list(label)} may be a list of classes, or say for each of the 2 whether it is "
                "there; store the latter as bool or float"
            )
        return True


def _number(value: object) -> float | None:
    """A value as a number, also one that is written out; None where it is none."""
    try:
        return float(value)  # pyright: ignore[reportArgumentType]  (tensors and NumPy's numbers are such too)
    except (TypeError, ValueError):
        return None


def _is_nan(label: object) -> bool:
    return isinstance(label, float) and math.isnan(label)
