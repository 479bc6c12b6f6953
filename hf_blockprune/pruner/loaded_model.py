"""A model with its image processor, its settings and its report: what `BlockPruner` begins with."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transformers.utils import logging

from ..checkpoint import folder as checkpoint
from ..checkpoint import measurements
from ..config import BlockPruneConfig
from ..errors import ModelError
from ..hub.blockprune_layers import is_pruned
from ..model.loading import load_model
from ..model.outputs import classifies
from ..model.unwrapping import plain_model
from ..report.tables import PruneReport
from ..report.values import Report
from ..runs.resume import weights_fingerprint
from ..types import ImageProcessor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)
M = TypeVar("M", bound="LoadedModel")


class LoadedModel:
    """A model with what is known of it; arguments as for `BlockPruner`."""

    def __init__(
        self,
        model: "PreTrainedModel",
        processor: ImageProcessor,
        config: BlockPruneConfig | None = None,
        *,
        name: str = "model",
        accelerator: "Accelerator | None" = None,
    ) -> None:
        self.model = plain_model(model)
        self.processor = processor
        self.config = config or BlockPruneConfig()
        self.name = name
        self._accelerator = accelerator
        self._report: Report | None = None
        self._reload_dense: Callable[[], LoadedModel] | None = None
        self._measured_weights: str | None = None  # of the model that the report's measurements are of
        self._stored: tuple[Path, str] | None = None  # the folder that holds those weights, and its fingerprint

    @classmethod
    def from_pretrained(
        cls: type[M],
        name_or_path: str | Path,
        config: BlockPruneConfig | None = None,
        *,
        accelerator: "Accelerator | None" = None,
        model_class: type | None = None,
        **kwargs: Any,
    ) -> M:
        """Load a classifier or an encoder of images, and its image processor, from the Hub or a folder.

        Args:
            name_or_path: a Hub name such as "facebook/deit-base-patch16-224", or a folder; also of a pruned model, to
                recover or evaluate it.
            config: how to prune; of a pruned model, by default the one it was pruned with.
            accelerator: device and processes.
            model_class: a model class of transformers, for checkpoints of which a part is wanted, such as
                `CLIPVisionModelWithProjection` of a CLIP; by default the one that the checkpoint was saved from.
            **kwargs: passed to transformers' `from_pretrained` (revision, token, cache_dir, ...).

        Raises:
            ModelError: nothing is there, it neither classifies nor encodes images, or it lacks trained weights.
            CheckpointError: the files are damaged.
            ConfigError: the stored settings are none.
            BlockSparseFormatError: a block-sparse checkpoint's config and tensors disagree.
        """
        model, processor = load_model(str(name_or_path), kwargs, model_class)
        # Only the folder's name of a local path belongs into reports that may be published.
        path = Path(name_or_path).expanduser()
        name = path.resolve().name if path.exists() else str(name_or_path)
        pruner = cls(model, processor, config, name=name, accelerator=accelerator)
        if is_pruned(model):
            file = checkpoint.report_file(str(name_or_path), kwargs)
            if file is not None:
                pruner._read_report(file, local=path.is_dir(), config=config)
        else:
            pruner._reload_dense = lambda: cls.from_pretrained(
                name_or_path, accelerator=accelerator, model_class=model_class, **kwargs
            )
        return pruner

    def _read_report(self, file: Path, *, local: bool, config: BlockPruneConfig | None) -> None:
        """Take the report beside a model that was loaded, and what it says was measured, where that is of its weights.

        Args:
            file: the report.
            local: whether it lies in a folder of the user's, where more that is measured may be kept.
            config: how to prune, None for what the report says.
        """
        stored = checkpoint.read_report(file)
        assert stored is not None
        self.config = config or BlockPruneConfig.from_dict(stored.config)
        self._report = stored
        weights = measurements.files_fingerprint(file.parent)
        if measurements.drop_stale(stored.measured, weights):
            logger.warning(f"{file}: what was measured is of other weights than those beside it, and is left out")
        self._measured_weights = weights_fingerprint(self.model)
        if local and weights is not None:
            self._stored = (file.parent, weights)

    @cached_property
    def accelerator(self) -> "Accelerator":
        from accelerate import Accelerator

        return self._accelerator or Accelerator()

    def report(self) -> PruneReport:
        """What was removed, layer by layer, with the settings, timings and accuracy so far.

        A dictionary of plain values, made anew at every call, which is also what `blockprune_report.json` holds;
        `rich.print(pruner.report())` shows it as tables.

        Raises:
            ModelError: nothing was pruned yet.
        """
        return PruneReport(self._made().to_dict())

    def _made(self) -> Report:
        if self._report is None:
            raise ModelError("nothing to report: call prune() first")
        return self._report

    def _forget_others(self) -> None:
        """Take what was measured of other weights than the model's out of its report: somebody may have trained it."""
        current = weights_fingerprint(self.model)
        if self._report is not None and current != self._measured_weights:
            if measurements.drop(self._report.measured):
                logger.warning(f"{self.name}: its weights changed since they were measured; older results are left out")
            self._stored = None
        self._measured_weights = current

    def _classifies(self) -> bool:
        return classifies(self.model, self.processor.to_dict())
