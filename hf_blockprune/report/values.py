"""What is known of how a pruned model was made, and of how good it is: the content of `blockprune_report.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import CheckpointError
from ..settings_file import with_todays_budgets
from ..types import JsonDict
from .measured import MeasuredScores, Measurements
from .parts import CHECKED, FLAT, Part

FORMAT_VERSION = 1  # of the file; one that does not say is of the first, and is written without
LATER = frozenset(
    {"finetuning", "size_bytes", "dense_size_bytes", "predicted", "card_sha256", "format_version", "dtype"}
)
NULL_WHERE_MISSING = ("permutation", "calibration", "recovery", "evaluation")  # which readers of the file count on


@dataclass(kw_only=True)
class LayerReport(Part):
    """One pruned Linear.

    Attributes:
        name: of the module.
        shape: [outputs, inputs].
        block_shape: [rows, cols].
        kept_blocks, blocks: after and before.
        density: kept share of the blocks.
        kept_shape: [outputs, inputs] that are left where features were cut out before blocks were chosen, else None;
            `blocks` are those of the whole shape.
        predicted_loss: by which the model's loss was expected to grow; a true loss's factor is in it.
        loss_factor: true over predicted loss, None where it was not measured.
        ridge: damping of the refit, None without one.
        error_after_refit: relative squared error of its outputs, None without a refit.
        cut_units: outputs that were cut out of its shape.
        seconds: that its pruning took.
    """

    name: str
    shape: list[int]
    block_shape: list[int]
    kept_blocks: int
    blocks: int
    density: float
    kept_shape: list[int] | None = None
    predicted_loss: float | None = None
    loss_factor: float | None = None
    ridge: float | None = None
    error_after_refit: float | None = None
    cut_units: int = 0
    seconds: float | None = None


@dataclass(kw_only=True)
class MaskReport(Part):
    """What the masks keep.

    Attributes:
        flops_ratio: kept share of the whole model's FLOPs.
        linear_flops_ratio: of the pruned layers' alone.
        params_ratio: kept share of the whole model's weights.
        dense_flops: FLOPs of the dense model for one image.
        density: kept share of the blocks.
        cut_head_features: outputs of value that were cut out, of all attentions together.
        layers: the pruned ones.
    """

    flops_ratio: float | None = None
    linear_flops_ratio: float | None = None
    params_ratio: float | None = None
    dense_flops: float | None = None
    density: float | None = None
    cut_head_features: int = 0
    layers: list[LayerReport]


@dataclass(kw_only=True)
class PermutationReport(Part):
    """How hidden units and features changed places.

    Attributes:
        block_share: share of the blocks that the next two are of.
        saliency_kept_before, saliency_kept_after: share of all saliency in so many best blocks.
        residual_order: place of each of the residual stream's features in the dense model, None where they stayed.
        rotated_heads: whether features of each attention head were mixed first.
    """

    block_share: float | None = None
    saliency_kept_before: float | None = None
    saliency_kept_after: float | None = None
    residual_order: list[int] | None = field(default=None, metadata=CHECKED)
    rotated_heads: bool = False

    def check(self, prefix: str) -> None:
        order: object = self.residual_order  # of a file, where it may be anything
        whole = isinstance(order, list) and all(type(feature) is int for feature in order)
        if order is not None and not (whole and sorted(order) == list(range(len(order)))):
            raise CheckpointError(f"{prefix}residual_order must name every feature once")


@dataclass(kw_only=True)
class TokenTrial(Part):
    """A schedule of tokens that was tried.

    Attributes:
        leave: patches that leave each layer.
        share: of the dense model's cost that this leaves, in the budget's unit.
        divergence: KL(dense || tried) of the predictions in nats, the mean over images that nothing was fitted to.
    """

    leave: list[int]
    share: float
    divergence: float


@dataclass(kw_only=True)
class TokensReport(Part):
    """How tokens merge.

    Attributes:
        leave: patches that leave each layer.
        patches: of the image that these numbers are of.
        frontier: schedules that were found, from none to one that saves all that the budget asks for; tokens alone.
        trials: those that were tried together with the other moves, which saved the rest; the best one was taken.
    """

    leave: list[int]
    patches: int
    frontier: list[TokenTrial] = field(default_factory=list)
    trials: list[TokenTrial] = field(default_factory=list)


@dataclass(kw_only=True)
class BudgetReport(Part):
    """What one budget asked for and what was reached, in `unit`, beside the dense model's cost."""

    metric: str
    device: str | None = None
    batch: int | None = None
    unit: str | None = None
    dense: float
    asked: float | None = None
    reached: float


@dataclass(kw_only=True)
class CalibrationReport(Part):
    """The images that statistics were taken from.

    Attributes:
        dataset: its public name.
        found_images: in the data set, None of a stream.
        num_images: that were read.
        skipped: names of files that could not be decoded.
        left_out: names of files that may be pictures of formats that cannot be read.
        fewer_tokens_than_inputs: names of layers that only damping makes solvable.
    """

    dataset: str | None = None
    found_images: int | None = None
    num_images: int | None = None
    skipped: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    fewer_tokens_than_inputs: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class RecoveryReport(Part):
    """One recovery, see `recover.recovery.Recovery`; `evaluation_before` is what was measured before it."""

    dataset: str | None = None
    settings: JsonDict | None = None
    num_images: int | None = None
    num_held_back: int | None = None
    divergence: dict[str, float] | None = None
    kept: str | None = None
    seconds: dict[str, float] | None = None
    evaluation_before: MeasuredScores | None = None


@dataclass(kw_only=True)
class FinetuningReport(Part):
    """One training run.

    Attributes:
        dataset, num_images: learned from.
        settings: see `FinetuneConfig`.
        steps: of the optimizer.
        losses: means over epochs.
        evaluated_on: data set that chose the epoch to keep, None where the last was kept.
        evaluations: after epochs.
        kept_epoch: whose weights the model holds, from 1.
        pruning: what went where masks shrank.
        skipped: names of files that could not be decoded.
        evaluation_before: what was measured before.
    """

    dataset: str | None = None
    num_images: int | None = None
    settings: JsonDict = field(default_factory=dict)
    steps: int | None = None
    losses: list[float] | None = None
    evaluated_on: str | None = None
    evaluations: list[JsonDict] | None = None
    kept_epoch: int | None = None
    pruning: list[dict[str, float]] | None = None
    skipped: list[str] = field(default_factory=list)
    evaluation_before: MeasuredScores | None = None


@dataclass(kw_only=True)
class Report(Part):
    """A pruned model's report.

    Attributes:
        base_model: name of the dense model.
        model_class: of transformers.
        config: see `BlockPruneConfig.to_dict`.
        masks: what is kept.
        permutation: None where nothing changed places.
        tokens: None where none merge.
        power_weight: that met a budget of energy beside another.
        budgets: what each asked for.
        calibration: None without images.
        recovery: the last one, None without.
        measured: of the weights as they are.
        encoder: whether the model gives embeddings, None where nobody said.
        seconds: by stage.
        environment: that it was pruned in, see `runs.environment.environment`.
        finetuning: the last training run, None without.
        dtype: "int8" where the weights of block-sparse layers were rounded to it, None where they have the model's.
        size_bytes, dense_size_bytes: weights on disk, None before they are saved.
        predicted: rows of the cost model, see `checkpoint.simulation.predict_checkpoint`.
        card_sha256: digest of the card that was made of the report.
        format_version: of the file.
    """

    absent: frozenset[str] = LATER
    base_model: str
    model_class: str | None = None
    config: JsonDict
    masks: MaskReport = field(metadata=FLAT)
    permutation: PermutationReport | None = None
    tokens: TokensReport | None = None
    power_weight: float | None = None
    budgets: list[BudgetReport] = field(default_factory=list)
    calibration: CalibrationReport | None = None
    recovery: RecoveryReport | None = None
    measured: Measurements = field(default_factory=Measurements, metadata=FLAT)
    encoder: bool | None = None
    seconds: dict[str, float]
    environment: Mapping[str, object] | None = None
    finetuning: FinetuningReport | None = None
    dtype: str | None = None
    size_bytes: int | None = None
    dense_size_bytes: int | None = None
    predicted: list[JsonDict] | None = None
    card_sha256: str | None = None
    format_version: int | None = None

    @classmethod
    def _from(cls, values: object, prefix: str) -> "Report":
        if isinstance(values, dict):
            values = {**dict.fromkeys(NULL_WHERE_MISSING), **values}
        report = super()._from(values, prefix)
        report.config = with_todays_budgets(report.config, saved=True)
        return report

    def check(self, prefix: str) -> None:
        if self.format_version not in (None, FORMAT_VERSION):
            raise CheckpointError(
                f"{prefix}format_version: this code reads {FORMAT_VERSION}, got {self.format_version}; "
                "a newer hf_blockprune may read it"
            )

    def copy(self) -> "Report":
        """A copy with measurements of its own, which can be dropped or added to while this one keeps its."""
        return replace(self, measured=replace(self.measured))

    @property
    def residual_order(self) -> list[int] | None:
        """Place of each of the residual stream's features in the dense model, None where they stayed."""
        return None if self.permutation is None else self.permutation.residual_order
