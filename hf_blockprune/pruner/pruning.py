"""One pruning run, from calibration to block-sparse layers; an interrupted one goes on where it was."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.collect import collect
from ..calibration.shared import SharedCalibration
from ..calibration.state import keep_statistics, kept_statistics
from ..choose.budgets import ModelBudget, model_budgets
from ..choose.selection import Selection, Selector, selection_stages
from ..choose.state import SELECTION, UNTIL_SELECTED, SelectionState
from ..config import BlockPruneConfig, MoveName
from ..cost.flops import ModelFlops, count_flops, merged_flops
from ..data.batches import ImageSet, load_images, load_pixels
from ..data.model_input import find_input, picture_size
from ..display.stages import planned
from ..errors import ConfigError, ModelError
from ..hub.blockprune_quantizer import sparsify
from ..model.layers import shape_of
from ..model.modes import evaluating
from ..model.outputs import classifies
from ..model.structure import TransformerLayer, find_transformer_layers
from ..model.targets import check_storable, find_targets
from ..model.unwrapping import check_prunable, check_unshared
from ..refit.layerwise import LayerRefit, refit_layers
from ..reorder.changes import Changes, undone_on_failure
from ..reorder.cutting import cut_hidden_units
from ..reorder.folding import fold_scales
from ..reorder.reordering import Reordering
from ..reorder.state import ReorderingState
from ..report.masks import add_cuts, add_refits, describe_masks
from ..report.values import BudgetReport, CalibrationReport, PermutationReport, Report, TokensReport
from ..runs.environment import environment
from ..runs.resume import RunState, weights_fingerprint
from ..runs.timing import timed
from ..score.methods import names_where
from ..score.statistics import LayerStatistics
from ..sources.named import Images
from ..types import ImageProcessor, JsonDict
from ..version import __version__
from .merging import JUDGED, merge_tokens, merging_of
from .moves import supported_moves
from .smaller import Smaller

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)


def pruning_stages(config: BlockPruneConfig) -> list[str]:
    """The stages of a pruning run that are shown."""
    return [
        *(["tokens"] if config.tokens == "auto" else []),
        *(["calibration"] if config.needs_images else []),
        *(["permutation"] if config.permutes else []),
        *selection_stages(config),
        *(["refit"] if config.refits else []),
    ]


@dataclass
class Pruning:
    """Prunes one model in place.

    Args:
        model: the dense model.
        processor: its image processor.
        config: how.
        name: what to call the model in the report.
        accelerator: device and processes.
        shared: calibration of other runs on the same dense model, to use where it is the one that is needed.
        rough: whether it is a trial of few images, which are known to be too few.
    """

    model: "PreTrainedModel"
    processor: ImageProcessor
    config: BlockPruneConfig
    name: str
    accelerator: "Accelerator"
    shared: SharedCalibration = field(default_factory=SharedCalibration)
    rough: bool = False

    @cached_property
    def targets(self) -> dict[str, nn.Linear]:
        """The Linears to prune, by name."""
        return find_targets(self.model, self.config, self.flops.linear_tokens)

    @cached_property
    def layers(self) -> list[TransformerLayer]:
        """Those whose Linears are known to feed each other."""
        return find_transformer_layers(self.model, self.targets)

    @cached_property
    def encoder(self) -> bool:
        """Whether the model gives embeddings, not scores of classes."""
        return not classifies(self.model, self.processor.to_dict())

    @cached_property
    def flops(self) -> ModelFlops:
        """Of the dense model."""
        return count_flops(self.model, picture_size(self.model, self.processor))

    def run(self, dataset: Images | ImageSet | None, split: str | None, work_dir: str | Path | None) -> Report:
        """Prune; arguments and errors as for `BlockPruner.prune`."""
        check_prunable(self.model)
        check_storable(self.model, self.targets)
        check_unshared(self.model, self.targets)
        moves = supported_moves(self.model, self.layers, self.config)
        if self.encoder:
            self._prepare_encoder()
        images, found = self._calibration_images(dataset, split)
        # Without images all is done in a moment, and nothing would be resumed.
        run_state = self._run_state(Path(work_dir), images) if work_dir is not None and images is not None else None
        with planned(pruning_stages(self.config)), evaluating(self.model):
            selected = self._restore_selection(run_state) or self._select(images, found, run_state, moves)
            with selected.smaller.applied(self.model) as dense:
                if self.config.refits:
                    assert images is not None  # _calibration_images saw to it
                    with timed(selected.report.seconds, "refit"):
                        add_refits(selected.report.masks, self._refit(selected, images, run_state, dense))
        shapes = self._shapes()
        cut = {name: shapes[name] for name in selected.smaller.kept}
        sparsify(self.model, selected.masks, self.config.block_shape, cut, selected.smaller.heads)
        add_cuts(selected.report.masks, cut_hidden_units(self.model, self.layers))
        return selected.report

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the dense model's targets, by name."""
        return {name: shape_of(linear) for name, linear in self.targets.items()}

    def _prepare_encoder(self) -> None:
        """Features of an embedding are what is asked for, so they keep their order.

        Raises:
            ConfigError: the method needs the loss of a classifier.
        """
        if self.config.scoring.gradients:
            able = " or ".join(names_where(lambda method: not method.gradients))
            raise ConfigError(
                f"method: {self.config.method!r} needs the loss of a classifier, which the encoder "
                f"{type(self.model).__name__} has not; use {able}"
            )
        if self.config.permutes_stream:
            self.config = self.config.replace(permute_stream=False)

    def _calibration_images(
        self, dataset: Images | ImageSet | None, split: str | None
    ) -> tuple[ImageSet | None, int | None]:
        """(the images that were drawn, how many there are), both None where the method needs none."""
        model_input = find_input(self.model, self.processor)
        if not self.config.needs_images:
            return None, None
        if dataset is None:
            what = f"method {self.config.method!r}" if self.config.scoring.needs_images else "refit"
            raise ModelError(f"{what} needs calibration images; pass a data set to prune()")
        found = load_images(dataset, split=split, labels=self.config.scoring.gradients)
        count = None if found.streaming else len(found.dataset)
        found, calibration = replace(found, model_input=model_input), self.config.calibration
        return self.shared.sample(found, calibration.samples, self.processor, calibration), count

    def _run_state(self, folder: Path, images: ImageSet | None) -> RunState:
        job = {
            "weights": weights_fingerprint(self.model),
            "config": self.config.replace(recovery=None).to_dict(),
            "images": None if images is None else images.identity,
            "version": __version__,
        }
        return RunState(folder, job, self.accelerator)

    def _restore_selection(self, run_state: RunState | None) -> "_Selected | None":
        """What an interrupted run chose; the model's hidden units change places as they had then."""
        stored = run_state.read(SELECTION) if run_state is not None else None
        if stored is None:
            return None
        tensors, values = stored
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "mask": {}, "token_weight": {}, "smaller": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        self.model.load_state_dict(parts["model"])
        self.model.to(self.accelerator.device)
        report = Report.from_dict(values["report"], "the run's state")
        smaller = Smaller.from_dict(values["smaller"], parts["smaller"], self.layers)
        if report.tokens is not None:
            merging_of(self).set(report.tokens.leave)
        return _Selected(parts["mask"], parts["token_weight"], smaller, report)

    def _select(
        self, images: ImageSet | None, found: int | None, run_state: RunState | None, moves: tuple[MoveName, ...]
    ) -> "_Selected":
        """Choose the masks and what else may leave, permuting the model where the config says so."""
        seconds: dict[str, float] = {}
        statistics, calibration = {}, None
        with undone_on_failure() as changes:
            fold_scales(self.model, changes)
            tokens = merge_tokens(self, images, run_state, moves, changes, seconds)
            flops = merged_flops(self.model, self.flops)
            if images is not None:
                with timed(seconds, "calibration"):
                    statistics, calibration = self._calibrate(images, found, run_state)
            pixels = self._judging_pixels(images)
            budgets = model_budgets(self.config, self.model, self.targets, flops)
            statistics, permutation = self._reordered(statistics, budgets, run_state, changes, seconds)
            selection = Selector(
                self.model,
                self.targets,
                statistics,
                flops,
                budgets,
                self.config,
                self.accelerator,
                pixels,
                moves,
                state=SelectionState(run_state),
            ).select()
        seconds |= selection.seconds
        smaller = Smaller.of(selection.shrunk)
        report = self._describe(selection, smaller, tokens, flops, permutation, calibration, seconds)
        selected = _Selected(selection.allocation.masks, self._token_weights(statistics), smaller, report)
        if run_state is not None:
            self._keep_selection(run_state, selected)
        return selected

    def pixels(self, images: ImageSet) -> Tensor:
        """Of some images, [images, channels, height, width], the same on every process."""
        config = self.model.config
        pixels, _ = load_pixels(images, self.processor, accelerator=self.accelerator, model_config=config)
        return pixels.to(self.accelerator.device)

    def _keep_selection(self, run_state: RunState, selected: "_Selected") -> None:
        """Keep what `_restore_selection` gives back."""
        parts = {"model": self.model.state_dict(), "mask": selected.masks, "token_weight": selected.token_weights}
        parts["smaller"] = selected.smaller.tensors
        tensors = {f"{part}/{name}": value for part, named in parts.items() for name, value in named.items()}
        values = {"report": selected.report.to_dict(), "smaller": selected.smaller.to_dict()}
        run_state.write(SELECTION, tensors, values, done="the choice of blocks", instead_of=UNTIL_SELECTED)

    def _token_weights(self, statistics: dict[str, LayerStatistics]) -> dict[str, Tensor]:
        """The refit's, [tokens] by name."""
        share, known = self.config.token_weights, {name: s.token_weight for name, s in statistics.items()}
        return {name: share * weight + 1 - share for name, weight in known.items() if weight is not None}

    def _reordered(
        self,
        statistics: dict[str, LayerStatistics],
        budgets: list[ModelBudget],
        run_state: RunState | None,
        changes: Changes,
        seconds: dict[str, float],
    ) -> tuple[dict[str, LayerStatistics], JsonDict | None]:
        """(the statistics, what was done) after features changed places; None where they stay."""
        layers = self.layers if self.config.permutes else []
        if not layers:
            return statistics, None
        with timed(seconds, "permutation"):
            state = ReorderingState(run_state)
            reordering = Reordering(self.model, layers, self.targets, self.config, self.accelerator, changes, state)
            done = reordering.run(statistics, budgets[0].blocks.block_share)
        return done.statistics, done.permutation

    def _calibrate(
        self, images: ImageSet, found: int | None, run_state: RunState | None
    ) -> tuple[dict[str, LayerStatistics], CalibrationReport]:
        method = self.config.scoring
        options = {
            "batch_size": self.config.calibration.batch_size,
            "gradients": method.gradients,
            "fisher": not method.gradients,  # where the method needs neither, the refit weighs tokens by it
            "block_shape": self.config.block_shape if method.gradients else (1, 1),
            "gradient_moments": self._rotated_names(),
            "seed": self.config.calibration.seed,
        }
        key = {**options, "images": images.content, "samples": self.config.calibration.samples}
        statistics, corrupt = self.shared.statistics.get(
            {**key, "targets": list(self.targets)},
            lambda: self._statistics(images, options, run_state),
        )
        calibration = CalibrationReport(
            dataset=images.public_name,
            found_images=found,
            num_images=next(iter(statistics.values())).num_images,
            skipped=[Path(file).name for file in corrupt],
            left_out=list(images.left_out),
            fewer_tokens_than_inputs=self._underdetermined(statistics),
        )
        return statistics, calibration

    def _underdetermined(self, statistics: dict[str, LayerStatistics]) -> list[str]:
        """Names of the layers with fewer tokens than inputs, which only damping makes solvable; says so."""
        few = [name for name, s in statistics.items() if s.num_tokens < self.targets[name].in_features]
        if few and not self.rough:
            seen = f"{len(few)} layers saw fewer tokens than they have inputs (first: {few[0]})"
            logger.warning(f"{seen}: their scores and refit lean on damping. Use more calibration images.")
        return few

    def _rotated_names(self) -> list[str]:
        """Linears of which outputs mix, so that gradients of single outputs do not say how much the new ones matter."""
        layers = self.layers if self.config.rotates else []
        return [name for layer in layers for name in (layer.query, layer.key, layer.value)]

    def _statistics(
        self, images: ImageSet, options: dict[str, Any], run_state: RunState | None
    ) -> tuple[dict[str, LayerStatistics], list[str]]:
        """(statistics, files that cannot be decoded) of this run, or of one that was interrupted later."""
        kept = None if run_state is None else kept_statistics(run_state)
        if kept is not None:
            return kept
        statistics, corrupt = collect(
            self.model,
            images,
            self.processor,
            self.targets,
            accelerator=self.accelerator,
            state=run_state,
            **options,
        )
        if run_state is not None:
            keep_statistics(run_state, statistics, corrupt.files)
        return statistics, corrupt.files

    def _judging_pixels(self, images: ImageSet | None) -> Tensor | None:
        """Some held-back calibration images, to measure true losses on."""
        config = self.config
        if images is None or not (config.scoring.fisher and config.true_loss_rounds and config.allowed_moves):
            return None
        return self.pixels(images.every(*JUDGED))

    def _refit(
        self, selected: "_Selected", images: ImageSet, run_state: RunState | None, dense: "PreTrainedModel | None"
    ) -> dict[str, LayerRefit]:
        outputs = {name: kept for name, (kept, _) in selected.smaller.kept.items() if kept is not None}
        return refit_layers(
            self.model,
            selected.masks,
            self.config.block_shape,
            images,
            self.processor,
            accelerator=self.accelerator,
            batch_size=self.config.calibration.batch_size,
            token_weights=selected.token_weights,
            residual_targets=self.config.residual_targets,
            dense=dense,
            kept_outputs=outputs,
            run_state=run_state,
        )

    def _describe(
        self,
        selection: Selection,
        smaller: Smaller,
        tokens: TokensReport | None,
        flops: ModelFlops,
        permutation: JsonDict | None,
        calibration: CalibrationReport | None,
        seconds: dict[str, float],
    ) -> Report:
        allocation, shrunk = selection.allocation, selection.shrunk.losses(selection.loss_factors)
        losses = {name: loss + shrunk.get(name, 0.0) for name, loss in allocation.loss.items()}
        masks = describe_masks(
            selection.shrunk.linears,
            flops,
            allocation.masks,
            losses,
            self.config.block_shape,
            selection.loss_factors,
            selection.trace_seconds,
            self._shapes(),
            smaller.heads,
        )
        return Report(
            base_model=self.name,
            model_class=type(self.model).__name__,
            config=self.config.to_dict(),
            masks=masks,
            permutation=None if permutation is None else PermutationReport.from_dict(permutation),
            tokens=tokens,
            power_weight=allocation.power_weight,
            budgets=[BudgetReport.from_dict(budget.account(allocation.masks)) for budget in selection.shrunk.budgets],
            calibration=calibration,
            encoder=self.encoder,
            seconds=seconds,
            environment=environment(),
        )


@dataclass
class _Selected:
    """The chosen masks and the refit's token weights by module name, what becomes smaller, and the report so far."""

    masks: dict[str, Tensor]
    token_weights: dict[str, Tensor]
    smaller: Smaller
    report: Report
