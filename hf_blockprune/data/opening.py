"""Opening data sets: whatever names one or is one, as an `ImageSet`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch.utils.data import DataLoader
from transformers.utils import logging

from ..errors import DataError
from ..sources.columns import LABEL_COLUMNS, LabelColumn, choose_columns
from ..sources.image_columns import holds_images, is_preprocessed
from ..sources.items import IMAGE, LABEL, Items
from ..sources.named import DataSource, Images, Indexed
from ..sources.pictures import Decoding
from ..sources.splits import choose_split
from .image_set import ImageSet

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)


def load_images(
    source: Images | ImageSet,
    *,
    split: str | None = None,
    prefer_splits: Sequence[str] = ("train",),
    labels: bool = True,
) -> ImageSet:
    """Open a data set.

    Args:
        source: what `DataSource.path` can be, a `DataSource` that says how to read it, or what this function gave.
        split: the split to use; by default the source's own, the first of `prefer_splits` that exists, or the only one.
        prefer_splits: see `split`.
        labels: whether labels are wanted; without, nothing that is wrong with them matters.

    Raises:
        DataError: nothing is there, it holds no images, or the split or a column does not exist.
    """
    import datasets

    if isinstance(source, ImageSet):
        return source if labels else source.without_labels()
    given = source if isinstance(source, DataSource) else DataSource(source)
    name, chosen = given.name, None
    dataset, left_out = given.open()
    if (
        isinstance(dataset, dict)
        and dataset
        and all(isinstance(part, (datasets.Dataset, datasets.IterableDataset)) for part in dataset.values())
    ):
        splits = [str(s) for s in dataset]
        chosen = choose_split(splits, split or given.split, prefer_splits, name)
        dataset, chosen = dataset[chosen], chosen if len(splits) > 1 else None
    if isinstance(dataset, datasets.Dataset) and not len(dataset):
        raise DataError(f"{name}: holds no images")
    found = replace(_opened(dataset, given, labels), labels_by=given.labels_by, split=chosen)
    if left_out:
        logger.warning(f"{found.name}: files that cannot be read as pictures are left out: {_some(left_out)}")
    return replace(found, decoding=replace(found.decoding, white=given.white), left_out=tuple(left_out))


def _opened(dataset: object, source: DataSource, labels: bool) -> ImageSet:
    """One data set, whatever it is."""
    import datasets

    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        transform = isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"
        stored = dataset.with_format(None)
        if isinstance(dataset, datasets.Dataset) and transform and not holds_images(dataset.features, source):
            return _of_items(dataset, source, labels)
        if transform:
            logger.warning(f"{source.name}: its transform is left out; the stored images are used as they are")
        if isinstance(stored, datasets.Dataset) and source.streaming:
            stored = stored.to_iterable_dataset()
        stored, image, label = choose_columns(stored, source, labels=labels)
        feature = (stored.features or {})[image]
        own = Decoding(mode=getattr((dataset.features or {}).get(image), "mode", None))
        found = ImageSet(stored, source.name, image, label, source.shuffle_buffer, decoding=own)
        return replace(found, preprocessed=is_preprocessed(image, feature))
    if Items.fit(dataset):
        return _of_items(dataset, source, labels)
    hint = "; pass the data set of the loader" if isinstance(dataset, DataLoader) else ""
    raise DataError(
        f"{source.name}: expected an image folder, a data set name or a datasets.Dataset, or a list or torch data set "
        f"of images or (image, label) pairs, got {type(source.path)}{hint}"
    )


def _of_items(dataset: "Indexed | Dataset", source: DataSource, labels: bool) -> ImageSet:
    items = Items(dataset, source, LABEL_COLUMNS)
    if not len(items):
        raise DataError(f"{source.name}: holds no images")
    if items.preprocessed:
        logger.warning(f"{source.name}: its tensors are taken for pixel_values that an image processor made")
    label = None
    if labels and source.labels_by != "none" and items.labelled:
        label = LabelColumn(LABEL, items.class_names, listed=isinstance(items[0][LABEL], (list, tuple)))
    return ImageSet(items, source.name, IMAGE, label, preprocessed=items.preprocessed)


def _some(names: Sequence[str]) -> str:
    """The first of many names, and their number."""
    return f"{', '.join(names[:5])}{f', ... ({len(names)} in all)' if len(names) > 5 else ''}"
