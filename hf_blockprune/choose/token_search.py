"""How many patches should leave each layer: schedules of tokens, each a little cheaper than the one before.

Patches leave in steps, each at the layer where it costs the least divergence of the predictions for what it saves. A
step's divergence is measured, on images, with all steps before it taken. It grows as more patches leave, so a layer
whose measurement is out of date is measured again only when even that makes it the best one (lazy greedy, Minoux 1978).
What was found so is made better by patches that stay at one layer and leave another instead, as chance proposes it.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cost.flops import dtype_of
from ..display.stages import stage
from ..hub.blockprune_tokens import TokenSchedule, forget_schedule, set_schedule
from ..refit.suffixes import Suffixes
from .divergence import IMAGES_AT_ONCE, Divergence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 16  # in how many steps all patches leave
FREE = 1e-4  # nats that nobody would notice
PROPOSALS = 24


@dataclass(frozen=True)
class Costed:
    """A schedule, and what it comes to.

    Attributes:
        schedule: of tokens.
        share: of the dense model's cost that it leaves.
        divergence: KL(dense || merged) of the predictions in nats, the mean over images.
    """

    schedule: TokenSchedule
    share: float
    divergence: float


class TokenSearch:
    """Finds schedules of tokens for one dense model.

    Args:
        model: of transformers, in evaluation mode; it is left without merging.
        layers: names of Linears of each layer, in order.
        pixels: images to measure on, [images, channels, height, width].
        patches: of an image.
        least: patches that stay.
        cost: share of the dense model's cost that the model has with the schedule that is set in it.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        layers: Sequence[Sequence[str]],
        pixels: Tensor,
        patches: int,
        least: int,
        cost: Callable[[], float],
    ) -> None:
        self.model, self.layers, self.patches, self.least, self.cost = model, layers, patches, least, cost
        self.names = [name for names in layers for name in names]
        self.batches = [part.to(dtype_of(model)) for part in pixels.split(IMAGES_AT_ONCE)]
        self._leave = [0] * len(layers)
        self._suffixes = Suffixes(model, self.names, self.batches)
        self._measure = Divergence(model, self._suffixes.outputs)

    @torch.no_grad()
    def run(self, until: float) -> list[Costed]:
        """Schedules of less and less cost, from that of the dense model to one of at most this share.

        The last one costs no less than asked for, as far as whole patches allow; or what is least, where that is more.
        """
        found = [self._costed(self._leave, 0.0)]
        with stage("schedules", 100 * (1 - until), unit="% of the cost") as bar:
            try:
                self._drop_unread(found)
                queue = [(-float("inf"), layer, -1) for layer in range(len(self.layers))]
                while queue and found[-1].share > until:
                    step = self._best(queue, found[-1], len(found))
                    if step is None:
                        break
                    found.append(step)
                    self._accept(step)
                    bar.reach(100 * min(1 - step.share, 1 - until))
                if found[-1].share < until and len(found) > 1:
                    found[-1] = self._trimmed(found[-2], found[-1], until)
            finally:
                forget_schedule(self.model)
        return found

    def _drop_unread(self, found: list[Costed]) -> None:
        """Let all patches leave the last layer, where that changes nothing: its class token alone may be read."""
        leave = [*self._leave[:-1], self.patches - self.least]
        step = self._costed(leave, self._divergence(leave, len(leave) - 1))
        if step.divergence < FREE and step.share < found[-1].share:
            found.append(step)
            self._accept(step)

    @torch.no_grad()
    def refined(self, costed: Costed, seed: int = 0) -> Costed:
        """A schedule that costs no more, and diverges less where chance finds one.

        Args:
            costed: one that was found.
            seed: of what is proposed.
        """
        generator, best = random.Random(seed), costed
        self._accept(best)
        with stage("schedules", PROPOSALS, unit="proposals") as bar:
            try:
                for _ in bar.over(range(PROPOSALS)):
                    leave, layer = self._exchanged(best, costed.share, generator)
                    proposed = None if leave is None else self._costed(leave, self._divergence(leave, layer))
                    if proposed is not None and proposed.divergence < best.divergence:
                        best = proposed
                        self._accept(best)
            finally:
                forget_schedule(self.model)
        return best

    def _exchanged(self, costed: Costed, most: float, generator: random.Random) -> tuple[list[int] | None, int]:
        """(patches that leave if some leave one layer that left another before, the first of the two).

        As many stay at the other layer as may at that cost; None where the model has no such schedule.
        """
        size = max(1, self.patches // (STEPS * generator.choice((1, 2, 4))))
        more, fewer = generator.sample(range(len(self.layers)), 2)
        leave = list(costed.schedule.leave)
        leave[more] += size
        room = self.patches - self.least - sum(leave) + leave[fewer]
        return self._with_fewest(leave, fewer, 0, min(leave[fewer], room), most), min(more, fewer)

    def _with_fewest(self, leave: Sequence[int], layer: int, low: int, high: int, most: float) -> list[int] | None:
        """A schedule in which the fewest patches leave a layer that cost at most so much, from low to high, or None."""
        leave = list(leave)

        def fits(count: int) -> bool:
            leave[layer] = count
            return self._share(leave) <= most

        if high < low or not fits(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        leave[layer] = high
        return leave

    def _best(self, queue: list[tuple[float, int, int]], now: Costed, number: int) -> Costed | None:
        """The step to take; what is known of each layer, (price, layer, when measured), waits in a heap."""
        measured: dict[int, Costed] = {}
        while queue:
            _, layer, when = heapq.heappop(queue)
            if when == number:
                heapq.heappush(queue, (-float("inf"), layer, -1))
                return measured[layer]
            leave = self._after_step(layer)
            if leave is None:
                continue
            step = measured[layer] = self._costed(leave, self._divergence(leave, layer))
            saved = now.share - step.share
            if saved > 0:
                heapq.heappush(queue, ((step.divergence - now.divergence) / saved, layer, number))
        return None

    def _after_step(self, layer: int) -> list[int] | None:
        """Patches that leave if some more do at a layer, None where no more are left; later ones may have to stay."""
        leave = list(self._leave)
        before = self.patches - sum(leave[:layer])
        more = min(max(1, self.patches // STEPS), before - self.least - leave[layer])
        if more <= 0:
            return None
        leave[layer] += more
        for later in range(layer + 1, len(leave)):
            leave[later] = min(leave[later], self.patches - sum(leave[:later]) - self.least)
        return leave

    def _accept(self, step: Costed) -> None:
        self._leave = list(step.schedule.leave)
        set_schedule(self.model, step.schedule, self.names)
        self._suffixes = Suffixes(self.model, self.names, self.batches)

    def _divergence(self, leave: Sequence[int], layer: int) -> float:
        """Of a schedule that differs from what is set at a layer, and perhaps after it."""
        set_schedule(self.model, TokenSchedule(tuple(leave), self.patches), self.names)
        return self._measure.of(self._suffixes.run(self.layers[layer]))

    def _share(self, leave: Sequence[int]) -> float:
        """Of the dense model's cost that a schedule leaves."""
        set_schedule(self.model, TokenSchedule(tuple(leave), self.patches), self.names)
        return self.cost()

    def _costed(self, leave: Sequence[int], divergence: float) -> Costed:
        return Costed(TokenSchedule(tuple(leave), self.patches), self._share(leave), divergence)

    def _trimmed(self, before: Costed, after: Costed, until: float) -> Costed:
        """The least part of a step that is cheap enough."""
        few, many = before.schedule.leave, after.schedule.leave
        layer = next(i for i, (a, b) in enumerate(zip(few, many, strict=True)) if a != b)
        leave = self._with_fewest(many, layer, few[layer] + 1, many[layer], until)
        assert leave is not None  # the whole step is cheap enough
        self._accept(before)
        return self._costed(leave, self._divergence(leave, layer))
