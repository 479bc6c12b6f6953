"""The work behind `blockprune evaluate` and `blockprune benchmark`: look at everything that is named, measure, keep.

What costs least is looked at first, so that a wrong name ends a command before a model's weights are read.
"""

from pathlib import Path
from typing import TypeAlias

import torch

from ..data.batches import ImageSet
from ..errors import CheckpointError, ConfigError, ModelError
from ..evaluate.accuracy import Evaluation, MultiLabelEvaluation, RegressionEvaluation
from ..evaluate.fidelity import Fidelity
from ..hub.blockprune_config import describes
from ..hub.blockprune_layers import is_pruned
from ..pruner.pruner import BlockPruner
from ..sources.named import Images
from ..types import JsonDict
from .beforehand import check_inputs

Measured: TypeAlias = Evaluation | MultiLabelEvaluation | RegressionEvaluation | Fidelity
"""How good a model is at its task: one class an image, several labels, numbers, or an encoder's embeddings."""


def run_evaluate(
    model: str,
    dataset: Images | ImageSet,
    *,
    against: str | None = None,
    batch_size: int = 32,
    save: bool = True,
) -> tuple[Measured, str | None]:
    """Measure how good a saved model is at its task, and keep the result with it.

    Args:
        model: a folder or a name on the Hub, of a dense or a pruned model.
        dataset: labelled images, named as for `BlockPruner.evaluate`; of encoders any.
        against: a model to compare with.
        batch_size: images in one pass.
        save: keep the result in the folder of a pruned model.

    Returns:
        (the result, by the model's task; why the result could not be kept or None).

    Raises:
        BackendError: `BLOCKPRUNE_BACKEND` names none.
        ModelError: there is no such model, or an encoder is compared with none.
        DataError: the images cannot be used.
    """
    _, images = check_inputs(model, evaluation=dataset, other=against, compared=against is not None)
    assert images is not None  # there is a data set
    pruner = BlockPruner.from_pretrained(model)
    result = pruner.evaluate(images, against=against, batch_size=batch_size)
    return result, _keep(pruner, model) if save else None


def run_benchmark(
    model: str,
    *,
    against: str | None = None,
    batch_sizes: tuple[int, ...] = (1,),
    seconds: float = 10.0,
    threads: int | None = None,
    save: bool = True,
) -> tuple[JsonDict, str | None]:
    """Time a saved pruned model and the dense one by turns, and keep the result with it.

    Args:
        model: a folder or a name on the Hub.
        against: the dense model; by default the pruned one with zeros.
        batch_sizes: images in one pass.
        seconds: about how long to measure each batch size.
        threads: of the CPU, for this process from now on; None changes nothing.
        save: keep the result in the model's folder.

    Returns:
        (what `BlockPruner.benchmark` gives, why the result could not be kept or None).

    Raises:
        BackendError: `BLOCKPRUNE_BACKEND` names none.
        ConfigError: no batch size was given, or one below 1.
        ModelError: there is no such model, or it is not pruned.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"batch sizes: expected whole numbers from 1, got {list(batch_sizes)}")
    config, _ = check_inputs(model, other=against)
    if not describes(config):
        raise ModelError(f"{model} has no block-sparse layers to measure; name a pruned model")
    if threads is not None:
        torch.set_num_threads(threads)
    pruner = BlockPruner.from_pretrained(model)
    values = pruner.benchmark(against=against, batch_sizes=batch_sizes, seconds=seconds)
    return values, _keep(pruner, model) if save else None


def _keep(pruner: BlockPruner, model: str) -> str | None:
    """Keep what was measured; why that was not possible, where somebody might expect it."""
    try:
        kept = pruner.save_measurements()
    except CheckpointError as error:
        return f"the result was not kept: {error}"
    if kept or not is_pruned(pruner.model) or not Path(model).expanduser().is_dir():
        return None
    return f"the result was not kept: {model} has no report to keep it in; --no-save says that none is wanted"
