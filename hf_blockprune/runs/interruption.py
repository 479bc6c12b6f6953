"""Ctrl-C and SIGTERM: a command ends with one line that says what is kept, and the exit code that a shell expects."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TypeAlias

from .processes import is_first_process

Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None  # of a signal, as `signal` has it

SIGNAL_BASE = 128  # a shell's exit code of a process that a signal ended is this and the signal's number


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it before they kill."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a run.

    Args:
        message: what of it is kept.
        stop: what ended it.

    Attributes:
        exit_code: for the process.
    """

    def __init__(self, message: str, stop: KeyboardInterrupt) -> None:
        super().__init__(message)
        self.exit_code = exit_code(stop)


def exit_code(stop: KeyboardInterrupt) -> int:
    """130 after Ctrl-C, 143 after SIGTERM."""
    if isinstance(stop, Interrupted):
        return stop.exit_code
    return SIGNAL_BASE + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


@contextmanager
def interruptible(say: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end what is inside: one line is said, and the process is to exit with 130 or 143.

    Of several processes the first one says it.

    Args:
        say: writes one line for the user, on standard error.

    Raises:
        SystemExit: it was interrupted.
    """
    before = _handle(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as stop:
        # Whoever launched several processes may send both, one after the other; the first is answered.
        ignored = {number: _handle(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        if is_first_process():
            say(": ".join(["interrupted", *([str(stop)] if str(stop) else [])]))
        _handle(signal.SIGINT, ignored[signal.SIGINT])
        raise SystemExit(exit_code(stop)) from None
    finally:
        _handle(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _handle(number: int, handler: Handler) -> Handler:
    """Set a signal's handler, where that is possible: in the main thread; the one before, None where unknown."""
    if handler is None or threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(number, handler)
