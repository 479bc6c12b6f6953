"""Which units, heads and features of heads leave, under the same budget as blocks, and what the layers are then.

At a price of cost in units of loss, each attention and each MLP takes the option with the least loss less the price of
what it saves: the equal-slope rule of `choose.allocation`. Blocks will leave what stays at the same price, so what an
option saves is worth less by what blocks would have saved there: their gain at this price, as their traces say it, in
proportion to the weights that the option leaves. The price is found at which both together meet the budget.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from ..errors import BudgetError
from ..model.layers import linear_from, shape_of
from ..model.shrunk import KeptFeatures, LayerShape, kept_features
from ..model.structure import TransformerLayer
from ..score.shrink import Columns
from ..score.statistics import LayerStatistics
from ..score.trace import RemovalTrace
from .budgets import ModelBudget
from .shrink_options import Option, UnitOptions

BISECTIONS = 60
HIGHEST = 1e12


@dataclass(frozen=True)
class Shrunk:
    """The layers to prune as they are once features left; the whole ones where none did.

    Attributes:
        linears: by name, new ones where they are smaller.
        statistics: theirs.
        budgets: of the model with them.
        shapes: of the layers that may be smaller.
        loss: what the features that left cost, by name of the Linear whose factor holds for it, without the factor.
    """

    linears: dict[str, nn.Linear]
    statistics: dict[str, LayerStatistics]
    budgets: list[ModelBudget]
    shapes: tuple[LayerShape, ...] = ()
    loss: dict[str, float] = field(default_factory=dict)

    def kept(self) -> dict[str, KeptFeatures]:
        """What stays of each Linear that is smaller, by name."""
        return kept_features(self.shapes)

    def losses(self, factors: dict[str, float]) -> dict[str, float]:
        """`loss` with factors of true over predicted loss by name; 1 where it is missing."""
        return {name: loss * factors.get(name, 1.0) for name, loss in self.loss.items()}


def shrink(whole: Shrunk, shapes: Sequence[LayerShape], loss: dict[str, float], damping: float) -> Shrunk:
    """Let features leave; readers' surviving weights and biases adapt (`score.shrink`).

    Args:
        whole: the layers with all features; they stay as they are.
        shapes: what stays of layers.
        loss: see `Shrunk`.
        damping: relative, of the covariance.
    """
    linears, statistics = dict(whole.linears), dict(whole.statistics)
    for shape in shapes:
        readers = ((shape.layer.out, shape.gone_features), (shape.layer.fc2, shape.gone_units))
        gone = {name: features() for name, features in readers}
        for name, (outputs, inputs) in shape.kept().items():
            linear, s = whole.linears[name], whole.statistics[name]
            device = linear.weight.device
            outputs, inputs = (None if x is None else x.to(device) for x in (outputs, inputs))
            weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
            if outputs is not None:
                weight, bias = weight[outputs], None if bias is None else bias[outputs]
            if inputs is not None:
                adapted, more = Columns(weight, s, damping).without(gone[name].to(device))
                weight = adapted[:, inputs].to(weight.dtype)
                bias = None if bias is None else bias + more.to(bias.dtype)
            linears[name] = linear_from(weight, bias, linear)
            statistics[name] = s.permuted(inputs=inputs, outputs=outputs)
    budgets = [budget.shrunk(linears, shapes) for budget in whole.budgets]
    return Shrunk(linears, statistics, budgets, tuple(shapes), loss)


@dataclass(frozen=True)
class Choice:
    """One attention's or MLP's options, with what they come to.

    Attributes:
        layer: of it.
        options: the whole one first.
        linears: names of its Linears.
        loss: [options], with factors.
        saved: [options, budgets].
        area: weights that stay, as a share of those that the traces of blocks were taken of, [options].
    """

    layer: TransformerLayer
    options: list[Option]
    linears: tuple[str, ...]
    loss: np.ndarray
    saved: np.ndarray
    area: np.ndarray


class Shrinking:
    """Chooses how far each attention and each MLP shrinks.

    Args:
        whole: the layers with all features.
        attentions: options by layer.
        mlps: options by layer.
        damping: relative, of the covariance.
    """

    def __init__(
        self,
        whole: Shrunk,
        attentions: list[tuple[TransformerLayer, list[Option]]],
        mlps: list[UnitOptions],
        damping: float,
    ) -> None:
        self.whole, self.damping = whole, damping
        self.attentions, self.mlps = attentions, mlps

    def choose(
        self, factors: dict[str, float], blocks: dict[str, RemovalTrace] | None, now: Shrunk | None = None
    ) -> Shrunk:
        """What should stay.

        Args:
            factors: true over predicted loss by name of a Linear; 1 where it is missing.
            blocks: removal traces by name, None where no blocks may leave.
            now: what the traces were taken of, by default the whole layers.

        Raises:
            BudgetError: no blocks may leave, and the budgets cannot be met.
        """
        now = now or self.whole
        choices = self._choices(factors, now)
        needed = np.array([b.blocks.needed for b in self.whole.budgets])
        gains = {} if blocks is None else {c.linears: _BlockGain(c.linears, blocks, now, factors) for c in choices}
        rest = None if blocks is None else self._gain_of_others(choices, blocks, now, factors)
        picks = _meet(choices, gains, rest, needed)
        if blocks is None:
            picks = _spend(choices, picks, needed)
            self._check(choices, picks)
        return self._shrunk(choices, picks, now)

    def _gain_of_others(
        self, choices: list[Choice], blocks: dict[str, RemovalTrace], now: Shrunk, factors: dict[str, float]
    ) -> "_BlockGain":
        inside = {name for choice in choices for name in choice.linears}
        return _BlockGain(tuple(name for name in blocks if name not in inside), blocks, now, factors)

    def _choices(self, factors: dict[str, float], now: Shrunk) -> list[Choice]:
        choices = []
        for layer, options in self.attentions:
            names = (layer.query, layer.key, layer.value, layer.out)
            shapes = [self._attention_shapes(layer, option) for option in options]
            choices.append(self._choice(layer, options, names, shapes, factors, now))
        for mlp in self.mlps:
            shapes = [self._mlp_shapes(mlp.layer, option) for option in mlp.options]
            choices.append(self._choice(mlp.layer, mlp.options, (mlp.layer.fc1, mlp.layer.fc2), shapes, factors, now))
        return choices

    def _attention_shapes(self, layer: TransformerLayer, option: Option) -> dict[str, tuple[int, int]]:
        features = option.size[0] * option.size[1]
        rows = {name: (features, self._size(name)[1]) for name in (layer.query, layer.key, layer.value)}
        return {**rows, layer.out: (self._size(layer.out)[0], features)}

    def _mlp_shapes(self, layer: TransformerLayer, option: Option) -> dict[str, tuple[int, int]]:
        units = option.size[0]
        return {layer.fc1: (units, self._size(layer.fc1)[1]), layer.fc2: (self._size(layer.fc2)[0], units)}

    def _size(self, name: str) -> tuple[int, int]:
        return shape_of(self.whole.linears[name])

    def _choice(
        self,
        layer: TransformerLayer,
        options: list[Option],
        names: tuple[str, ...],
        shapes: list[dict[str, tuple[int, int]]],
        factors: dict[str, float],
        now: Shrunk,
    ) -> Choice:
        def cost(option: Option, sizes: dict[str, tuple[int, int]], budget: ModelBudget) -> float:
            linears = sum(budget.linear(name, size) for name, size in sizes.items())
            if not option.heads:
                return linears
            (heads, head_size), (_, dense) = option.size, options[0].size
            return linears + budget.products(layer, heads, head_size, dense)

        costs = np.array([[cost(o, s, b) for b in self.whole.budgets] for o, s in zip(options, shapes, strict=True)])
        loss = np.array([sum(value * factors.get(name, 1.0) for name, value in o.loss.items()) for o in options])
        weights = np.array([sum(rows * cols for rows, cols in sizes.values()) for sizes in shapes])
        traced = sum(now.linears[name].weight.numel() for name in names)
        return Choice(layer, options, names, loss, costs[0] - costs, weights / traced)

    def _check(self, choices: list[Choice], picks: list[int]) -> None:
        saved = np.sum([c.saved[i] for c, i in zip(choices, picks, strict=True)], axis=0)
        for budget, gone in zip((b.blocks for b in self.whole.budgets), saved, strict=True):
            reached = budget.left_without(float(gone))
            if reached > budget.ratio * (1 + 1e-9):
                raise BudgetError(
                    f"{budget.name}: {budget.ratio:.4f} cannot be met by units and heads alone, {reached:.4f} is the "
                    "least; raise the budget, add blocks to moves, or lower min_kept_per_layer"
                )

    def _shrunk(self, choices: list[Choice], picks: list[int], now: Shrunk) -> Shrunk:
        """The layers with the chosen options; those of now, where that is what they are."""
        units = {mlp.layer: mlp for mlp in self.mlps}
        shapes, loss = {choice.layer: self._whole_shape(choice.layer) for choice in choices}, {}
        for choice, pick in zip(choices, picks, strict=True):
            option, shape = choice.options[pick], shapes[choice.layer]
            if option.heads:
                shape = replace(shape, heads=option.heads, head_size=option.size[1])
            else:
                shape = replace(shape, units=units[choice.layer].units(option))
            shapes[choice.layer] = shape
            loss |= option.loss
        chosen = tuple(shapes.values())
        return now if chosen == now.shapes else shrink(self.whole, chosen, loss, self.damping)

    def _whole_shape(self, layer: TransformerLayer) -> LayerShape:
        size, units = self._size(layer.query)[0] // layer.heads, self._size(layer.fc1)[0]
        return LayerShape(layer, tuple(range(layer.heads)), size, size, tuple(range(units)), units)


class _BlockGain:
    """What blocks of some Linears save at a price, and the loss of that."""

    def __init__(
        self, names: Sequence[str], traces: dict[str, RemovalTrace], now: Shrunk, factors: dict[str, float]
    ) -> None:
        self.loss: list[np.ndarray] = []  # [queues, steps + 1]
        self.saved: list[np.ndarray] = []  # [budgets, queues, steps + 1]
        for name in names:
            trace = traces[name]
            self.loss.append(trace.loss.numpy() * factors.get(name, 1.0))
            steps = trace.order.reshape(*trace.order.shape[:2], -1)
            costs = [b.blocks.costs[name].flatten()[steps].sum(-1).cumsum(1) for b in now.budgets]
            self.saved.append(np.stack([np.pad(cost.numpy(), ((0, 0), (1, 0))) for cost in costs]))

    def at(self, price: np.ndarray) -> tuple[float, np.ndarray]:
        """(loss less the price of what is saved, what is saved [budgets])."""
        gain, saved = 0.0, np.zeros(len(price))
        for loss, costs in zip(self.loss, self.saved, strict=True):
            worth = loss - np.tensordot(price, costs, 1)
            best = worth.argmin(1)
            rows = np.arange(len(best))
            gain += float(worth[rows, best].sum())
            saved += costs[:, rows, best].sum(1)
        return gain, saved


def _meet(
    choices: list[Choice], gains: dict[tuple[str, ...], _BlockGain], rest: _BlockGain | None, needed: np.ndarray
) -> list[int]:
    """Picks at the lowest price at which all needs are met; where blocks leave too, just below it: they do the rest."""

    def at(price: np.ndarray) -> tuple[list[int], np.ndarray]:
        picks, total = [], np.zeros(len(needed)) if rest is None else rest.at(price)[1]
        for choice in choices:
            gain, saved = gains[choice.linears].at(price) if gains else (0.0, np.zeros(len(needed)))
            best = int((choice.loss - choice.saved @ price + gain * choice.area).argmin())
            picks.append(best)
            total = total + choice.saved[best] + saved * choice.area[best]
        return picks, total

    scale = 1 / np.maximum(np.abs(needed), 1e-300)
    if (needed <= 0).all():
        return at(np.zeros(len(needed)))[0]
    for mixture in np.eye(len(needed)) if len(needed) > 1 else ():
        picks = at(_price(at, scale * mixture, np.where(mixture > 0, needed, -np.inf))[1])
        if (picks[1] >= needed).all():
            return picks[0]  # the other budget does not bind
    below, above = _price(at, scale / len(needed), needed)
    return at(above if rest is None else below)[0]


def _price(
    at: Callable[[np.ndarray], tuple[list[int], np.ndarray]], direction: np.ndarray, needed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Multiples of a price just below and just above that at which the needs are met, which may be a very high one."""
    low, high = 0.0, 1e-9
    while not (at(high * direction)[1] >= needed * (1 - 1e-9)).all() and high < HIGHEST:
        low, high = high, high * 4
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        met = (at(middle * direction)[1] >= needed * (1 - 1e-9)).all()
        low, high = (low, middle) if met else (middle, high)
    return low * direction, high * direction


def _spend(choices: list[Choice], picks: list[int], needed: np.ndarray) -> list[int]:
    """Give back what is saved beyond the needs, where that lowers the loss most for what it costs."""
    picks = list(picks)
    spare = sum(c.saved[i] for c, i in zip(choices, picks, strict=True)) - needed
    while True:
        best: tuple[float, int, int] | None = None
        for index, choice in enumerate(choices):
            back = choice.saved[picks[index]] - choice.saved  # [options, budgets]
            gain = choice.loss[picks[index]] - choice.loss
            able = (back <= spare * (1 + 1e-12)).all(1) & (gain > 0)
            for option in np.flatnonzero(able):
                worth = float(gain[option]) / max(float((back[option] / np.maximum(spare, 1e-300)).max()), 1e-9)
                best = max(best or (0.0, -1, -1), (worth, index, int(option)))
        if best is None:
            return picks
        _, index, option = best
        spare = spare - (choices[index].saved[picks[index]] - choices[index].saved[option])
        picks[index] = option
