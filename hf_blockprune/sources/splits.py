"""Splits: which folders, files and rows are for training and which for measuring, by their names."""

import re
from collections.abc import Iterable, Sequence

from ..errors import DataError

WORDS = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "validate", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
# What is said of a split beside its name, in a word of its own or in one with it.
BESIDE = {"set", "sets", "data", "dataset", "split", "folder", "dir", "files", "part", "samples"}
BESIDE |= {"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos"}
BESIDE |= {"clean", "other", "full", "all", "final", "raw", "resized"}
_SPLIT = {word: split for split, words in WORDS.items() for word in words}
_WORD = re.compile(rf"({'|'.join(sorted(_SPLIT, key=len, reverse=True))})({'|'.join(sorted(BESIDE))})?")


def choose_split(splits: Sequence[str], split: str | None, prefer: Sequence[str], name: str) -> str:
    """The split that was asked for, or the first preferred one, or the only one; their spelling does not matter.

    Raises:
        DataError: there is none such, or several.
    """
    if split is not None:
        if split in splits:
            return split
        # Not by `split_of` of what was asked for: "train[:10%]" is another thing than "train".
        spelled = [one for one in splits if split.lower() in (one.lower(), split_of(one))]
        if len(spelled) == 1:
            return spelled[0]
        raise DataError(f"{name}: has no split {split!r}; choose one of {', '.join(splits)}")
    for candidate in prefer:
        spelled = [candidate] if candidate in splits else [s for s in splits if split_of(s) == candidate]
        if len(spelled) > 1:
            raise DataError(f"{name}: name a split; {', '.join(spelled)} may each be meant")
        if spelled:
            return spelled[0]
    if len(splits) == 1:
        return splits[0]
    raise DataError(f"{name}: name a split; it has {', '.join(splits)}")


def split_of(name: str) -> str | None:
    """The split that a name stands for, None where it says more than that, or something else.

    Example:
        >>> [split_of(name) for name in ("TRAIN", "val2017", "trainset", "test-images", "train station", "cat")]
        ['train', 'validation', 'train', 'test', None, None]
    """
    found, rest = _taken_apart(name)
    return found if not set(rest) - BESIDE else None


def splits_by_name(names: Iterable[str]) -> dict[str, str] | None:
    """The split of each name, where all have one, or differ in one alone ("birds_train", "birds_val"); else None."""
    names = list(names)
    if all(split_of(name) for name in names):
        return {name: str(split_of(name)) for name in names}
    parts = [_taken_apart(name) for name in names]
    same_rest = len({tuple(rest) for _, rest in parts}) == 1
    if same_rest and None not in {split for split, _ in parts} and len({split for split, _ in parts}) > 1:
        return {name: str(split) for name, (split, _) in zip(names, parts, strict=True)}
    return None


def look_like_splits(names: Iterable[str]) -> bool:
    """Whether each name holds the word of a split, and they hold those of several."""
    found = {spoken_split(name) for name in names}
    return None not in found and len(found) > 1


def spoken_split(name: str) -> str | None:
    """The only split that a word of a name means, whatever else the name says: "seg_train", "trainA"."""
    return _taken_apart(name)[0]


def _taken_apart(name: str) -> tuple[str | None, list[str]]:
    """(the only split that a word of the name means, the other words without numbers)."""
    found: list[str] = []
    rest = []
    for word in _words(name):
        match = _WORD.fullmatch(word)
        if match:
            found.append(_SPLIT[match.group(1)])
        else:
            rest.append(word)
    return (found[0], rest) if len(set(found)) == 1 else (None, rest)


def _words(name: str) -> list[str]:
    """In lower case; "trainA" is two of them."""
    return re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
