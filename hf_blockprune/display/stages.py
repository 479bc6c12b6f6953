"""One display of a run: its stages in order, how far the one under way is, and how long the rest takes.

Loops report through `stage`. Who runs several stages names them before with `planned`, so that each of them is shown as
"stage 3 of 7". A stage inside another one, such as an evaluation during training, is a second bar below it.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeVar

from .screen import Screen, open_screen
from .text import amount, clock, figures, listed, times

T = TypeVar("T")
TICK = 0.25  # seconds between two looks at the screen
BRIEF = ("saving",)  # next to nothing beside the other stages, so no estimate waits for how long they took
_thread = threading.local()  # a run of another thread has a display of its own


@dataclass(eq=False)
class Stage:
    """A loop that is under way; made by `stage`.

    Attributes:
        name: what is shown.
        total: how much is to be done, None where nobody knows.
        unit: of `total` and `done`, in the plural.
        work: how much is to be done in what time follows, where that is not `total`; see `advance`.
        done: so far.
        figures: numbers to show beside it, such as the loss.
        aside: libraries show bars of their own meanwhile, and nothing is drawn over them.
        undisturbed: time is being measured, so nothing is drawn but between two calls of `advance`.
    """

    name: str
    total: float | None = None
    unit: str = "steps"
    work: float | None = None
    done: float = 0
    figures: dict[str, float] = field(default_factory=dict)
    aside: bool = False
    undisturbed: bool = False

    def __post_init__(self) -> None:
        self.start = self._last = perf_counter()
        self._worked = self.done
        self._items, self._measured, self._spent = 0, 0.0, 0.0
        self._due = self.start + TICK
        self.resumed = self.done > 0
        self.run: Run | None = None

    def advance(self, count: float = 1, *, work: float | None = None, measured: bool = True, **figures: float) -> None:
        """More is done.

        Args:
            count: how much.
            work: how much of the stage's `work`.
            measured: whether it took as long as the rest will; not what was found done already.
            **figures: numbers to show.
        """
        now, amount = perf_counter(), count if work is None else work
        if measured:
            self._items, self._measured, self._spent = (
                self._items + 1,
                self._measured + amount,
                self._spent + now - self._last,
            )
        self.resumed |= not measured
        self._last, self.done, self._worked = now, self.done + count, self._worked + amount
        self.figures.update(figures)
        if now >= self._due and self.run is not None:
            self._due = now + TICK
            self.run.screen.tick(self.run)

    def reach(self, done: float) -> None:
        """So much is done in all."""
        self.advance(done - self.done)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items one by one; one is done when the next is asked for. What was before is no part of their time."""
        self._last = perf_counter()
        for item in items:
            yield item
            self.advance()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return perf_counter() - self.start

    @property
    def left(self) -> float | None:
        """Seconds that it goes on at the speed so far; None before there is a speed."""
        whole = self.total if self.work is None else self.work
        if whole is None or self._items < 2 or not self._measured:
            return None
        rest = (whole - self._worked) * self._spent / self._measured
        return max(0.0, rest - (perf_counter() - self._last))


@dataclass(frozen=True)
class Part:
    """One of several jobs in a row, each with stages; see `part`."""

    name: str
    number: int
    of: int
    kind: str
    ahead: Sequence[str]


class Run:
    """Where the display is: the stages that are planned, those under way, and how long others took."""

    def __init__(self, plan: Sequence[str]) -> None:
        self.plan, self.at = list(plan), 0  # the plan, and how many of it have begun
        self.stages: list[Stage] = []  # under way, each inside the one before it
        self.part: Part | None = None
        self.start = perf_counter()
        self.screen: Screen = open_screen()
        self._took: dict[tuple[str, str], float] = {}
        self._parts_took: dict[str, float] = {}
        self._stopped = False  # whether a stage of the part has ended by an error

    @contextmanager
    def showing(self, stage: Stage) -> Iterator[None]:
        """Show a stage while the block runs, and say how it went."""
        outermost, stage.run = not self.stages, self
        if outermost:
            self._enter(stage.name)
        self.stages.append(stage)
        whole = False
        try:
            if outermost:
                self.screen.begin(self)
            yield
            whole = True
        finally:
            if outermost:
                self.screen.end()
            self.stages.remove(stage)
            self._stopped |= not whole
            if whole and not stage.resumed:
                self._took[self._kind, stage.name] = stage.elapsed
            if outermost:
                self.screen.say(self.report(stage, whole=whole))

    def _enter(self, name: str) -> None:
        """Move on in the plan; what lies before the stage turned out not to be needed."""
        ahead = self.plan[self.at :]
        if name in ahead:
            del self.plan[self.at : self.at + ahead.index(name)]
        else:
            self.plan.insert(self.at, name)
        self.at += 1

    @contextmanager
    def within(self, part: Part, stages: Sequence[str]) -> Iterator[None]:
        """The stages of a part, which have a plan of their own."""
        before = self.plan, self.at, self.part
        self.plan, self.at, self.part = list(stages), 0, part
        self._stopped = False
        start = perf_counter()
        try:
            yield
            if not (self._stopped or self.ahead):  # one that failed is no sign of how long others take
                self._parts_took[part.kind] = perf_counter() - start
        finally:
            self.plan, self.at, self.part = before

    @property
    def _kind(self) -> str:
        return "" if self.part is None else self.part.kind

    @property
    def ahead(self) -> list[str]:
        """Names of the stages that are still to come."""
        return self.plan[self.at :]

    @property
    def left(self) -> float | None:
        """Seconds to the end of all; None where something ahead is of a kind that has not been there yet."""
        parts = [] if self.part is None else self.part.ahead
        known = [0.0 if name in BRIEF else self._took.get((self._kind, name)) for name in self.ahead]
        known += [self._parts_took.get(kind) for kind in parts]
        known.append(self.stages[0].left if self.stages else None)
        return None if None in known else sum(seconds for seconds in known if seconds is not None)

    @property
    def goes_on(self) -> bool:
        """Whether more is to come than the stage under way."""
        return bool(self.ahead) or (self.part is not None and bool(self.part.ahead))

    def title(self, stage: Stage) -> str:
        """Which stage of the run it is."""
        title = stage.name
        if stage in self.stages[1:]:
            return title
        if len(self.plan) > 1:
            title = f"stage {self.at} of {len(self.plan)}: {title}"
        return title if self.part is None else f"{self.part.name} ({self.part.number} of {self.part.of}), {title}"

    def report(self, stage: Stage, *, whole: bool) -> str:
        """A line on a stage that has ended, by itself or by an error."""
        took = clock(stage.elapsed) if whole else f"stopped after {clock(stage.elapsed)}"
        return listed([self.title(stage), amount(stage), took, *figures(stage)])

    def progress(self, stage: Stage) -> str:
        """A line on a stage that is under way."""
        return listed([self.title(stage), amount(stage), *times(stage), *figures(stage)])


@contextmanager
def planned(stages: Sequence[str]) -> Iterator[None]:
    """Name the stages that follow, in their order; those that do not come are left out then.

    Inside another plan that one holds.
    """
    if _current() is not None:
        yield
        return
    with _opened(stages):
        yield


@contextmanager
def part(
    name: str, stages: Sequence[str], *, number: int, of: int, kind: str, ahead: Sequence[str] = ()
) -> Iterator[None]:
    """One of several jobs in a row.

    Args:
        name: what is shown before its stages.
        stages: its plan.
        number, of: which one, of how many.
        kind: jobs of one kind take about as long.
        ahead: kinds of the jobs that follow.
    """
    with _joined() as run, run.within(Part(name, number, of, kind, ahead), stages):
        yield


@contextmanager
def stage(
    name: str,
    total: float | None = None,
    *,
    unit: str = "steps",
    work: float | None = None,
    initial: float = 0,
    aside: bool = False,
    undisturbed: bool = False,
) -> Iterator[Stage]:
    """Show a stage while the block runs; see `Stage` for the arguments.

    Nothing is shown on processes other than the first, nor where progress bars are disabled in transformers, datasets
    or huggingface_hub. Where standard error is no terminal there is one line at the end of the stage, and a few during
    a long one.

    Args:
        initial: how much was done before.

    Example:
        ```python
        with stage("calibration", len(batches), unit="batches") as bar:
            for batch in bar.over(batches):
                ...
        ```
    """
    with _joined() as run:
        shown = Stage(name, total, unit, work, initial, aside=aside, undisturbed=undisturbed)
        with run.showing(shown):
            yield shown


def _current() -> Run | None:
    return getattr(_thread, "run", None)


def _joined() -> AbstractContextManager[Run]:
    """The run that is shown, or a new one for what follows."""
    run = _current()
    return _opened(()) if run is None else nullcontext(run)


@contextmanager
def _opened(stages: Sequence[str]) -> Iterator[Run]:
    _thread.run = run = Run(stages)
    try:
        yield run
    finally:
        _thread.run = None
