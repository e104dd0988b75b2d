"""Tokens per second as a moving average."""

from __future__ import annotations

from math import exp


class RateMeter:
    """An exponential moving average of a rate. It reads no clock: time is an argument, in seconds."""

    def __init__(self, tau_s: float = 10.0) -> None:
        self._tau = tau_s
        self._value = 0.0
        self._began: float | None = None
        self._last = 0.0

    def add(self, count: int, now: float) -> None:
        """Counts `count` events that happened since the last call."""
        if self._began is None:
            # The duration of the first events is unknown, so they only start the clock.
            self._began = self._last = now
            return
        self._value = self._decayed(now) + count / self._tau
        self._last = max(now, self._last)

    def per_s(self, now: float) -> float:
        """Recent events per second."""
        if self._began is None or now <= self._began:
            return 0.0
        # A new meter would read too low, so divide by the weight of the time seen so far.
        return self._decayed(now) / (1 - exp(-(now - self._began) / self._tau))

    def _decayed(self, now: float) -> float:
        return self._value * exp(-max(0.0, now - self._last) / self._tau)
