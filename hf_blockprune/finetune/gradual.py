"""Blocks that leave while a model trains: which ones, and what is kept of the others."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.collect import collect
from ..choose.allocation import Allocation
from ..choose.budgets import model_budget, model_budgets
from ..choose.selection import Selector
from ..cost.flops import ModelFlops, count_flops
from ..data.batches import ImageSet
from ..data.model_input import picture_size
from ..errors import ConfigError, ModelError
from ..hub.blockprune_heads import cut_heads
from ..hub.blockprune_linear import BlockSparseLinear
from ..hub.blockprune_quantizer import block_sparse_layers, pack_weights, sparsify, update_config
from ..hub.blockprune_together import fuse, unfuse
from ..model.copying import copied
from ..model.layers import linear_in
from ..model.structure import find_transformer_layers
from ..model.targets import check_storable, find_targets
from ..reorder.cutting import cut_hidden_units
from ..score.blocks import grid_shape
from ..score.statistics import LayerStatistics
from ..types import ImageProcessor, JsonDict
from .config import GradualConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_sparse(model: PreTrainedModel, settings: GradualConfig) -> None:
    """Bring a model into the form that blocks leave, in place; its function stays the same.

    A dense model gets block-sparse layers that keep all their blocks; in a pruned one what was cut out of the shapes
    comes back as removed blocks, so that costs are those of the whole architecture.

    Raises:
        ConfigError: a dense model without a block shape, or another one than a pruned model has.
        ModelError: the model has no layers to prune, or has some that could not be saved, or lacks heads.
    """
    shapes = {module.block_shape for _, module in block_sparse_layers(model)}
    if not shapes:
        if settings.block_shape is None:
            raise ConfigError("gradual.block_shape: the model is dense; say how large blocks are, such as [32, 32]")
        targets = find_targets(model, settings.pruning(settings.block_shape, settings.budget))
        check_storable(model, targets)
        grids = {
            name: grid_shape((linear.out_features, linear.in_features), settings.block_shape)
            for name, linear in targets.items()
        }
        sparsify(model, {n: torch.ones(g, dtype=torch.bool) for n, g in grids.items()}, settings.block_shape)
        pack_weights(model)
    elif settings.block_shape not in (None, *shapes):
        raise ConfigError(f"gradual.block_shape: the model has blocks of {shapes.pop()} already; leave it out")
    elif cut_heads(model):
        raise ModelError(
            "gradual: heads were cut from the model's attentions, whose costs it does not know; leave it out"
        )
    else:
        uncut(model)


@torch.no_grad()
def uncut(model: PreTrainedModel) -> None:
    """Give layers that were cut the shapes of the dense model again, in place: what was cut is removed blocks."""
    shapes = [(name, module, module.dense_shape) for name, module in block_sparse_layers(model)]
    unfuse(model)
    for name, module, shape in shapes:
        if shape is None:
            continue
        mask = torch.zeros(grid_shape(shape, module.block_shape), dtype=torch.bool)
        rows, cols = module.grid_shape
        mask[:rows, :cols] = module.mask()
        dense = module.to_dense(shape)
        model.set_submodule(name, BlockSparseLinear.from_dense(dense, mask, module.block_shape))
    fuse(model)
    update_config(model)


def cut_unused(model: PreTrainedModel) -> dict[str, int]:
    """Cut hidden units that lost all their blocks; see `cut_hidden_units`."""
    linears: dict[str, Any] = dict(block_sparse_layers(model))
    return cut_hidden_units(model, find_transformer_layers(model, linears))


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a model's block-sparse layers, bool [block_rows, block_cols] on the CPU by name."""
    return {name: module.mask().cpu() for name, module in block_sparse_layers(model)}


@torch.no_grad()
def shrink(model: PreTrainedModel, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Let a model's layers keep the blocks of smaller masks alone, in place.

    Args:
        model: with block-sparse layers.
        masks: by name; none may have a block that the layer lacks.

    Returns:
        Which of the blocks stayed, bool [blocks before] by the weight's name, for those layers that lost some.

    Raises:
        ValueError: a mask has more blocks than its layer.
    """
    stayed = {}
    for name, module in block_sparse_layers(model):
        old, new = module.mask().cpu(), masks[name]
        if (new & ~old).any():
            raise ValueError(f"{name}: the mask has blocks that are gone")
        if torch.equal(old, new):
            continue
        keep = new[old]  # both in the order in which blocks are stored, row by row
        here = keep.to(module.weight.device)
        weight = nn.Parameter(module.weight.detach()[here], requires_grad=module.weight.requires_grad)
        module.weight = weight
        counts = nn.functional.pad(new.sum(dim=1).cumsum(0), (1, 0))
        module.crow_indices = counts.to(module.crow_indices)
        module.col_indices = module.col_indices[here]
        stayed[f"{name}.weight"] = keep
    update_config(model)
    return stayed


@dataclass
class GradualPruning:
    """Chooses blocks of one model, again and again; what is gone stays gone.

    Args:
        model: with block-sparse layers; its weights are read at each choice.
        processor: its image processor.
        images: what statistics are taken from.
        settings: budget, method and schedule.
        seed: of the images' draw.
        accelerator: device and processes, which share out the statistics.

    Attributes:
        allocation: the last choice, with the losses that it predicted.
    """

    model: PreTrainedModel
    processor: ImageProcessor
    images: ImageSet
    settings: GradualConfig
    seed: int
    accelerator: "Accelerator"
    allocation: Allocation | None = field(default=None, init=False)

    @cached_property
    def flops(self) -> ModelFlops:
        """FLOPs of the dense architecture, for one image."""
        return count_flops(self.model, picture_size(self.model, self.processor), merging=True)

    def begin_and_goal(self) -> tuple[float, float]:
        """Shares of the dense model's cost: what is kept now, and what the budget allows.

        Raises:
            ConfigError: the model is within the budget already.
        """
        account = self.account()
        begin, goal = account["reached"] / account["dense"], account["asked"] / account["dense"]
        if begin <= goal:
            raise ConfigError(
                f"gradual.budget: the model keeps {begin:.4f} of its {account['metric']} already, no more than the "
                f"{goal:.4f} asked for; lower the budget or take out gradual"
            )
        return begin, goal

    def account(self) -> JsonDict:
        """What the budget asked for, and what the model costs now, in the budget's unit; see `BudgetReport`."""
        layers: dict[str, Any] = dict(block_sparse_layers(self.model))
        budget = model_budget(self.settings.budget, self.model, layers, self.flops, self._block_shape)
        return budget.account(masks_of(self.model))

    def choose(self, share: float) -> dict[str, Tensor]:
        """Masks that keep a share of the dense model's cost, within those of now.

        Raises:
            BudgetError: no such masks.
            ModelError: a layer's inputs are too dependent for "obs".
            DataError: the images cannot be used.
        """
        masks, shape = masks_of(self.model), self._block_shape
        least = min(self.settings.min_kept_per_layer, *(float(mask.float().mean()) for mask in masks.values()))
        wanted = replace(self.settings.budget, ratio=share, value=None)
        config = replace(self.settings, min_kept_per_layer=least).pruning(shape, wanted)
        dense = _dense_form(self.model)
        targets = {name: linear_in(dense, name) for name in masks}
        found = self._statistics(dense, targets, shape) if self.settings.scoring.needs_images else {}
        budgets = model_budgets(config, dense, targets, self.flops)
        gone = {name: ~mask for name, mask in masks.items()}
        selector = Selector(dense, targets, found, self.flops, budgets, config, self.accelerator, gone=gone)
        self.allocation = selector.select().allocation
        return {name: mask & masks[name] for name, mask in self.allocation.masks.items()}

    @property
    def _block_shape(self) -> tuple[int, int]:
        return next(module.block_shape for _, module in block_sparse_layers(self.model))

    def _statistics(
        self, dense: PreTrainedModel, targets: dict[str, nn.Linear], shape: tuple[int, int]
    ) -> dict[str, LayerStatistics]:
        """What the method needs to know of each target's inputs and gradients, by the target's name."""
        return collect(
            dense,
            self.images.sample(self.settings.samples, self.seed),
            self.processor,
            targets,
            accelerator=self.accelerator,
            gradients=self.settings.scoring.gradients,
            fisher=self.settings.scoring.fisher,
            block_shape=shape,
            seed=self.seed,
        )[0]


def _dense_form(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with dense layers, zeros where blocks are gone."""
    dense = copied(model)
    unfuse(dense)
    for name, module in list(block_sparse_layers(dense)):
        dense.set_submodule(name, module.to_dense())
    return dense.eval()
