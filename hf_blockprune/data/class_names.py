"""The classes of a model by every name that data sets call them: spellings, synonyms, ImageNet's synsets, numbers."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig


IMAGENET_FILE = Path(__file__).with_name("imagenet_classes.txt")
SYNSET = re.compile(r"(n\d{8})(?:[\s_.,-].*)?", re.DOTALL)
NUMBER = re.compile(r"(?:(?:label|class)[\s_-]*)?(\d+)(?:\.0+)?", re.IGNORECASE)
# Of ImageNet's names some are in doubt, such as its two cranes, and a few are often mended.
IN_ORDER = 0.95


def spelling(name: str) -> str:
    """A name without what spellings differ in: capitals, apostrophes, and marks between words.

    Example:
        >>> spelling("Golden_Retriever"), spelling("jack-o'-lantern")
        ('golden retriever', 'jack o lantern')
    """
    plain = re.sub("['\u2019`]", "", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(re.sub(r"[\s_\-./()\[\]{},;:&\"]+", " ", plain).split())


def synonyms(name: str) -> list[str]:
    """The names in a list such as "tench, Tinca tinca"."""
    return [part.strip() for part in name.split(",") if part.strip()]


class ClassNames:
    """Finds classes by name.

    Args:
        names: of the classes by index.
        aliases: further names, as (name, index).
        synsets: WordNet's identifiers of the classes by index, where they are known already.

    Attributes:
        names: as given.
    """

    def __init__(
        self, names: Sequence[str], aliases: Iterable[tuple[str, int]] = (), synsets: Sequence[str] | None = None
    ) -> None:
        self.names = list(names)
        self._exact: dict[str, set[int]] = {}
        self._near: dict[str, set[int]] = {}
        self._loose: dict[str, set[int]] = {}
        self._given_synsets = synsets
        for index, name in enumerate(self.names):
            self._add(name, index)
            match = SYNSET.fullmatch(name)
            known = _imagenet().get(match[1]) if match and synsets is None else None
            if known is not None:
                self._add(known, index)
        for name, index in aliases:
            self._add(name, index)

    @classmethod
    def of(cls, config: "PreTrainedConfig") -> "ClassNames":
        """Those of a transformers config; `id2label` counts, as in pipelines.

        `label2id` adds to it where the two agree, and says it all where `id2label` holds numbers alone.
        """
        by_index = {int(index): str(name) for index, name in (config.id2label or {}).items()}
        names = [by_index.get(index, f"LABEL_{index}") for index in range(config.num_labels or 0)]
        found = cls(names)
        others = _indices(getattr(config, "label2id", None), len(names))
        agree = all(others.get(name) in found._exact[name] for name in names)
        return cls(names, others.items()) if others and (agree or found.generic) else found

    def _add(self, name: str, index: int) -> None:
        self._exact.setdefault(name, set()).add(index)
        for key in (spelling(name), *synonyms(name)):
            self._near.setdefault(key, set()).add(index)
        for part in synonyms(name):
            self._loose.setdefault(spelling(part), set()).add(index)

    @property
    def generic(self) -> bool:
        """Whether no class has a name of its own, but numbers as transformers gives them: LABEL_0, LABEL_1, ..."""
        return all(name == f"LABEL_{index}" for index, name in enumerate(self.names))

    @cached_property
    def numbered(self) -> bool:
        """Whether a number can only be a class index: no class has another number for a name."""
        matches = ((index, NUMBER.fullmatch(spelling(name))) for index, name in enumerate(self.names))
        return all(match is None or int(match[1]) == index for index, match in matches)

    def find(self, name: str) -> set[int]:
        """The classes that a name may stand for: one, several where it is in doubt, none where it is unknown."""
        if name in self._exact:
            return self._exact[name]
        if match := SYNSET.fullmatch(name):
            if match[1] in self._synsets:
                return {self._synsets[match[1]]}
            if match[1] in _imagenet():
                return set()  # What follows it may be the name of another class.
        if near := self._near.get(name, set()) | self._near.get(spelling(name), set()):
            return near
        parts = [self._loose.get(spelling(part), set()) for part in synonyms(name)]
        return set().union(*parts)

    def number(self, text: str) -> int | None:
        """The class index that a text such as "3", "003" or "label_3" is; None where it is none."""
        match = NUMBER.fullmatch(text.strip()) if self.numbered else None
        return int(match[1]) if match and int(match[1]) < len(self.names) else None

    def nearest(self, name: str) -> str | None:
        """The class whose name looks most like it, None where none does."""
        spellings = {spelling(known): known for known in self.names}
        close = difflib.get_close_matches(spelling(name), spellings, n=1)
        return spellings[close[0]] if close else None

    @cached_property
    def _synsets(self) -> dict[str, int]:
        """Class indices by synset; those alone that are beyond doubt."""
        if self._given_synsets is not None:
            return {synset: index for index, synset in enumerate(self._given_synsets)}
        known = list(_imagenet())
        if _in_imagenets_order(self.names):
            return {synset: index for index, synset in enumerate(known)}
        found: dict[str, set[int]] = {}
        for index, name in enumerate(self.names):
            match = SYNSET.fullmatch(name)
            same = set() if match else _imagenet_classes().find(name)
            synset = match[1] if match else known[next(iter(same))] if len(same) == 1 else None
            if synset is not None:
                found.setdefault(synset, set()).add(index)
        return {synset: next(iter(indices)) for synset, indices in found.items() if len(indices) == 1}


def _indices(label2id: Mapping[str, int] | None, count: int) -> dict[str, int]:
    """Class indices by name, without what is none."""
    found = {}
    for name, index in (label2id or {}).items():
        try:
            number = int(index)
        except (TypeError, ValueError):
            continue
        if 0 <= number < count:
            found[str(name)] = number
    return found


def _in_imagenets_order(names: Sequence[str]) -> bool:
    """Whether these are the 1000 classes of ImageNet in their usual order."""
    if len(names) != len(_imagenet()):
        return False
    found = [(index, _imagenet_classes().find(name)) for index, name in enumerate(names)]
    known = [index in classes for index, classes in found if classes]
    return len(known) >= len(names) / 2 and sum(known) >= IN_ORDER * len(known)


@cache
def _imagenet() -> dict[str, str]:
    """Names of ImageNet's classes by synset, in the usual order: that of the synsets' numbers (ILSVRC 2012)."""
    lines = IMAGENET_FILE.read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)


@cache
def _imagenet_classes() -> ClassNames:
    return ClassNames(list(_imagenet().values()), synsets=list(_imagenet()))
