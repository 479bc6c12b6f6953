"""Pictures for pages: block masks as images, and where marks of a chart stand, in per cent of its width and height."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict

from PIL import Image
from torch import Tensor

# Kept blocks; contrasts with a light and with a dark ground, which shows where blocks were removed.
KEPT_COLOUR = (59, 130, 246)
LONGEST_SIDE = 192  # of the largest layer's map, in CSS pixels
MAX_GROUP_LABELS = 16
COLOURS = 6  # that the pages' style has


@dataclass(frozen=True)
class MaskPicture:
    """A mask as an image of one pixel a block.

    Attributes:
        uri: a PNG with two colours, the ground transparent; None for a layer with no block at all.
        width, height: in CSS pixels, in the proportions of the weight matrix.
        sharp: whether a block is at least a pixel, so that it should have sharp edges.
    """

    uri: str | None
    width: int
    height: int
    sharp: bool


def mask_picture(mask: Tensor, block_shape: tuple[int, int], longest: int) -> MaskPicture:
    """Draw a mask, at a scale that all layers of a model share.

    Args:
        mask: bool [block_rows, block_cols].
        block_shape: (rows, cols) of a block.
        longest: the longest side of any layer, in weights.
    """
    scale = LONGEST_SIDE / longest
    height, width = (round(n * size * scale) for n, size in zip(mask.shape, block_shape, strict=True))
    uri = mask_png(mask) if mask.numel() else None
    return MaskPicture(uri, max(width, 1), max(height, 1), min(block_shape) * scale >= 1)


def mask_png(mask: Tensor) -> str:
    """A data URI of a PNG with a pixel for each block: filled where it is kept, transparent where it was removed."""
    rows, cols = mask.shape
    image = Image.frombytes("P", (cols, rows), mask.byte().contiguous().numpy().tobytes())
    image.putpalette([255, 255, 255, *KEPT_COLOUR])
    file = io.BytesIO()
    image.save(file, "PNG", bits=1, transparency=0, optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most so many round numbers within a range.

    Example:
        >>> ticks(0.0, 1.0)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10, 20) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Bar:
    """A bar of a chart.

    Attributes:
        value: from 0.
        group: what it belongs to, such as a transformer layer; neighbours of one group stand close together.
        role: what it is within the group; bars of a role share a colour.
        title: what it says when pointed at.
    """

    value: float
    group: str
    role: str
    title: str


class PlacedBar(TypedDict):
    """Where a bar stands in per cent, `y` being its upper end, the number of its colour, and what it says."""

    x: float
    width: float
    y: float
    height: float
    colour: int
    title: str


class Label(TypedDict):
    """A group's name, and where its middle is in per cent."""

    x: float
    text: str


class Line(TypedDict):
    """A line across a chart: where in per cent, and the value that it stands for."""

    y: float
    value: float


class BarChart(TypedDict):
    """A chart of upright bars; `legend` has the role of each colour."""

    bars: list[PlacedBar]
    labels: list[Label]
    lines: list[Line]
    legend: list[str]


def bar_chart(bars: Sequence[Bar], top: float | None = None) -> BarChart:
    """Upright bars side by side, in their order.

    Args:
        bars: what to draw.
        top: value at the upper edge; by default the largest one.
    """
    top = top or max([*(bar.value for bar in bars), 0.0]) or 1.0
    starts = [i for i, bar in enumerate(bars) if not i or bar.group != bars[i - 1].group]
    unit = 100 / max(len(bars) + len(starts), 1)  # one bar's width is left between groups
    colours = {role: number for number, role in enumerate(dict.fromkeys(bar.role for bar in bars))}
    places: list[PlacedBar] = []
    labels: list[Label] = []
    for number, (start, end) in enumerate(pairwise([*starts, len(bars)])):
        left = unit * (start + number + 0.5)
        labels.append({"x": left + unit * (end - start) / 2, "text": bars[start].group})
        for i, bar in enumerate(bars[start:end]):
            height = 100 * min(max(bar.value / top, 0.0), 1.0)
            places.append(
                {
                    "x": left + i * unit,
                    "width": 0.85 * unit,
                    "y": 100 - height,
                    "height": height,
                    "colour": colours[bar.role] % COLOURS,
                    "title": bar.title,
                }
            )
    every = math.ceil(len(labels) / MAX_GROUP_LABELS) or 1
    lines: list[Line] = [{"y": 100 - 100 * tick / top, "value": tick} for tick in ticks(0.0, top, 5)]
    return {"bars": places, "labels": labels[::every], "lines": lines, "legend": list(colours)}


@dataclass(frozen=True)
class Mark:
    """A model in a plot of what it costs and what it is worth.

    Attributes:
        label: short, beside the mark.
        title: what it is.
        cost: a share.
        gain: a share, or another number.
        interval: of the gain.
        best: whether it lies on the frontier.
        dense: whether it stands out, as the model does that the others were made from.
    """

    label: str
    title: str
    cost: float
    gain: float
    interval: tuple[float, float]
    best: bool = False
    dense: bool = False


@dataclass(frozen=True, kw_only=True)
class PlacedMark(Mark):
    """A mark, and where it stands in per cent: `x` and `y`, and the `low` and `high` end of its interval."""

    x: float
    y: float
    low: float
    high: float


class Tick(TypedDict):
    """Where on an axis, in per cent, which value is."""

    at: float
    value: float


class Piece(TypedDict):
    """A straight line from one point to another, in per cent."""

    x1: float
    y1: float
    x2: float
    y2: float


class Plot(TypedDict):
    """Models by cost and gain; `line` has the pieces of the frontier."""

    marks: list[PlacedMark]
    line: list[Piece]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def scatter(marks: Sequence[Mark]) -> Plot:
    """Costs to the right, gains upwards, and a line through the frontier."""
    costs = [mark.cost for mark in marks]
    low_x, high_x = _range(min(costs), max(costs))
    low_y, high_y = _range(min(mark.interval[0] for mark in marks), max(mark.interval[1] for mark in marks))

    def x(value: float) -> float:
        return 100 * (value - low_x) / (high_x - low_x)

    def y(value: float) -> float:
        return 100 - 100 * (value - low_y) / (high_y - low_y)

    placed = [
        PlacedMark(**vars(mark), x=x(mark.cost), y=y(mark.gain), low=y(mark.interval[0]), high=y(mark.interval[1]))
        for mark in marks
    ]
    best = sorted((place.x, place.y) for place in placed if place.best)
    line: list[Piece] = [{"x1": a[0], "y1": a[1], "x2": b[0], "y2": b[1]} for a, b in pairwise(best)]
    return {
        "marks": placed,
        "line": line,
        "x_ticks": [{"at": x(tick), "value": tick} for tick in ticks(low_x, high_x, 5)],
        "y_ticks": [{"at": y(tick), "value": tick} for tick in ticks(low_y, high_y, 6)],
    }


def _range(low: float, high: float) -> tuple[float, float]:
    """With room at both ends."""
    room = 0.08 * (high - low) or 0.05
    return low - room, high + room
