"""Waiting for conditions."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(condition: Callable[[], object], timeout_s: float = 20.0, what: str = "") -> None:
    """Waits until `condition()` is true. Fails the test after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"waited {timeout_s} s in vain{': ' + what if what else ''}"
        time.sleep(0.02)
