"""Waits for a condition, or for progress towards it, instead of for a time."""

from __future__ import annotations

import time
from collections.abc import Callable

_PAUSE_S = 0.02
# A look that takes longer than this says that the machine is busy, not that the condition is late.
_LOOK_S = 0.2


def eventually(
    condition: Callable[[], object],
    timeout_s: float = 20.0,
    what: str = "",
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Waits until `condition()` is true.

    Fails the test after `timeout_s` in which `progress()` has not changed. Time in which this process itself was not
    run does not count: then the others were not run either.
    """
    passed, looked, reached = 0.0, time.monotonic(), progress()
    while not condition():
        now, before = time.monotonic(), reached
        passed, looked, reached = passed + min(now - looked, _LOOK_S), now, progress()
        if reached != before:
            passed = 0.0
        assert passed < timeout_s, f"waited {timeout_s} s in vain{': ' + what if what else ''}"
        time.sleep(_PAUSE_S)
