"""Folders of pictures: which files are pictures, which are left out, and which folders are splits."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..errors import DataError
from .pictures import BROKEN, register_plugins
from .splits import WORDS, look_like_splits, split_of, splits_by_name, spoken_split

if TYPE_CHECKING:
    from .named import DataFiles, Loaded

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLIT_COLUMNS = ("split", "data_split", "subset", "partition", "set")
# Files that lie beside pictures and are none, which nobody misses.
COMPANIONS = {".txt", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".html"}
COMPANIONS |= {".py", ".ipynb", ".sh", ".log", ".ini", ".db", ".lock", ".pdf", ".mat", ".npy", ".npz", ".pkl", ".cache"}


@dataclass
class Listing:
    """What lies in a folder.

    Attributes:
        root: the folder.
        suffixes: of its files, in lower case.
        image_folders: those that pictures lie in, by their parts below the root.
        left_out: files that may be pictures, and are not read, by their path below the root.
    """

    root: Path
    suffixes: set[str] = field(default_factory=set)
    image_folders: set[tuple[str, ...]] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)


def list_folder(root: Path) -> Listing:
    """Look through a folder, without what is hidden."""
    listing, seen = Listing(root), set()
    for directory, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        parts = Path(directory).relative_to(root).parts
        for name in files:
            if _hidden(name) or name in METADATA_FILES:
                continue
            suffix = os.path.splitext(name)[1].lower()
            listing.suffixes.add(suffix)
            if suffix in image_suffixes():
                listing.image_folders.add(parts)
            elif suffix not in COMPANIONS and (suffix or _is_picture(os.path.join(directory, name))):
                listing.left_out.append("/".join((*parts, name)))
    listing.left_out.sort()
    return listing


def read_files(root: Path) -> list[Path]:
    """The pictures in a folder and what describes them, without what is hidden."""
    root, wanted = root.resolve(), image_suffixes()
    found = (file for file in root.rglob("*") if file.name in METADATA_FILES or file.suffix.lower() in wanted)
    return sorted(file for file in found if file.is_file() and not any(map(_hidden, file.relative_to(root).parts)))


@cache
def image_suffixes() -> set[str]:
    """Of the formats that Pillow opens here, in lower case."""
    register_plugins()
    return {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}


def loader_suffixes() -> set[str]:
    """Of those, the ones that the image folders of `datasets` take."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return set(ImageFolder.EXTENSIONS)


def load_more_suffixes(data_files: "DataFiles", *, streaming: bool, drop_labels: bool | None) -> "Loaded":
    """What `datasets.load_dataset("imagefolder")` makes of files, with pictures of all suffixes that Pillow opens.

    Args:
        data_files: patterns of files by split.
        streaming: read them one by one, and store nothing.
        drop_labels: whether the names of folders are no labels; None leaves it to the loader.
    """
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    suffixes = sorted(image_suffixes() | loader_suffixes())

    class Pictures(ImageFolder):
        EXTENSIONS = suffixes

    # The name keeps what was cached apart from what is cached where other formats can be read.
    builder = Pictures(
        dataset_name="pictures",
        config_name="-".join(suffix[1:] for suffix in sorted(image_suffixes() - loader_suffixes())),
        data_files=data_files,
        drop_labels=drop_labels,
    )
    if streaming:
        # An IterableDatasetDict, whatever its annotation says.
        return builder.as_streaming_dataset()  # pyright: ignore[reportReturnType]
    builder.download_and_prepare()
    return builder.as_dataset()


def split_folders(root: Path, image_folders: Iterable[tuple[str, ...]]) -> dict[str, list[Path]]:
    """The folders of each split, where all pictures lie in folders with the names of splits; else none.

    A word in a file's name makes no split, nor does a class called "train" among others.

    Raises:
        DataError: folders may be splits or classes.
    """
    folders = set(image_folders)
    tops = sorted({parts[0] for parts in folders if parts})
    if tops and () not in folders:
        inner = {parts[1] if len(parts) > 1 else "" for parts in folders}
        splits = splits_by_name(tops)
        if len(tops) == 1 and len(set((splits_by_name(inner) or {}).values())) > 1:
            splits = None  # "train/train" and "train/val": the data set is called like a split
        if splits:
            found: dict[str, list[Path]] = {}
            for top, split in sorted(splits.items(), key=lambda item: list(WORDS).index(item[1])):
                found.setdefault(split, []).append(root / top)
            return found
        if len(tops) == 1:  # the data set lies one folder deeper
            return split_folders(root / tops[0], {parts[1:] for parts in folders})
        if look_like_splits(tops):
            raise _ambiguous(root, tops)
    _refuse_mixtures(root, folders, tops)
    return {}


def table_splits(root: Path, suffixes: set[str]) -> dict[str, list[Path]] | None:
    """Files of tables by split, where `datasets` would not find all of the splits in their names; else None.

    Raises:
        DataError: some of the files are of a split, others say nothing.
    """
    from datasets.data_files import get_data_patterns

    files = sorted(
        file
        for file in root.rglob("*")
        if file.suffix.lower() in suffixes and not any(map(_hidden, file.relative_to(root).parts))
    )
    said = {file: _split_of_file(file.relative_to(root)) for file in files}
    if (root / "README.md").exists() or len(suffixes) > 1 or not any(said.values()):
        return None
    found = {str(split) for split in get_data_patterns(str(root))}
    splits = {split for split in said.values() if split is not None}
    if None in said.values():
        if (splits <= found and len(found) > 1) or (found, splits) == ({"train"}, {"train"}):
            return None
        silent = [file.name for file, split in said.items() if split is None]
        raise DataError(
            f"{root}: {', '.join(silent[:5])} says no split while other files there do ({', '.join(sorted(splits))}); "
            "name the files, or give each the name of its split"
        )
    return None if splits <= found else {s: [f for f in files if said[f] == s] for s in WORDS if s in splits}


def _split_of_file(path: Path) -> str | None:
    """By the nearest folder, or the name, that says one."""
    return next(
        (found for part in (path.stem, *reversed(path.parts[:-1])) if (found := _split_of_numbered(part))), None
    )


def _split_of_numbered(name: str) -> str | None:
    """Files are numbered: "train-00000-of-00002"."""
    return split_of(re.sub(r"\d+-of-\d+|\b(shard|part)\b", "", name.lower()))


def by_split_column(dataset: "Loaded", name: str) -> "Loaded":
    """Splits of what has a column `split`, or one of a like name, that names some; else the data set as it is.

    Args:
        dataset: of one split.
        name: its name, for messages.

    Raises:
        DataError: some rows say no split.
    """
    import datasets

    rows = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    for column, feature in (rows.features or {}).items():
        if column.lower() not in SPLIT_COLUMNS or getattr(feature, "dtype", None) not in ("string", "large_string"):
            continue
        said = list(dict.fromkeys(row[column] for row in rows.select_columns([column])))
        words = [split_of(value) for value in said if value]
        # A "set" or "subset" may be many things.
        if not any(words) or (None in words and column.lower() != "split"):
            continue
        if None in said:
            raise DataError(f"{name}: its column {column} says nothing in some rows; fill it in, or take it out")
        spelled: dict[str, list[str]] = {}
        for value in said:
            spelled.setdefault(split_of(value) or value, []).append(value)
        parts = {split: _In(values) for split, values in spelled.items()}
        if isinstance(rows, datasets.Dataset):
            return datasets.DatasetDict({s: rows.filter(part, input_columns=column) for s, part in parts.items()})
        return datasets.IterableDatasetDict({s: rows.filter(part, input_columns=column) for s, part in parts.items()})
    return dataset


@dataclass(frozen=True)
class _In:
    """Whether a value is one of several; of a kind that `datasets` can tell from others."""

    values: list[str]

    def __call__(self, value: str) -> bool:
        return value in self.values


def _refuse_mixtures(root: Path, folders: set[tuple[str, ...]], tops: list[str]) -> None:
    """Training pictures and those to measure on would become one set."""
    inside = {top: {parts[1] for parts in folders if len(parts) > 1 and parts[0] == top} for top in tops}
    # Classes are folders without folders: "seg_train/cat" and "seg_test/cat" are none, "crash test" may be one.
    named = [top for top in tops if split_of(top) or (inside[top] and spoken_split(top))]
    others = [inside[top] for top in tops if top not in named]
    several = len({spoken_split(top) for top in named if inside[top]}) > 1 or (() in folders and look_like_splits(tops))
    beside_flat = not all(others) and any(inside[top] for top in named if split_of(top))
    if several or beside_flat or any(inside[top] & set().union(*others) for top in named):
        raise _ambiguous(root, tops, named)
    deeper = sorted({part for parts in folders for part in parts[1:] if split_of(part)})
    if len({split_of(name) for name in deeper}) > 1:
        raise DataError(
            f"{root}: {', '.join(deeper)} lie inside of {', '.join(tops[:3])}{', ...' * (len(tops) > 3)}; put classes "
            "into folders of splits, such as train/CLASS and test/CLASS"
        )


def _ambiguous(root: Path, tops: list[str], named: list[str] | None = None) -> DataError:
    listed = ", ".join(tops[:8]) + ", ..." * (len(tops) > 8)
    which = f"{', '.join(named)} look like splits beside others" if named else "they may be splits or classes"
    return DataError(
        f"{root}: holds {listed}, of which {which}; name one of the folders, or call splits train, validation and test "
        "and leave nothing else beside them"
    )


def _hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _is_picture(file: str) -> bool:
    """Whether a file without a suffix begins like a picture."""
    register_plugins()
    try:
        with Image.open(file):
            return True
    except BROKEN:
        return False
