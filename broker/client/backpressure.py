"""What a client does with calls that are refused as overloaded (overload.lua): it gives up at once, or it waits."""

from __future__ import annotations

import random
import time
from typing import Literal

from rsm.broker.errors import Overloaded

OnOverload = Literal["raise", "wait"]

# Producers that were refused at the same time must not all retry at the same time.
_JITTER = (0.8, 1.2)


class Patience:
    """How long one submit waits while the broker is overloaded.

    Args:
        choice: "raise" = not at all; "wait" = until `timeout_s`.
        timeout_s: seconds after which a waiting submit gives up. Default: never.
    """

    def __init__(self, choice: OnOverload, timeout_s: float | None) -> None:
        self._waits = choice == "wait"
        self._until = None if timeout_s is None else time.monotonic() + timeout_s

    def pause(self, refusal: Overloaded) -> float:
        """Seconds until the next try: the server's advice, with jitter.

        Raises:
            Overloaded: the refusal, if no time to wait is left, or the call's deadline has passed.
        """
        left = None if self._until is None else self._until - time.monotonic()
        if not self._waits or not refusal.retry_after or (left is not None and left <= 0):
            raise refusal
        pause = refusal.retry_after * random.uniform(*_JITTER)  # noqa: S311
        return pause if left is None else min(pause, left)
