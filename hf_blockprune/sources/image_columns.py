"""Which column of a data set holds its images, by type and by name."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..errors import DataError
from .named import DataSource

if TYPE_CHECKING:
    from datasets import Features
    from datasets.features.features import FeatureType

PIXEL_VALUES = "pixel_values"  # what image processors of transformers call what they made
NAMES = ("image", "img", "picture", "photo", PIXEL_VALUES)


def find_image_column(features: "Features", source: DataSource) -> str:
    """The column that was named, or the first of images, or one with a usual name that holds what may be images.

    Raises:
        DataError: there is none such.
    """
    import datasets

    column = source.image_column
    if column is not None:
        feature = features.get(column)
        if feature is None:
            raise DataError(f"{source.name}: has no column {column!r}; choose the images from {', '.join(features)}")
        if not (isinstance(feature, datasets.Image) or _may_be_images(feature)):
            raise DataError(
                f"{source.name}: column {column!r} holds no images but {feature}; name another as image_column"
            )
        return column
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    if images:
        return images[0]
    several = next((key for key, feature in features.items() if isinstance(_inside(feature), datasets.Image)), None)
    if several is not None:
        raise DataError(
            f"{source.name}: column {several!r} holds several images a row; give each a row of its own (leave out "
            "batch(), or split the rows with map)"
        )
    usual = usual_image_column(key for key, feature in features.items() if _may_be_images(feature))
    if usual is None:
        raise DataError(
            f"{source.name}: no image column among {list(features)}; cast one to datasets.Image() or name one "
            "as image_column"
        )
    return usual


def holds_images(features: "Features", source: DataSource) -> bool:
    """Whether there is a column that `find_image_column` finds."""
    try:
        return bool(find_image_column(features, source))
    except DataError:
        return False


def usual_image_column(names: Iterable[str]) -> str | None:
    """The name that images usually have, or one that is a suffix of image files, as in shards; None without one."""
    from .folders import image_suffixes

    names = list(names)
    usual = (name for name in NAMES if name in names)
    return next(usual, next((name for name in names if f".{name}".lower() in image_suffixes()), None))


def is_array(feature: "FeatureType") -> bool:
    """Whether a column holds numbers as [height, width] or with channels."""
    import datasets

    if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
        return True
    depth, inner = 0, feature
    while (deeper := _inside(inner)) is not None:
        depth, inner = depth + 1, deeper
    return depth in (2, 3) and isinstance(inner, datasets.Value) and inner.dtype not in ("string", "large_string")


def is_preprocessed(column: str, feature: "FeatureType") -> bool:
    """Whether a column holds what an image processor made: numbers in floating point under its name."""
    inner = feature
    while (deeper := _inside(inner)) is not None:
        inner = deeper
    return column == PIXEL_VALUES and is_array(feature) and str(getattr(inner, "dtype", "")).startswith("float")


def _may_be_images(feature: "FeatureType") -> bool:
    """Paths, encoded bytes, both, or arrays."""
    encoded = isinstance(feature, Mapping) and {"bytes", "path"} <= feature.keys()
    text_or_bytes = getattr(feature, "dtype", None) in ("binary", "large_binary", "string", "large_string")
    return encoded or text_or_bytes or is_array(feature)


def _inside(feature: "FeatureType") -> "FeatureType | None":
    """What the lists of a column hold; None where it holds none."""
    if isinstance(feature, list):
        return feature[0]
    return None if isinstance(feature, Mapping) else getattr(feature, "feature", None)
