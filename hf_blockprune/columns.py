"""Which columns of a data set hold images and labels, and what its labels say."""

from typing import Any

from .errors import DataError
from .image_columns import find_image_column, is_array
from .sources import DataSource

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "json.label")
NO_LABEL = -1


def choose_columns(dataset: Any, source: DataSource) -> tuple[Any, str, str | None, tuple[str, ...] | None]:
    """(the data set with undecoded images and labels alone, its image column, label column, names of the classes).

    The last two are None where there are none.

    Raises:
        DataError: a column that was asked for does not exist or holds something else, or there is no image column.
    """
    import datasets

    if dataset.features is None:  # A stream that went through a function.
        dataset = dataset.cast(_features_of_first(dataset, source.name))
    features = dataset.features
    image = find_image_column(features, source)
    label = _label_column(features, source)
    names = getattr(_feature(features, label), "names", None) if label else None
    if label is not None and label not in features:
        kept = [image, label.partition(".")[0]]
    else:
        kept = [image] if label is None else [image, label]
    dataset = dataset.select_columns(list(dict.fromkeys(kept)))
    if not is_array(features[image]):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    return dataset, image, label, tuple(names) if names else None


def label_of(record: dict[str, Any], column: str) -> Any:
    """The label of a record; "json.label" is a key inside of a column."""
    if column in record:
        return record[column]
    outer, _, key = column.partition(".")
    return (record[outer] or {}).get(key)


class Labels:
    """Class indices of a model for the labels of a data set: indices, names, or indices of names that both know.

    Args:
        class_names: the data set's names of its classes by index, None where it has none.
        model_config: of a transformers classifier.
        name: of the data set, for messages.
    """

    def __init__(self, class_names: tuple[str, ...] | None, model_config: Any, name: str) -> None:
        # A config that was given id2label alone has no label2id.
        ids = model_config.label2id or {name: index for index, name in (model_config.id2label or {}).items()}
        self.by_name = {text: int(index) for text, index in ids.items()}
        known = class_names is not None and all(text in self.by_name for text in class_names)
        self.by_index = [self.by_name[text] for text in class_names] if class_names is not None and known else None
        self.name = name

    def __call__(self, label: Any) -> int:
        """The model's class index; NO_LABEL for None.

        Raises:
            DataError: text that is none of the model's class names.
        """
        if label is None:
            return NO_LABEL
        if isinstance(label, str):
            if label not in self.by_name:
                raise DataError(
                    f"{self.name}: label {label!r} is no class of the model; expected names such as "
                    f"{next(iter(self.by_name), None)!r}, class indices, or one folder a class"
                )
            return self.by_name[label]
        return self.by_index[int(label)] if self.by_index and int(label) >= 0 else int(label)


def _features_of_first(stream: Any, name: str) -> Any:
    import datasets

    first = next(iter(stream), None)
    if first is None:
        raise DataError(f"{name}: holds no images")
    return datasets.Dataset.from_list([first]).features


def _label_column(features: Any, source: DataSource) -> str | None:
    import datasets

    column = source.label_column
    if column is None:
        column = next((key for key in LABEL_COLUMNS if _feature(features, key) is not None), None)
        if column is None:
            return None
    feature = _feature(features, column)
    if feature is None:
        raise DataError(f"{source.name}: has no column {column!r}; choose the labels from {', '.join(features)}")
    if not isinstance(feature, (datasets.Value, datasets.ClassLabel)):
        raise DataError(
            f"{source.name}: column {column!r} holds {type(feature).__name__}, not one label an image; name another as "
            "label_column"
        )
    return column


def _feature(features: Any, column: str) -> Any:
    """Of a column, or of a key inside of one; None where there is none."""
    if column in features:
        return features[column]
    outer, _, key = column.partition(".")
    inside = features.get(outer)
    return inside.get(key) if isinstance(inside, dict) else None
