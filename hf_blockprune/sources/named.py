"""Where images come from: every form of data set that can be named, opened with `datasets`."""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypedDict, Union

from ..checks import is_number
from ..errors import ConfigError, DataError
from ..types import JsonDict
from .reading import is_url, read_errors, reason

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from typing_extensions import TypeIs, Unpack

    from .folders import Listing

BUILDERS = {".tar": "webdataset", ".parquet": "parquet"}
LABELS_BY = ("name", "position", "none")


class Indexed(Protocol):
    """A list, a torch data set, or anything else with a length and items, which `Items` reads one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object:
        """An image, an (image, label) pair, or a mapping with an image among its values."""
        ...


Named: TypeAlias = str | Path | Sequence[str | Path]
"""A folder, file, pattern, range or URL, the name of a data set on the Hub; or several files."""

Rows: TypeAlias = Union["Dataset", "IterableDataset"]
"""One data set of `datasets`: records by number, or one after the other."""

Loaded: TypeAlias = Union["Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict"]
"""What `datasets` loads: one data set, or one for each split."""

Images: TypeAlias = Union[Named, Loaded, Indexed, "DataSource"]
"""What serves wherever a data set of images is asked for: what names one, one that is loaded, or a `DataSource`."""

DataFiles: TypeAlias = dict[str, list[str]]
"""Files, patterns and URLs by split, as `datasets` takes them."""


class SourceOptions(TypedDict, total=False):
    """Attributes of `DataSource` beside its path; None leaves what holds without."""

    config: str | None
    split: str | None
    image_column: str | None
    label_column: str | None
    streaming: bool | None
    shuffle_buffer: int | None
    labels_by: str | None
    white: float | None


class _Files(TypedDict, total=False):
    """Arguments of `datasets.load_dataset` where files were named; builders refuse those that they do not know."""

    data_files: DataFiles
    drop_labels: bool | None


@dataclass(frozen=True)
class DataSource:
    """A data set by name, and how to read it; serves wherever a data set is asked for.

    Attributes:
        path: a folder of images, of parquet files or of webdataset shards; one such file, a pattern ("shards/*.tar"), a
            range ("shards/{000..019}.tar"), a URL, or a list of these; the name of a data set on the Hub; a
            `datasets` object; or a list or torch data set of images, see `Items`.
        config: which configuration of a data set on the Hub.
        split: the split to use, where the caller names none.
        image_column: the column with the images; by default the first of type `datasets.Image`.
        label_column: the column with the labels, "json.label" for a key inside of one; by default a usual name.
        streaming: read image by image, no further than needed, and store nothing.
        shuffle_buffer: draw a stream's sample from a buffer of so many images; 0 takes the first ones.
        labels_by: "name" finds the model's classes by what the data set calls them, "position" takes the data set's
            class numbers for the model's, "none" reads no labels.
        white: the value of white in pictures of more than 8 bits; by default what their format says.

    Example:
        ```python
        pruner.prune(DataSource("imagenet-1k", streaming=True, shuffle_buffer=4096))
        ```
    """

    path: Named | Loaded | Indexed
    config: str | None = None
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool = False
    shuffle_buffer: int = 0
    labels_by: str = "name"
    white: float | None = None

    def __post_init__(self) -> None:
        for name in ("config", "split", "image_column", "label_column"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"data set: {name} must be text, got {getattr(self, name)!r}")
        if not isinstance(self.streaming, bool):
            raise ConfigError(f"data set: streaming must be true or false, got {self.streaming!r}")
        if self.labels_by not in LABELS_BY:
            raise ConfigError(f"data set: labels_by must be one of {', '.join(LABELS_BY)}, got {self.labels_by!r}")
        if type(self.shuffle_buffer) is not int or self.shuffle_buffer < 0:
            raise ConfigError(f"data set: shuffle_buffer must be a number of images, got {self.shuffle_buffer!r}")
        if self.white is not None and (not is_number(self.white) or self.white <= 0):
            raise ConfigError(f"data set: white must be a number above 0, got {self.white!r}")
        if self.shuffle_buffer and _is_named(self.path) and not self.streaming:
            raise ConfigError("data set: shuffle_buffer is for streams, other samples are random anyway; add streaming")

    @classmethod
    def of(cls, value: Images | JsonDict, **options: "Unpack[SourceOptions]") -> "DataSource":
        """A source from what names one.

        Args:
            value: a source, the mapping of its attributes in a recipe, or what `path` can be.
            options: attributes that win over those; None changes nothing.

        Raises:
            ConfigError: the mapping has no path or unknown keys, or a value is impossible.
        """
        given: JsonDict = {key: option for key, option in options.items() if option is not None}
        if isinstance(value, DataSource):
            return replace(value, **given)
        if not _is_mapping(value):
            return cls(value, **given)
        known = [f.name for f in fields(cls)]
        if unknown := sorted(map(str, value.keys() - set(known))):
            raise ConfigError(f"data set: unknown key {unknown[0]!r}; choose from {', '.join(known)}")
        if "path" not in value:
            raise ConfigError("data set: name its path, a folder, a file or a data set on the Hub")
        return cls(**{**value, **given})

    @property
    def name(self) -> str:
        """What to call it in messages: its path, or the first of several."""
        if not _is_named(self.path):
            return "the data set"
        if not isinstance(self.path, (list, tuple)):
            return str(self.path)
        more = f" and {len(self.path) - 1} more" if len(self.path) > 1 else ""
        return f"{self.path[0]}{more}" if self.path else "the empty list"

    def open(self) -> tuple[Loaded | Indexed, list[str]]:
        """(what `datasets` makes of it: splits, or one data set; files that may be pictures and are not read).

        Raises:
            DataError: nothing is there, or no images that can be read.
        """
        if not _is_named(self.path):
            return self.path, []
        files = _files(self.path)
        path = Path() if files else Path(str(self.path)).expanduser()
        try:
            if files:
                # `datasets` takes brackets in names for patterns.
                exactly = [file if is_url(file) else glob.escape(file) for file in files]
                data_files = {"train": exactly}
                suffixes = _suffixes(files)
                if (builder := _builder(suffixes, self.name)) == "imagefolder":
                    return self._load_suffixes(data_files, suffixes), []
                return self._load(builder, data_files=data_files), []
            return self._open_folder(path) if path.exists() else (self._load(str(self.path)), [])
        except read_errors() as error:
            named = not files and not path.exists()
            found = "no such folder, and no such data set on the Hub" if named else "holds no images that can be read"
            raise DataError(f"{self.name}: {found} ({reason(error)})") from error

    def _open_folder(self, path: Path) -> tuple[Loaded, list[str]]:
        """As `open`, of a folder that is there."""
        import datasets

        from .folders import METADATA_FILES, by_split_column, list_folder, split_folders

        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_from_disk(str(path)), []
        listing = list_folder(path)
        tables = listing.suffixes & BUILDERS.keys()
        if tables and (".parquet" in tables or not listing.image_folders):
            return self._open_tables(path, tables), []
        if not listing.image_folders and listing.left_out:
            raise DataError(
                f"{self.name}: holds no images that can be read here, {len(listing.left_out)} files such as "
                f"{listing.left_out[0]}; convert them, or install Pillow's plugin for them (pillow-heif, "
                "pillow-jxl-plugin, pillow-avif-plugin)"
            )
        # Named splits: left to itself the loader splits a folder by words such as "test" in file names.
        splits = split_folders(path, listing.image_folders)
        if not splits:
            found = self._load_pictures({"train": [path]}, listing)
            described = any((path / file).exists() for file in METADATA_FILES)
            return (by_split_column(found, self.name) if described else found), listing.left_out
        for file in METADATA_FILES:
            if (path / file).exists():
                raise DataError(
                    f"{self.name}: {file} lies beside split folders; give each of {', '.join(splits)} its own"
                )
        # Where pictures lie in the split folders themselves, those would be taken for classes.
        flat = any(folder.relative_to(path).parts in listing.image_folders for one in splits.values() for folder in one)
        return self._load_pictures(splits, listing, drop_labels=True if flat else None), listing.left_out

    def _load_pictures(
        self, splits: dict[str, list[Path]], listing: "Listing", drop_labels: bool | None = None
    ) -> Loaded:
        """The pictures in the folders of each split; `drop_labels` keeps the folders' names from becoming labels."""
        from .folders import loader_suffixes, read_files

        if any(Path(Path(name).stem).suffix.lower() in loader_suffixes() for name in listing.left_out):
            # The loader takes "half.jpg.part" for a picture, unless files are named one by one.
            data_files = {
                split: [glob.escape(str(file)) for folder in folders for file in read_files(folder)]
                for split, folders in splits.items()
            }
        else:
            data_files = {split: [_everything(folder) for folder in folders] for split, folders in splits.items()}
        return self._load_suffixes(data_files, listing.suffixes, drop_labels)

    def _load_suffixes(self, data_files: DataFiles, suffixes: set[str], drop_labels: bool | None = None) -> Loaded:
        """Pictures, also of formats that Pillow opens and the loader does not know."""
        from .folders import image_suffixes, load_more_suffixes, loader_suffixes

        if self.config is not None or not suffixes & image_suffixes() - loader_suffixes():
            return self._load("imagefolder", data_files=data_files, drop_labels=drop_labels)
        return load_more_suffixes(data_files, streaming=self.streaming, drop_labels=drop_labels)

    def _open_tables(self, path: Path, suffixes: set[str]) -> Loaded:
        """Parquet files or shards; in splits by the names of files or folders, in any spelling."""
        from .folders import table_splits

        splits = table_splits(path, suffixes)
        if splits is None:
            return self._load(str(path))
        data_files = {split: [glob.escape(str(file)) for file in files] for split, files in splits.items()}
        return self._load(BUILDERS[suffixes.pop()], data_files=data_files)

    def _load(self, path: str, **options: "Unpack[_Files]") -> Loaded:
        """What `datasets` makes of the name of a loader or of a data set on the Hub.

        Raises:
            DataError: a configuration was named, which files have not.
        """
        import datasets

        if self.config is not None and "data_files" in options:
            raise DataError(f"{self.name}: files have no configurations; leave out {self.config!r}")
        return datasets.load_dataset(path, self.config, streaming=self.streaming, **options)


def _is_named(path: object) -> "TypeIs[Named]":
    """Whether it is a name, or a list of names; also where the list is empty."""
    parts = path if isinstance(path, (list, tuple)) else [path]
    return all(isinstance(part, (str, Path)) for part in parts)


def _is_mapping(value: object) -> "TypeIs[JsonDict]":
    """Whether it is a mapping of a recipe; what `datasets` keeps splits in is a dict too, of another class."""
    return type(value) is dict


def _files(path: Named) -> list[str] | None:
    """The files and URLs that were named one by one, by pattern or by range; None for folders and names on the Hub."""
    if isinstance(path, (list, tuple)):
        if not path:
            raise DataError("no files were named: the list is empty")
        return [file for part in path for file in _files(part) or [_existing(str(part))]]
    text = str(path)
    if is_url(text):
        return _expand(text)
    local = Path(text).expanduser()
    if local.exists():
        return [str(local.resolve())] if local.is_file() else None
    expanded = _expand(str(local))
    if len(expanded) > 1:
        return [_existing(file) for file in expanded]
    if not glob.has_magic(text):
        return None
    found = sorted(file for file in glob.glob(str(local.absolute()), recursive=True) if Path(file).is_file())
    if not found:
        raise DataError(f"{text}: no file has such a name")
    return found


def _expand(text: str) -> list[str]:
    """`a{08..10}b` as a08b, a09b, a10b."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if match is None:
        return [text]
    before, after = text[: match.start()], _expand(text[match.end() :])
    first, last = match.groups()
    return [f"{before}{i:0{len(first)}d}{rest}" for i in range(int(first), int(last) + 1) for rest in after]


def _existing(file: str) -> str:
    """The whole path of a file.

    Raises:
        DataError: it is none.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError(f"{file}: no such file")
    return str(path.resolve())


def _suffixes(files: Sequence[str]) -> set[str]:
    """In lower case, without what follows the path in a URL."""
    return {Path(re.sub(r"[?#].*", "", file) if is_url(file) else file).suffix.lower() for file in files}


def _builder(suffixes: set[str], name: str) -> str:
    """The loader of `datasets` for files with these suffixes.

    Raises:
        DataError: they are of several kinds, or of none that can be read.
    """
    from .folders import image_suffixes

    if suffixes <= image_suffixes():
        return "imagefolder"
    if len(suffixes) == 1 and (builder := BUILDERS.get(next(iter(suffixes)))):
        return builder
    raise DataError(
        f"{name}: expected .tar shards, .parquet files or images, of one kind, got {', '.join(sorted(suffixes))!r}"
    )


def _everything(folder: Path) -> str:
    """The pattern of all files in a folder and below."""
    return str(Path(glob.escape(str(folder.resolve()))) / "**")
