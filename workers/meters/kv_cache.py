"""What a worker learns of its engine's KV cache: how fast it turns over, and how much of what it should hold is there.

No clock: time goes in as numbers, in seconds.
"""

from __future__ import annotations

from collections import deque
from math import inf

# Of how late a call is still half remembered, in calls; and how many tokens that were found stand for no experience.
_HALF_LIFE = 50.0
_PRIOR_TOKENS = 2_000.0


class CacheMeter:
    """Watches what calls computed, and what they found.

    Args:
        room: tokens that fit into the cache; 0 = not known.
        grain_s: how exact its age is.
    """

    def __init__(self, room: int = 0, grain_s: float = 1.0) -> None:
        self._room = room
        self._grain_s = grain_s
        self._marks: deque[tuple[float, int]] = deque()  # when so many had been computed in all
        self._expected = self._found = 0.0
        self.computed = 0

    def add(self, tokens: int, now: float) -> None:
        """So many more tokens were computed, of prompts and of answers."""
        if not self._marks or now - self._marks[-1][0] >= self._grain_s:
            self._marks.append((now, self.computed))
        self.computed += tokens
        while len(self._marks) > 1 and self._marks[1][1] <= self.computed - self._room:
            self._marks.popleft()

    def age_s(self, now: float) -> float:
        """Since when as many tokens were computed as it has room for; inf: it has room left, or is of unknown size."""
        if not self._room or self.computed <= self._room:
            return inf
        return now - self._marks[0][0]

    def found(self, expected: int, cached: int) -> None:
        """A call was expected to find so many tokens of its prompt there."""
        if expected > 0:
            kept = 0.5 ** (1 / _HALF_LIFE)
            self._expected = kept * self._expected + expected
            self._found = kept * self._found + min(cached, expected)

    @property
    def reuse_found(self) -> float:
        """Share of what was expected that was there; 1 before anything was."""
        return (self._found + _PRIOR_TOKENS) / (self._expected + _PRIOR_TOKENS)
