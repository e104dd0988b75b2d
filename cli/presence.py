"""Whether somebody still waits for what a command is about to print.

A signal that would end the command, a closed terminal, and a pipe whose reader has gone are raised in the main thread,
wherever it is, so that the command can cancel what it began. The pipe is looked at on a timer: a call that waits for an
engine prints nothing by which its end would be noticed.
"""

from __future__ import annotations

import contextlib
import select
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from rsm.cli.streams import EXIT_READER_GONE

_LOOK_S = 0.5
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGHUP: "a closed terminal"}


class Departure(BaseException):
    """Nobody waits any more. No Exception: on its way to the command, nobody is to take it for an error of theirs."""

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.why = why
        self.status = status


class TimeIsUp(BaseException):
    """No TimeoutError above all: the Redis client would take that for a lost connection and try again."""


class Presence:
    """A context in which departures, and the end of `until`, are raised. For the main thread alone.

    Attributes:
        until: when TimeIsUp is raised, on the monotonic clock; none = never.
    """

    def __init__(self) -> None:
        self.until: float | None = None
        self._out = _pollable_stdout()

    def __enter__(self) -> Presence:
        self._before = {
            number: signal.signal(number, self._on_signal)
            for number in _NAMES
            if signal.getsignal(number) is not signal.SIG_IGN  # nohup
        }
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, _LOOK_S, _LOOK_S)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        raise Departure(_NAMES[signal.Signals(number)], 128 + number)

    def _look(self, *_: object) -> None:
        if self.until is not None and time.monotonic() >= self.until:
            raise TimeIsUp
        if self._out is not None and self._out.poll(0):
            raise Departure("the reader of its output has gone", EXIT_READER_GONE)


def _pollable_stdout() -> select.poll | None:
    """None where stdout is no file, as in a test."""
    try:
        fd = sys.stdout.fileno()
    except (AttributeError, OSError):
        return None
    out = select.poll()
    out.register(fd, 0)  # whatever is not asked for is reported: errors, and the other end's absence
    return out


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """For the last steps: `timeout` and a closed terminal signal more than once. Ctrl-C still ends them."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _NAMES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
