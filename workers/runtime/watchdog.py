"""Bounds on standing still: of the engine, and of the worker's process itself."""

from __future__ import annotations

import faulthandler
import sys
import time

from rsm.broker.settings import Settings

# How often the worker looks, in seconds; a quarter of the bound, if that is less.
_ROUND_S = 1.0


def round_s(settings: Settings) -> float:
    """The time between two looks, in seconds."""
    return min(_ROUND_S, settings.stall_s / 4) if settings.stall_s else _ROUND_S


class ProgressWatchdog:
    """Measures how long an engine has had calls and made no progress.

    Time in which this process stood still as a whole (SIGSTOP, a suspended machine) says nothing about the engine, so
    what passes between two looks counts for two rounds at most.
    """

    def __init__(self, settings: Settings) -> None:
        self._bound_s = settings.stall_s
        self._round_s = round_s(settings)
        self._looked = time.monotonic()
        self._progress: int | None = None
        self._still_s = 0.0

    def look(self, progress: int | None) -> bool:
        """Whether the bound is passed. `progress` changes as the engine works; None: nothing to do, or not known."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * self._round_s), now
        moved = progress is None or progress != self._progress
        self._still_s = 0.0 if moved else self._still_s + passed
        self._progress = progress
        return 0 < self._bound_s <= self._still_s


class HardExitTimer:
    """Ends the process if its event loop does not come round in time.

    The timer is faulthandler's. It runs beside the interpreter, so it also ends a process whose C code never gives the
    interpreter back. Before it does, it writes to stderr where each thread stood: names of functions, no values. The
    exit status is 1, which to a supervisor means: start it again.

    Args:
        armed: if not, as for a worker inside another program, it does nothing.
    """

    def __init__(self, settings: Settings, *, armed: bool = False) -> None:
        self._stall_s = settings.stall_s
        self._start_s = settings.start_s
        self._armed = armed
        self._leaving = False

    def starting(self) -> None:
        """From now on the engine is loading, during which the event loop may stand still."""
        self._set(self._start_s)

    def alive(self) -> None:
        """The event loop has come round."""
        self._set(self._stall_s)

    def leaving(self, within_s: float) -> None:
        """The process is to be gone within so many seconds; nothing prolongs that."""
        self._set(within_s)
        self._leaving = True

    def _set(self, seconds: float) -> None:
        """0 = no bound."""
        if not self._armed or self._leaving:
            return
        if seconds:
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.stderr)
        else:
            faulthandler.cancel_dump_traceback_later()
