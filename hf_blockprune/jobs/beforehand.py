"""What a job names, looked at before its work: what is wrong ends it in seconds, and not after hours.

What costs least is looked at first, and no model's weights are read.
"""

from transformers import AutoModelForImageClassification
from transformers.configuration_utils import PreTrainedConfig

from ..budget import Budget
from ..cost.profiles import load_profile
from ..data.batches import ImageSet, load_images
from ..evaluate.accuracy import EVALUATION_SPLITS, need_labels
from ..hub.blockprune_backends import wanted_backend
from ..hub.blockprune_storage import wanted_storage
from ..model.loading import load_config, model_class_of
from ..pruner.other_model import AGAINST, ENCODER, misfit
from ..sources.named import Images


def check_inputs(
    model: str,
    *,
    evaluation: Images | ImageSet | None = None,
    other: str | None = None,
    budgets: tuple[Budget | None, ...] = (),
    compared: bool = True,
) -> tuple[PreTrainedConfig, ImageSet | None]:
    """Refuse a job that would fail at its end.

    Args:
        model: Hub name or folder of the model that the job begins with.
        evaluation: labelled images that the result is measured on, or None.
        other: the same of another model, a teacher or one to compare with.
        budgets: whose devices have to be known.
        compared: whether the result is compared with another model's.

    Returns:
        (the model's config, the labelled images, opened).

    Raises:
        BackendError: `BLOCKPRUNE_BACKEND` or `BLOCKPRUNE_STORAGE` names none.
        ConfigError: a device is not known.
        ModelError: there is no such model, or an encoder is measured alone.
        DataError: the labelled images cannot be used.
    """
    wanted_backend()
    wanted_storage()
    for budget in budgets:
        if budget is not None and budget.device is not None:
            load_profile(budget.device)
    config = load_config(model, {})
    if other is not None:
        load_config(other, {})
    return config, None if evaluation is None else _evaluation_images(model, config, evaluation, compared=compared)


def _evaluation_images(model: str, config: PreTrainedConfig, dataset: Images | ImageSet, *, compared: bool) -> ImageSet:
    """A data set to measure a model on, opened, with labels that fit a classifier; of an encoder without.

    Args:
        model: its name, for messages.
        config: its config.
        dataset: named as for `BlockPruner.evaluate`.
        compared: whether there is another model to compare with.

    Raises:
        ModelError: it is an encoder, and compared with none.
        DataError: the images cannot be used.
    """
    classifies = model_class_of(config) is AutoModelForImageClassification
    if not classifies and not compared:
        raise misfit(model, AGAINST, ENCODER)
    images = load_images(dataset, prefer_splits=EVALUATION_SPLITS, labels=classifies)
    if classifies:
        need_labels(images)
        images.labels_for(config)
    return images
