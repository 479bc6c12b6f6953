"""How far a layer's predicted loss is from what pruning it really does to the model's predictions.

The Fisher information is a second-order picture of the dense model, and is off by a different factor in each layer: it
takes errors for independent, and knows nothing of what softmax and norms forgive. Each group of Linears that feed each
other is therefore pruned alone, as an allocation says, with its surviving weights adapted; the divergence of the
model's predictions over the predicted loss is the factor by which the group's losses are corrected (in the spirit of
SPDY, Frantar and Alistarh 2022, arXiv 2201.13096, which searches for such factors instead).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..cost.flops import dtype_of
from ..display.stages import stage
from ..errors import ModelError
from ..model.layers import linear_in
from ..model.shrunk import KeptFeatures
from ..refit.solve import Moments, solve
from ..refit.suffixes import Suffixes
from ..score.blocks import expand_mask
from ..score.statistics import LayerStatistics
from .divergence import IMAGES_AT_ONCE, Divergence
from .state import SelectionState

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

LARGEST_FACTOR = 30.0
LEAST_LOSS = 1e-30  # nats; less is nothing, and its ratios would underflow


@torch.no_grad()
def true_losses(
    model: "PreTrainedModel",
    groups: Sequence[Sequence[str]],
    masks: dict[str, Tensor],
    statistics: dict[str, LayerStatistics],
    block_shape: tuple[int, int],
    pixels: Tensor,
    *,
    accelerator: "Accelerator",
    damping: float,
    kept: Mapping[str, KeptFeatures] | None = None,
    state: SelectionState | None = None,
    number: int = 0,
) -> list[float]:
    """Divergence of the predictions when one group of Linears is pruned and the others are dense.

    Args:
        model: the dense model, left as it was.
        groups: module names; groups are shared out over processes.
        masks: bool [block_rows, block_cols] by module name, of what is kept of it.
        statistics: of the dense Linears, by module name.
        block_shape: (rows, cols).
        pixels: [images, channels, height, width], the same on every process.
        accelerator: device and processes.
        damping: of the surviving weights' solution.
        kept: what stays of the Linears that become smaller, by module name.
        state: keeps each group's loss, and gives back those of an interrupted run.
        number: how often losses were measured before.

    Returns:
        KL(dense || pruned) of what the model's task makes of its outputs, in nats for each group, the mean over images.

    Raises:
        ModelError: a layer's surviving weights cannot be solved for.
    """
    from accelerate.utils import gather_object

    batches = [part.to(dtype_of(model)) for part in pixels.split(IMAGES_AT_ONCE)]
    suffixes = Suffixes(model, {name for group in groups for name in group}, batches)
    divergence = Divergence(model, suffixes.outputs)
    state, losses, kept = state or SelectionState(), [], kept or {}
    stored = {i: state.loss(number, i) for i in range(len(groups))}
    known = {i: loss for i, loss in stored.items() if loss is not None}
    missing = [i for i in stored if i not in known]
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    with stage("true losses", len(mine), unit="groups of layers") as bar:
        for index in bar.over(mine):
            parts = [_Part(n, masks[n], statistics[n], *kept.get(n, (None, None))) for n in groups[index]]
            with _pruned(model, parts, block_shape, damping):
                losses.append((index, divergence.of(suffixes.run(groups[index]))))
            state.keep_loss(number, index, len(groups), losses[-1][1])
    every = known | dict(gather_object(losses) if accelerator.num_processes > 1 else losses)
    return [every[i] for i in range(len(groups))]


@dataclass(frozen=True)
class _Part:
    """What stays of a Linear: blocks of the matrix of the outputs and inputs that stay, None for all of them."""

    name: str
    mask: Tensor
    statistics: LayerStatistics
    outputs: Tensor | None
    inputs: Tensor | None

    def prune(self, linear: nn.Linear, block_shape: tuple[int, int], damping: float) -> None:
        """Give the Linear the surviving weights that `obs` reckons with; its mean output stays where there is a bias.

        Outputs that leave are zero, bias and all.
        """
        weight, mean = linear.weight.data, self.statistics.need("mean")
        device = weight.device
        rows, cols = (
            torch.arange(count, device=device) if chosen is None else chosen.to(device)
            for chosen, count in zip((self.outputs, self.inputs), weight.shape, strict=True)
        )
        used = expand_mask(self.mask.any(dim=0, keepdim=True), (1, len(cols)), (1, block_shape[1]))[0]
        pruned = torch.zeros_like(weight)
        where = rows[:, None], cols[used.to(device)]
        pruned[where] = self._solution(weight[rows], where[1], block_shape, damping).to(weight.dtype)
        linear.weight.data = pruned
        if linear.bias is not None:
            bias = torch.zeros_like(linear.bias.data)
            bias[rows] = (linear.bias.data + ((weight - pruned).double() @ mean).to(weight.dtype))[rows]
            linear.bias.data = bias

    def _solution(self, weight: Tensor, kept: Tensor, block_shape: tuple[int, int], damping: float) -> Tensor:
        """Weights of the inputs that kept blocks read, from [out, in] of the outputs that stay."""
        covariance, mean = self.statistics.safe_covariance, self.statistics.need("mean")
        moments = Moments(mean[kept], mean[:0], covariance[kept][:, kept], weight.double() @ covariance[:, kept], 0.0)
        mask = self.mask[:, self.mask.any(dim=0)].to(weight.device)
        try:
            return solve(weight[:, kept], mask, block_shape, moments, damping)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise ModelError(
                f"{self.name}: its inputs are too dependent ({error}); raise damping or use more calibration images"
            ) from error


@contextmanager
def _pruned(
    model: "PreTrainedModel", parts: list[_Part], block_shape: tuple[int, int], damping: float
) -> Iterator[None]:
    """While it lasts, some Linears of a model are pruned."""
    before = [(p, p.data) for part in parts for p in model.get_submodule(part.name).parameters()]
    try:
        for part in parts:
            part.prune(linear_in(model, part.name), block_shape, damping)
        yield
    finally:
        for parameter, value in before:
            parameter.data = value


def loss_factors(losses: Sequence[float], predicted: Sequence[float]) -> list[float]:
    """True over predicted loss of each group, at most `LARGEST_FACTOR` from the median either way.

    A group that lost nothing takes the median, so that it stays comparable with the others.
    """
    pairs = list(zip(losses, predicted, strict=True))
    ratios = sorted(loss / guess for loss, guess in pairs if loss > LEAST_LOSS and guess > LEAST_LOSS)
    if not ratios:
        return [1.0] * len(losses)
    middle = ratios[len(ratios) // 2]
    least, most = middle / LARGEST_FACTOR, middle * LARGEST_FACTOR
    return [min(max(loss / guess, least), most) if guess > LEAST_LOSS else middle for loss, guess in pairs]
