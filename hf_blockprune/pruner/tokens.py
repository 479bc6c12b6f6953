"""How many patches leave each layer of a model that is about to be pruned."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..budget import Budget
from ..choose.allocation import CostBudget
from ..choose.budgets import model_budget
from ..choose.divergence import IMAGES_AT_ONCE, Divergence
from ..choose.token_search import FREE, Costed, TokenSearch
from ..config import BlockPruneConfig
from ..cost.flops import ModelFlops, dtype_of, merged_flops
from ..display.stages import Stage
from ..errors import BudgetError
from ..hub.blockprune_tokens import LEAST_TOKENS, TokenSchedule, forget_schedule
from ..model.layers import layer_chain
from ..model.merging import Merging
from ..report.values import TokensReport, TokenTrial
from ..runs.processes import agreed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

# How much of what a budget has to save is tried to be saved by tokens alone, as a power of the budget's ratio. What
# costs nothing is tried too: merging more may be the worst move where patches are few, or many weights do nothing.
POWERS = (0.0, 0.7, 0.85, 0.95)


@dataclass(frozen=True)
class TokenChoice:
    """Chooses a schedule, and with it how much of the budget tokens pay.

    Args:
        merging: of the dense model.
        targets: the Linears to prune.
        flops: of the dense model.
        config: how to prune.
        accelerator: the processes.
        searched: images to look for schedules on, [images, channels, height, width].
        judged: others, to judge trials on.
        trial: prunes a copy of the model by a schedule, roughly, and gives it; None where the budget cannot be met so.
            None where tokens have to pay all.
    """

    merging: Merging
    targets: dict[str, nn.Linear]
    flops: ModelFlops
    config: BlockPruneConfig
    accelerator: "Accelerator"
    searched: Tensor
    judged: Tensor
    trial: Callable[[TokenSchedule], "PreTrainedModel | None"] | None

    def choose(self, bar: Stage) -> TokensReport:
        """The schedule, and what else was tried; none is set in the model.

        Args:
            bar: advances with each share of the budget that was tried.

        Raises:
            BudgetError: no share of the budget that tokens could pay leaves one that can be met.
        """
        asked = self._asked()
        search = self._search()
        frontier: list[Costed] = agreed(search.run(asked), self.accelerator)
        bar.advance()
        judge, trials = Divergence(self.merging.model, list(self._outputs(self.merging.model))), []
        for power in bar.over((*POWERS, 1.0) if self.trial else (1.0,)):
            costed = _cheapest(frontier, asked**power) if power else _free(frontier)
            if power < 1 or costed.share <= asked:
                costed = agreed(search.refined(costed), self.accelerator) if power else costed
                trials.append(self._tried(costed, judge) if power < 1 else self._alone(costed, judge))
        done = [trial for trial in trials if trial is not None]
        if not done:
            least = f"{frontier[-1].share:.4f} is the least that they leave"
            raise BudgetError(f"budget: {asked:.4f} cannot be met, however many tokens merge; {least}; raise it")
        best = agreed(min(done, key=lambda trial: trial.divergence), self.accelerator)
        return TokensReport(
            leave=best.leave, patches=self.merging.patches, frontier=[_reported(c) for c in frontier], trials=done
        )

    @property
    def _wanted(self) -> Budget:
        """The budget that tokens are reckoned by."""
        budgets = (self.config.budget, self.config.second_budget)
        return next(budget for budget in budgets if budget is not None and budget.counts_tokens)

    def _cost(self, flops: ModelFlops) -> CostBudget:
        model, shape = self.merging.model, self.config.block_shape
        return model_budget(self._wanted, model, self.targets, flops, shape).blocks

    def _asked(self) -> float:
        """Share of the dense model's cost that may remain."""
        return self._cost(self.flops).ratio

    def _search(self) -> TokenSearch:
        def cost() -> float:
            return self._cost(merged_flops(self.merging.model, self.flops)).left_without(0.0)

        least = max(1, LEAST_TOKENS - self.merging.prefix)
        names, layers = self.merging.names, layer_chain(self.merging.model, self.merging.names)
        by_layer = [[name for name in names if name.startswith(f"{layer.name}.")] for layer in layers]
        return TokenSearch(self.merging.model, by_layer, self.searched, self.merging.patches, least, cost)

    def _tried(self, costed: Costed, judge: Divergence) -> TokenTrial | None:
        """What a schedule comes to with the other moves, which pay the rest."""
        assert self.trial is not None
        pruned = self.trial(costed.schedule)
        return None if pruned is None else _reported(costed, judge.of(self._outputs(pruned)))

    def _alone(self, costed: Costed, judge: Divergence) -> TokenTrial:
        """What a schedule that pays all comes to; that is known without a prune."""
        self.merging.set(costed.schedule.leave)
        try:
            return _reported(costed, judge.of(self._outputs(self.merging.model)))
        finally:
            forget_schedule(self.merging.model)

    def _outputs(self, model: "PreTrainedModel") -> Iterator[object]:
        """What a model gives for the images that judge, by batch."""
        for batch in self.judged.to(dtype_of(model)).split(IMAGES_AT_ONCE):
            with torch.no_grad():
                yield model(pixel_values=batch)


def _cheapest(frontier: Sequence[Costed], share: float) -> Costed:
    """The first schedule of at most that share of the cost, or the one of the least."""
    return next((costed for costed in frontier if costed.share <= share), frontier[-1])


def _free(frontier: Sequence[Costed]) -> Costed:
    """The schedule of the least cost that changes no prediction."""
    return [costed for costed in frontier if costed.divergence < FREE][-1]


def _reported(costed: Costed, divergence: float | None = None) -> TokenTrial:
    value = costed.divergence if divergence is None else divergence
    return TokenTrial(leave=list(costed.schedule.leave), share=costed.share, divergence=value)
