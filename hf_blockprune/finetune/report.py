"""What a report says of a training run."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from ..checkpoint.measurements import drop
from ..config import BlockPruneConfig
from ..cost.flops import count_flops
from ..hub.blockprune_heads import cut_heads
from ..hub.blockprune_layers import block_sparse_layers
from ..report.masks import add_cuts, describe_masks
from ..report.values import LATER, BudgetReport, FinetuningReport, MaskReport, Report
from ..runs.environment import Environment, environment
from ..types import JsonDict
from .gradual import cut_unused, masks_of
from .training import Finetuning


class _Described(TypedDict):
    """Fields of a `Report` that follow from the masks."""

    base_model: str
    model_class: str
    config: JsonDict
    masks: MaskReport
    permutation: None
    power_weight: float
    budgets: list[BudgetReport]
    calibration: None
    recovery: None
    seconds: dict[str, float]
    environment: Environment


def with_finetuning(report: Report | None, run: Finetuning, config: BlockPruneConfig, name: str) -> Report:
    """The report of a model after training; where blocks left, or it had none, with its masks described anew.

    Hidden units that lost all their blocks are cut out of the model's shapes, as pruning does it.

    Args:
        report: the one before, None for a model without.
        run: the training, which is done.
        config: what the model is pruned by.
        name: of the model before.
    """
    before = None if report is None else report.measured.evaluation
    if report is None:
        described = Report(**_describe(run, config, name), absent=LATER | {"encoder"})  # which nobody looked at
    elif run.gradual is not None:
        described = replace(report.copy(), **_describe(run, config, name))
    else:
        described = report.copy()
    if report is None or run.gradual is not None:
        add_cuts(described.masks, cut_unused(run.model))
    history = run.history
    described.finetuning = FinetuningReport(
        dataset=run.images.public_name,
        num_images=run.data.count,
        settings=run.settings.to_dict(),
        steps=history.step,
        losses=history.losses,
        evaluated_on=None if run.evaluation is None else run.evaluation.public_name,
        evaluations=history.evaluations,
        kept_epoch=history.best_epoch or history.epoch,
        pruning=history.pruning,
        skipped=[Path(file).name for file in history.skipped],
        evaluation_before=before,
    )
    drop(described.measured)
    described.seconds = {**described.seconds, "finetuning": round(history.seconds, 3)}
    return described


def _describe(run: Finetuning, config: BlockPruneConfig, name: str) -> _Described:
    """Fields of the report that a pruning run would have made of the model's masks."""
    model = run.model
    masks = masks_of(model)
    chosen = None if run.gradual is None else run.gradual.allocation
    losses = dict.fromkeys(masks, 0.0) if chosen is None else chosen.loss
    flops = count_flops(model, run.data.size)
    # Block-sparse layers, of which numbers of inputs and outputs are asked alone.
    targets: dict[str, Any] = {layer: model.get_submodule(layer) for layer in masks}
    shapes = {layer: module.dense_shape for layer, module in block_sparse_layers(model) if module.dense_shape}
    return {
        "base_model": name,
        "model_class": type(model).__name__,
        "config": config.to_dict(),
        "masks": describe_masks(targets, flops, masks, losses, config.block_shape, {}, {}, shapes, cut_heads(model)),
        "permutation": None,
        "power_weight": 0.0,
        "budgets": [] if run.gradual is None else [BudgetReport.from_dict(run.gradual.account())],
        "calibration": None,
        "recovery": None,
        "seconds": {},
        "environment": environment(),
    }
