"""FLOPs of a whole model, as `hub.blockprune_flops` counts them, for those that mean to prune it."""

from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import ModelError
from ..hub import blockprune_flops as counting
from ..hub.blockprune_flops import ModelFlops, UncountableError, dtype_of, merged_flops

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedModel

    from ..types import JsonDict

__all__ = ["ModelFlops", "count_flops", "dry_run", "dtype_of", "image_size", "merged_flops"]

NO_SIZE = "only vision models can be pruned"
NO_ANSWER = (
    "only models that take pixel_values and nothing else can be pruned, such as the vision part of one that also takes "
    "text"
)


def image_size(config: "PreTrainedConfig", processing: "JsonDict | None" = None) -> tuple[int, int]:
    """(height, width) of the images that a model is given, as far as settings say.

    Where the processor itself is at hand, ask `data.model_input.picture_size`: it looks at what the processor makes of
    pictures, which settings that it leaves out, or that it alone knows, do not show.

    Args:
        config: its config.
        processing: settings of its image processor, which win.

    Raises:
        ModelError: neither says.
    """
    try:
        return counting.image_size(config, processing)
    except UncountableError as error:
        raise ModelError(f"{error}; {NO_SIZE}") from None


def count_flops(model: "PreTrainedModel", size: tuple[int, int] | None = None, *, merging: bool = False) -> ModelFlops:
    """Count the FLOPs of one image through the dense form of a model.

    Args:
        model: a transformers vision model, dense or block-sparse, on any device; it does not run itself.
        size: (height, width) of the image, see `data.model_input.picture_size`; the config's by default.
        merging: whether tokens merge in that form as they do in the model, or not at all.

    Raises:
        ModelError: the model does not answer images alone, or takes no images of this size.
    """
    size = size or image_size(model.config)
    try:
        return counting.count_flops(model, size, merging=merging)
    except UncountableError as error:
        raise ModelError(f"{error}; {NO_ANSWER}") from error.__cause__


def dry_run(dense: "PreTrainedModel", size: tuple[int, int]) -> tuple[object, Tensor]:
    """What a skeleton gives for one image, and that image, [1, channels, height, width] without values.

    Args:
        dense: what `skeleton` made.
        size: (height, width) to try first; then those of its config.

    Raises:
        ModelError: it does not answer images alone, or takes none of these sizes.
    """
    try:
        return counting.dry_run(dense, size)
    except UncountableError as error:
        raise ModelError(f"{error}; {NO_ANSWER}") from error.__cause__
