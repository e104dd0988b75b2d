"""Measures an engine's KV cache: how fast it turns over, and how much of the expected content it has.

No clock: time is an argument, in seconds.
"""

from __future__ import annotations

from collections import deque
from math import inf

# The half-life of an observation, in calls; and the tokens that count as found before any observation.
_HALF_LIFE = 50.0
_PRIOR_TOKENS = 2_000.0


class CacheMeter:
    """Measures from the tokens that calls computed and found.

    Args:
        capacity: tokens that fit into the cache; 0 = unknown.
        grain_s: the resolution of its age, in seconds.
    """

    def __init__(self, capacity: int = 0, grain_s: float = 1.0) -> None:
        self._capacity = capacity
        self._grain_s = grain_s
        self._marks: deque[tuple[float, int]] = deque()  # (time, total tokens computed by then)
        self._expected = self._found = 0.0
        self.computed = 0

    def add(self, tokens: int, now: float) -> None:
        """Adds computed tokens, of prompts and answers."""
        if not self._marks or now - self._marks[-1][0] >= self._grain_s:
            self._marks.append((now, self.computed))
        self.computed += tokens
        while len(self._marks) > 1 and self._marks[1][1] <= self.computed - self._capacity:
            self._marks.popleft()

    def age_s(self, now: float) -> float:
        """How many seconds ago its oldest content was computed; inf if it is not full or its size is unknown."""
        if not self._capacity or self.computed <= self._capacity:
            return inf
        return now - self._marks[0][0]

    def found(self, expected: int, cached: int) -> None:
        """A call found `cached` tokens of its prompt, of `expected` ones."""
        if expected > 0:
            kept = 0.5 ** (1 / _HALF_LIFE)
            self._expected = kept * self._expected + expected
            self._found = kept * self._found + min(cached, expected)

    @property
    def reuse_found(self) -> float:
        """The share of the expected tokens that was found; 1 without observations."""
        return (self._found + _PRIOR_TOKENS) / (self._expected + _PRIOR_TOKENS)
