"""Limits on hangs: of the engine, and of the worker process itself."""

from __future__ import annotations

import faulthandler
import sys
import time

from rsm.broker.settings import Settings

# Seconds between two checks; a quarter of the limit, if that is less.
_INTERVAL_S = 1.0


def check_interval_s(settings: Settings) -> float:
    """Seconds between two checks."""
    return min(_INTERVAL_S, settings.stall_s / 4) if settings.stall_s else _INTERVAL_S


class ProgressWatchdog:
    """Measures how long an engine has had calls without making progress.

    Time in which the whole process was stopped (SIGSTOP, a suspended machine) says nothing about the engine, so the
    time between two checks counts as two intervals at most.
    """

    def __init__(self, settings: Settings) -> None:
        self._limit_s = settings.stall_s
        self._interval_s = check_interval_s(settings)
        self._checked = time.monotonic()
        self._progress: int | None = None
        self._stalled_s = 0.0

    def check(self, progress: int | None) -> bool:
        """Whether the limit is exceeded. `progress` changes as the engine works; None if it is idle or unknown."""
        now = time.monotonic()
        passed, self._checked = min(now - self._checked, 2 * self._interval_s), now
        moved = progress is None or progress != self._progress
        self._stalled_s = 0.0 if moved else self._stalled_s + passed
        self._progress = progress
        return 0 < self._limit_s <= self._stalled_s


class HardExitTimer:
    """Ends the process if its event loop hangs.

    The timer is faulthandler's. It runs outside the interpreter, so it also ends a process whose C code never releases
    the GIL. Before it does, it writes the stack of each thread to stderr: names of functions, no values. The exit
    status is 1, after which a supervisor restarts the worker.

    Args:
        armed: if False, as for a worker inside another program, it does nothing.
    """

    def __init__(self, settings: Settings, *, armed: bool = False) -> None:
        self._stall_s = settings.stall_s
        self._start_s = settings.start_s
        self._armed = armed
        self._leaving = False

    def starting(self) -> None:
        """The engine starts loading, during which the event loop may block."""
        self._set(self._start_s)

    def alive(self) -> None:
        """The event loop is running."""
        self._set(self._stall_s)

    def leaving(self, within_s: float) -> None:
        """The process has to end within `within_s` seconds; nothing extends that."""
        self._set(within_s)
        self._leaving = True

    def _set(self, seconds: float) -> None:
        """Restarts the timer. 0 switches it off."""
        if not self._armed or self._leaving:
            return
        if seconds:
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.stderr)
        else:
            faulthandler.cancel_dump_traceback_later()
