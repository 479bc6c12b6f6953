"""Which columns of a data set hold images and labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DataError
from .image_columns import find_image_column, is_array
from .named import DataSource, Rows

if TYPE_CHECKING:
    from datasets import Features
    from datasets.features.features import FeatureType

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "json.label")


@dataclass(frozen=True)
class LabelColumn:
    """Where labels lie, and what they look like.

    Attributes:
        name: of the column; "json.label" is a key inside of one.
        class_names: names of the classes by index, where the data set knows them.
        listed: whether each image has a list of labels.
        fixed: the length of those lists where it is always the same.
    """

    name: str
    class_names: tuple[str, ...] | None = None
    listed: bool = False
    fixed: int | None = None


def choose_columns(dataset: Rows, source: DataSource, *, labels: bool = True) -> tuple[Rows, str, LabelColumn | None]:
    """(the data set with undecoded images and labels alone, its image column, its label column or None).

    Args:
        dataset: a `datasets` data set.
        source: says which columns are wanted.
        labels: whether labels are; else no such column is looked for.

    Raises:
        DataError: a column that was asked for does not exist or holds something else, or there is no image column.
    """
    import datasets

    features = dataset.features
    if features is None:  # A stream that went through a function.
        features = _features_of_first(dataset, source.name)
        dataset = dataset.cast(features)
    image = find_image_column(features, source)
    label = _label_column(features, source) if labels and source.labels_by != "none" else None
    kept = [image]
    if label is not None:
        kept.append(label.name if label.name in features else label.name.partition(".")[0])
    dataset = dataset.select_columns(list(dict.fromkeys(kept)))
    if not is_array(features[image]):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    return dataset, image, label


def label_of(record: Mapping[str, object], column: str) -> object:
    """The label of a record, as `Labels` takes it; "json.label" is a key inside of a column."""
    if column in record:
        return record[column]
    outer, _, key = column.partition(".")
    inside = record[outer]
    return inside.get(key) if isinstance(inside, Mapping) else None


def _features_of_first(stream: Rows, name: str) -> "Features":
    """As the first record of a stream shows them.

    Raises:
        DataError: there is none.
    """
    import datasets

    first = next(iter(stream), None)
    if first is None:
        raise DataError(f"{name}: holds no images")
    return datasets.Dataset.from_list([first]).features


def _label_column(features: "Features", source: DataSource) -> LabelColumn | None:
    import datasets

    column = source.label_column
    if column is None:
        column = next((key for key in LABEL_COLUMNS if _feature(features, key) is not None), None)
        if column is None:
            return None
    feature = _feature(features, column)
    if feature is None:
        raise DataError(f"{source.name}: has no column {column!r}; choose the labels from {', '.join(features)}")
    listed = isinstance(feature, (datasets.List, datasets.LargeList))
    inner = feature.feature if listed else feature
    if not isinstance(inner, (datasets.Value, datasets.ClassLabel)):
        raise DataError(
            f"{source.name}: column {column!r} holds {type(feature).__name__}, not one label an image or a list of "
            "them; name another as label_column"
        )
    length = getattr(feature, "length", -1) if listed else -1
    names = getattr(inner, "names", None)
    return LabelColumn(column, tuple(names) if names else None, listed, length if length >= 0 else None)


def _feature(features: "Features", column: str) -> "FeatureType | None":
    """Of a column, or of a key inside of one; None where there is none."""
    if column in features:
        return features[column]
    outer, _, key = column.partition(".")
    inside = features.get(outer)
    return inside.get(key) if isinstance(inside, dict) else None
