"""Notices when nobody waits any longer for what a command is about to print.

Signals, a closed terminal and a closed pipe raise an exception in the main thread, wherever it is. So the command can
cancel what it began. The pipe is checked on a timer: while a call waits for an engine, nothing is printed that would
fail.
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

_CHECK_S = 0.5
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGHUP: "a closed terminal"}


class Departure(BaseException):
    """Nobody waits any longer. A BaseException, so that no `except Exception` on its way catches it."""

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.why = why
        self.status = status


class TimeIsUp(BaseException):
    """The deadline has passed. Not a TimeoutError, which the Redis client would treat as a lost connection."""


class Presence:
    """A context that raises Departure, or TimeIsUp at `until`. For the main thread only.

    Attributes:
        until: when to raise TimeIsUp, on the monotonic clock. None: never.
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
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._check)
        signal.setitimer(signal.ITIMER_REAL, _CHECK_S, _CHECK_S)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        raise Departure(_NAMES[signal.Signals(number)], 128 + number)

    def _check(self, *_: object) -> None:
        if self.until is not None and time.monotonic() >= self.until:
            raise TimeIsUp
        if self._out is not None and self._out.poll(0):
            raise Departure("a closed pipe", EXIT_READER_GONE)


def _pollable_stdout() -> select.poll | None:
    """None where stdout is not a file, as in a test."""
    try:
        fd = sys.stdout.fileno()
    except (AttributeError, OSError):
        return None
    out = select.poll()
    out.register(fd, 0)  # errors and a closed other end are reported without being requested
    return out


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignores all signals but Ctrl-C during the last steps: `timeout` and a closed terminal send several."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _NAMES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
