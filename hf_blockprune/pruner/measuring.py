"""How good and how fast a model is, beside the dense one; what is measured goes into its report."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import measurements
from ..data.batches import ImageSet, load_images
from ..data.model_input import picture_size, shared_picture_size
from ..display.stages import planned
from ..errors import CheckpointError, ModelError
from ..evaluate.accuracy import EVALUATION_SPLITS, Outputs, Predictions, need_labels, predict, summarise
from ..evaluate.fidelity import Embeddings, Fidelity, compare, embed
from ..hub.blockprune_layers import is_pruned
from ..measure.latency import measure_latency
from ..report.measured import MeasuredFidelity, MeasuredLatency, MeasuredScores, Measurement
from ..sources.named import Images
from ..types import JsonDict
from .loaded_model import LoadedModel
from .other_model import AGAINST, ANSWERS, ENCODER, OtherModel, find_other, misfit

if TYPE_CHECKING:
    from .pruner import BlockPruner

MEASURED: dict[str, type[Measurement]] = {
    "evaluation": MeasuredScores,
    "fidelity": MeasuredFidelity,
    "latency": MeasuredLatency,
}
BASELINE, EVALUATION = "evaluation of the other model", "evaluation"  # stages that are shown


def evaluation_stages(against: object) -> list[str]:
    """The stages of `BlockPruner.evaluate` that are shown."""
    return [EVALUATION] if against is None or isinstance(against, ANSWERS) else [BASELINE, EVALUATION]


class Measuring(LoadedModel):
    """What of `BlockPruner` measures."""

    def evaluate(
        self,
        dataset: Images | ImageSet,
        *,
        against: "str | Path | BlockPruner | Predictions | Outputs | Embeddings | None" = None,
        split: str | None = None,
        batch_size: int = 32,
    ) -> Any:  # which class it is depends on the model, and callers know theirs
        """How good the model is at its task, and the paired change against another model.

        Top-1 and top-5 accuracy where it chooses one class; mean average precision and F1 where an image has several
        labels; R2 and mean squared error where it predicts numbers (see `problem_type` of transformers' configs); how
        close its embeddings are to the other model's where it is an encoder.

        Args:
            dataset: images, named as for `prune`; labelled ones, but for an encoder.
            against: a name, folder or `BlockPruner` to compare with image by image, such as the dense model; or its
                `predictions`, where it is compared with several times.
            split: split of the data set; "validation" or "test" by default.
            batch_size: images in one pass on each process.

        Returns:
            An `Evaluation`, `MultiLabelEvaluation`, `RegressionEvaluation` or `Fidelity`, by the task.

        Raises:
            DataError: images that are missing, unlabelled, corrupt past 1 %, or with labels that do not fit the model.
            ModelError: the other model cannot be loaded, or that of an encoder is missing or another one.
        """
        if not self._classifies():
            return self._fidelity(dataset, against, split, batch_size)
        other = find_other(self, against, answers=(Predictions, Outputs))
        images = load_images(dataset, split=split, prefer_splits=EVALUATION_SPLITS)
        options = {"accelerator": self.accelerator, "batch_size": batch_size}
        need_labels(images)
        fitted = images.fitted(self.model, self.processor)
        baseline = None if other is None else other.answers
        with planned(evaluation_stages(against)):
            if other is not None and baseline is None:
                asked = images.fitted(other.pruner.model, other.pruner.processor)
                baseline = predict(other.pruner.model, asked, other.pruner.processor, name=BASELINE, **options)
            found = predict(self.model, fitted, self.processor, name=EVALUATION, **options)
        result = replace(summarise(found, baseline), left_out=list(images.left_out) or None)
        # The report compares with the dense model; what another pruned one is better or worse by is no part of it.
        dense = other is None or other.is_dense
        kept = result if dense else replace(summarise(found), left_out=result.left_out)
        where = {"dataset": images.public_name, "split": images.split, "batch_size": batch_size}
        self._measured("evaluation", {**where, **_named(other), **kept.to_dict()})
        return result

    def _measured(self, kind: str, values: JsonDict) -> JsonDict:
        """Values with time and place, which go into the report; older ones leave it where the weights changed."""
        values = measurements.stamped(values, self.model)
        if self._report is not None:
            self._forget_others()
            measurements.add(self._report.measured, kind, MEASURED[kind].from_dict(values))
        return values

    def _fidelity(self, dataset: Images | ImageSet, against: object, split: str | None, batch_size: int) -> Fidelity:
        other = find_other(self, against, answers=(Embeddings,))
        if other is None:
            raise misfit(self.name, AGAINST, ENCODER)
        options = {"split": split, "batch_size": batch_size}
        with planned(evaluation_stages(against)):
            wanted = other.answers or _embeddings(other.pruner, dataset, BASELINE, **options)
            have = _embeddings(self, dataset, EVALUATION, **options)
        result = compare(have, wanted)
        if other.is_dense:
            where = {"dataset": have.dataset, "split": have.split, "batch_size": batch_size}
            self._measured("fidelity", {**where, **_named(other), **result.to_dict()})
        return result

    def embeddings(self, dataset: Images | ImageSet, *, split: str | None = None, batch_size: int = 32) -> Embeddings:
        """An encoder's embeddings of images, for `evaluate` of others to compare with; arguments are its.

        Raises:
            ModelError: the model is a classifier.
            DataError: the images cannot be used.
        """
        if self._classifies():
            raise ModelError(f"{self.name} is a classifier; its answers are predictions()")
        return _embeddings(self, dataset, EVALUATION, split=split, batch_size=batch_size)

    def predictions(
        self, dataset: Images | ImageSet, *, split: str | None = None, batch_size: int = 32
    ) -> "Predictions | Outputs":
        """The model's answers on labelled images, for `evaluate` of others to compare with; arguments are its."""
        images = load_images(dataset, split=split, prefer_splits=EVALUATION_SPLITS).fitted(self.model, self.processor)
        return predict(self.model, images, self.processor, accelerator=self.accelerator, batch_size=batch_size)

    def benchmark(
        self,
        *,
        against: "str | Path | BlockPruner | None" = None,
        batch_sizes: tuple[int, ...] = (1,),
        seconds: float = 10.0,
    ) -> JsonDict:
        """Time the pruned and the dense model on this device, by turns; the result goes into report and card too.

        Args:
            against: the dense model: a name, folder or `BlockPruner`; by default the pruned one with zeros for what was
                removed, which takes as long.
            batch_sizes: images in one pass.
            seconds: about how long to measure each batch size.

        Returns:
            See `measure_latency`.

        Raises:
            ModelError: the model is not pruned, or the other one cannot be loaded or takes pictures of another size.
        """
        if not is_pruned(self.model):
            raise ModelError(f"{self.name} has no block-sparse layers to measure; call prune() first")
        other = find_other(self, against)
        size = picture_size(self.model, self.processor) if other is None else shared_picture_size(self, other.pruner)
        self.model.to(self.accelerator.device)
        values = measure_latency(
            self.model,
            None if other is None else other.pruner.model,
            image_size=size,
            batch_sizes=batch_sizes,
            seconds=seconds,
        )
        dense = other is None or other.is_dense
        return self._measured("latency", {**_named(other), **values}) if dense else values

    def save_measurements(self, directory: str | Path | None = None) -> bool:
        """Keep what was measured with the saved model: in its report and its card, both or neither.

        `evaluate` and `benchmark` measure; `save_pretrained` keeps their results too. This is for a model that is saved
        already. Results of other data sets, processors, threads, dtypes and batch sizes that the folder has stay beside
        the new ones; an older one of the same is replaced. A card that somebody edited stays as it is.

        Args:
            directory: folder with the same weights; by default where the model was loaded from or saved to.

        Returns:
            Whether there was something to keep and a folder for it: there is none for dense models, for those from the
            Hub, and for those without a report.

        Raises:
            CheckpointError: the folder's weights are not those that were measured, or it cannot be written.
        """
        if self._report is None or not measurements.any_held(self._report.measured):
            return False
        found = self._stored
        self._forget_others()
        if directory is None and found is None:
            return False
        if self._stored is None:
            raise CheckpointError(
                f"{directory or (found and found[0])}: holds other weights than the model, which was changed or never "
                "saved; use save_pretrained()"
            )
        folder = self._stored[0] if directory is None else Path(directory).expanduser()
        if self.accelerator.is_main_process:
            self._report = measurements.save(folder, self._report.measured, self._stored[1])
        self.accelerator.wait_for_everyone()
        return True


def _embeddings(
    asked: LoadedModel, dataset: Images | ImageSet, name: str, *, split: str | None, batch_size: int
) -> Embeddings:
    images = load_images(dataset, split=split, prefer_splits=EVALUATION_SPLITS, labels=False)
    images = images.fitted(asked.model, asked.processor)
    return embed(asked.model, images, asked.processor, accelerator=asked.accelerator, batch_size=batch_size, name=name)


def _named(other: "OtherModel[Predictions | Outputs] | OtherModel[Embeddings] | None") -> dict[str, str]:
    """The report's key that names the dense model, where there is one with a name."""
    return {} if other is None else other.named
