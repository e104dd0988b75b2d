"""The queue of an engine, or of the router, in virtual time, by the rules of attempts.lua and claim.lua."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Any

from rsm.broker.protocol.rules import rank_of
from rsm.broker.protocol.snapshot import Ahead
from rsm.simulation.process_table import Account, ProcessTable
from rsm.workers.scheduling.plas import Rank


@dataclass(slots=True, eq=False)
class Waiting:
    """A call in a queue. Times in ms.

    Attributes:
        had: what its program had been charged when it was assigned.
        score: its place in the queue; equal scores are ordered by id, as in Redis.
        starves_ms: when it will starve; inf = never.
        promoted_ms: when it was promoted because it starved; -1 = it was not.
        work: prompt tokens that the engine is expected to compute.
        here: whether it is in the queue.
    """

    id: str
    call: Any
    tokens: int
    submitted_ms: int
    had: Account
    level: int
    starves_ms: float
    promoted_ms: int
    score: float = 0.0
    work: int = 0
    here: bool = False


class Queue:
    """Calls that wait for one engine, or for headroom on any."""

    def __init__(self, table: ProcessTable) -> None:
        self._table = table
        self._order: list[tuple[float, str, int, Waiting]] = []  # both are heaps with stale entries
        self._starving: list[tuple[float, str, int, Waiting]] = []
        self._numbers = count()  # tells entries of the same call apart
        self._size = 0
        self.ahead: dict[int, Ahead] = {}  # by rank, as lib.lua counts them

    def __len__(self) -> int:
        return self._size

    def add(self, waiting: Waiting) -> None:
        waiting.here = True
        self._size += 1
        self._count(waiting, 1)
        self._put(waiting)
        if waiting.starves_ms < 1 << 62:
            heappush(self._starving, (waiting.starves_ms, waiting.id, next(self._numbers), waiting))

    def remove(self, waiting: Waiting) -> None:
        """Removes a call from any position."""
        waiting.here = False
        self._size -= 1
        self._count(waiting, -1)

    def _count(self, waiting: Waiting, sign: int) -> None:
        rank = rank_of(0, waiting.level)
        calls, tokens = self.ahead.pop(rank, (0, 0))
        if calls + sign:
            self.ahead[rank] = Ahead(calls + sign, tokens + sign * waiting.work)

    def claim(self, most: int, now_ms: int, ahead: int = 0, threshold: Rank | None = None) -> list[Waiting]:
        """Promotes starving calls, then takes the first calls: `most`, or up to `ahead` above the threshold."""
        self._promote(now_ms)
        taken: list[Waiting] = []
        while self._size and (len(taken) < most or (len(taken) < ahead and self._best() < self._score(threshold))):
            self._best()
            waiting = heappop(self._order)[3]
            self.remove(waiting)
            taken.append(waiting)
        return taken

    def has_better(self, threshold: Rank | None, now_ms: int) -> bool:
        """Whether a call here is above the threshold, a class and level."""
        self._promote(now_ms)
        return self._size > 0 and self._best() < self._score(threshold)

    def _best(self) -> float:
        """The score of the first call. Afterwards its entry is the top of the heap."""
        while not (self._order[0][3].here and self._order[0][3].score == self._order[0][0]):
            heappop(self._order)
        return self._order[0][0]

    def _score(self, threshold: Rank | None) -> float:
        return -inf if threshold is None else self._table.score(*threshold, 0)

    def first(self, most: int, now_ms: int) -> list[Waiting]:
        """The calls that `claim` would take. It also promotes starving calls."""
        found = self.claim(most, now_ms)
        for waiting in found:
            waiting.here = True
            self._size += 1
            self._count(waiting, 1)
            heappush(self._order, (waiting.score, waiting.id, next(self._numbers), waiting))
        return found

    def head(self, most: int) -> list[Waiting]:
        """The first calls, without any change."""
        entries = []
        for _ in range(min(most, self._size)):
            self._best()
            entries.append(heappop(self._order))
        for entry in entries:
            heappush(self._order, entry)
        return [entry[3] for entry in entries]

    def _promote(self, now_ms: int) -> None:
        for _ in range(self._table.promote_many):
            if not self._starving or self._starving[0][0] > now_ms:
                return
            waiting = heappop(self._starving)[3]
            if waiting.here:
                self._count(waiting, -1)
                waiting.level, waiting.promoted_ms = 0, now_ms
                waiting.score = self._table.score(0, 0, waiting.submitted_ms)
                self._count(waiting, 1)
                self._put(waiting)

    def _put(self, waiting: Waiting) -> None:
        heappush(self._order, (waiting.score, waiting.id, next(self._numbers), waiting))
