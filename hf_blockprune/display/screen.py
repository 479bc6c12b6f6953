"""Where a display is drawn: bars in a terminal or a notebook, a line now and then elsewhere, or nowhere.

All of it goes to standard error, so that standard output holds results alone.
"""

import importlib.util
import logging
import os
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.console import Console, Group
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..runs.processes import is_first_process
from .text import amount, clock, figures, listed, times

if TYPE_CHECKING:
    from .stages import Run

REFRESHES = 2  # a second
FIRST_LINE = 60.0  # seconds into a stage, where there is no terminal; every further line comes after twice the time
MOST_COLUMNS = 120


class Screen(Protocol):
    """What a run is shown on."""

    def begin(self, run: "Run") -> None:
        """A stage has begun."""

    def tick(self, run: "Run") -> None:
        """The stage under way has moved on; called a few times a second at most."""

    def end(self) -> None:
        """The stage is over, whether well or not."""

    def say(self, line: str) -> None:
        """Something to stay; no stage is under way."""


class Nowhere:
    """Shows nothing."""

    def begin(self, run: "Run") -> None:
        pass

    def tick(self, run: "Run") -> None:
        pass

    def end(self) -> None:
        pass

    def say(self, line: str) -> None:
        pass


class Lines:
    """A line at the end of each stage, and some during a long one: the more time has passed, the fewer."""

    def __init__(self) -> None:
        self._due = FIRST_LINE

    def begin(self, run: "Run") -> None:
        self._due = FIRST_LINE

    def tick(self, run: "Run") -> None:
        stage = run.stages[0]
        if stage.elapsed >= self._due:
            while stage.elapsed >= self._due:
                self._due *= 2
            self.say(run.progress(stage))

    def end(self) -> None:
        pass

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class Bars:
    """The stage under way with a bar, drawn over again; a line stays when it has ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._streams = _Streams(console)
        self._last = 0.0

    def begin(self, run: "Run") -> None:
        stage = run.stages[0]
        if stage.aside:
            return
        width = min(MOST_COLUMNS, self._console.width)
        self._live = Live(
            get_renderable=lambda: _picture(run, width),
            console=self._console,
            auto_refresh=not stage.undisturbed,
            refresh_per_second=REFRESHES,
            transient=True,
            redirect_stdout=False,  # see _Streams
            redirect_stderr=False,
        )
        if not self._console.is_jupyter:
            self._streams.redirect()
        self._live.start(refresh=True)

    def tick(self, run: "Run") -> None:
        if self._live is not None and not self._live.auto_refresh and perf_counter() - self._last > 1 / REFRESHES:
            self._live.refresh()
            self._last = perf_counter()

    def end(self) -> None:
        try:
            if self._live is not None:
                self._live.stop()
        finally:
            self._live = None
            self._streams.restore()

    def say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


def _picture(run: "Run", width: int) -> Group:
    """The stages under way, each with its bar, and what comes after them."""
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.width = width
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_column(ratio=1, min_width=4)
    grid.add_column(no_wrap=True, justify="right")
    below = []
    for depth, stage in enumerate(list(run.stages)):
        bar = ProgressBar(stage.total or None, min(stage.done, stage.total or 0), pulse=not stage.total)
        grid.add_row(Text("  " * depth + run.title(stage)), bar, Text(listed([amount(stage), *times(stage)])))
        below += figures(stage)
    later = []
    if (left := run.left) is not None and run.goes_on:
        later.append(f"{clock(left)} left in all")
    if run.ahead:
        later.append(f"then {', '.join(run.ahead)}")
    lines = [Text(text, style="dim", no_wrap=True, overflow="ellipsis") for text in (listed(below), "; ".join(later))]
    return Group(grid, *(line for line in lines if line))


class _Streams:
    """Lets what others print and log while bars are drawn appear above them, whole lines at a time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._before: dict[str, TextIO] = {}
        self._handlers: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []

    def redirect(self) -> None:
        global _redirected
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if _is_terminal(stream):  # what goes elsewhere cannot disturb, and must arrive there
                self._before[name] = stream
                setattr(sys, name, _Above(self._console, stream))
        for handler in _stream_handlers():
            for name, stream in self._before.items():
                if handler.stream is stream:  # a handler keeps the stream that was there when it was made
                    self._handlers.append((handler, stream))
                    handler.setStream(getattr(sys, name))
        _redirected = self

    def restore(self) -> None:
        global _redirected
        _redirected = None
        for handler, stream in self._handlers:
            handler.setStream(stream)
        for name, stream in self._before.items():
            above = getattr(sys, name)
            setattr(sys, name, stream)
            if isinstance(above, _Above):
                above.finish()
        self._handlers, self._before = [], {}

    def forget(self) -> None:
        """In a process that was split off while another thread may have held the console: never touch it there."""
        for handler, stream in self._handlers:
            handler.stream = stream
        for name, stream in self._before.items():
            setattr(sys, name, stream)


_redirected: _Streams | None = None
if hasattr(os, "register_at_fork"):  # data loaders' workers
    os.register_at_fork(after_in_child=lambda: _redirected and _redirected.forget())


class _Above(FileProxy):
    """Prints whole lines above what is drawn; rich's own one makes a line of every flush, as tqdm's bars do many."""

    def __init__(self, console: Console, stream: TextIO) -> None:
        super().__init__(console, stream)
        self._console, self._stream, self._rest = console, stream, ""

    def write(self, text: str) -> int:
        whole, newline, rest = (self._rest + text).rpartition("\n")
        self._rest = rest[rest.rfind("\r", 0, -1) + 1 :]  # a carriage return writes over what was before it
        if newline:
            self._console.print(Text.from_ansi(whole), soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        """Write what has not become a line."""
        self._stream.write(self._rest)
        self._stream.flush()


def _stream_handlers() -> list["logging.StreamHandler[TextIO]"]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    found = [handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers]
    return [handler for handler in found if isinstance(handler, logging.StreamHandler)]


def open_screen() -> Screen:
    """What there is to show a run on."""
    if not is_first_process() or _bars_are_disabled():
        return Nowhere()
    # Another live display holds the terminal, and prints lines above itself.
    if isinstance(sys.stderr, FileProxy) or sys.stderr is None:
        return Lines()
    console = Console(stderr=True)
    if console.is_jupyter:
        return Bars(console) if importlib.util.find_spec("ipywidgets") else Lines()
    return Bars(console) if _is_terminal(sys.stderr) and not console.is_dumb_terminal else Lines()


def _is_terminal(stream: TextIO | None) -> bool:
    # Not what rich says, which takes FORCE_COLOR in the log of a job for a terminal.
    return stream is not None and stream.isatty()


def _bars_are_disabled() -> bool:
    """Whether any of the switches says so that silence the libraries' own bars."""
    import huggingface_hub.utils as hub
    from transformers.utils import logging as transformers_logging

    if not transformers_logging.is_progress_bar_enabled() or hub.are_progress_bars_disabled():
        return True
    if (datasets := sys.modules.get("datasets")) is not None:  # it takes seconds to import
        return datasets.are_progress_bars_disabled()
    return os.environ.get("HF_DATASETS_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
