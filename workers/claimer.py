"""The thread that fetches work: waits for room, claims what the engine can start now, else sleeps on the bell.

Late binding: a call that no engine can start yet stays in its queue in Redis, where it can be re-ordered, cancelled
and given to another engine. So never more than `room` calls are taken.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

from broker import scripts
from broker.connection import persist
from broker.keys import Keys
from broker.line import Line
from broker.messages import Claimed
from broker.settings import Settings
from broker.transitions import Transitions

# How long one sleep on the bell lasts; the bell makes it shorter, so this bounds only how soon a stop is noticed.
_BELL_S = 1
# Calls per claim. Small, so that the engine is at work on the first while the next are on their way.
CLAIM_MANY = 32


class Room:
    """How many more calls the engine can take. Counts down on a claim, up when a call leaves the engine."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._changed = threading.Condition()
        self._closed = False

    def take(self, n: int) -> None:
        with self._changed:
            self._free -= n

    def give(self, n: int = 1) -> None:
        with self._changed:
            self._free += n
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def wait(self) -> int:
        """Waits until there is room; 0 = closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0 or self._closed)
            return 0 if self._closed else self._free


class Claimer(threading.Thread):
    """Claims for one incarnation of an engine.

    Args:
        deliver: called from this thread with the calls claimed, or with None if the lease was lost.
    """

    def __init__(
        self,
        engine: str,
        incarnation: str,
        settings: Settings,
        transitions: Transitions,
        room: Room,
        deliver: Callable[[list[Claimed] | None], None],
    ) -> None:
        super().__init__(name="rsm-claim", daemon=True)
        self._engine = engine
        self._incarnation = incarnation
        self._batch = min(settings.batch, CLAIM_MANY)
        self._transitions = transitions
        self._room = room
        self._deliver = deliver
        self._bell = Keys(settings.namespace).bell(engine)
        self._line = Line(settings, block_s=_BELL_S)
        self._closed = threading.Event()

    def close(self) -> None:
        """Claims no more; returns once that is certain."""
        self._closed.set()
        self._room.close()
        if self is not threading.current_thread():
            self.join()

    def run(self) -> None:
        more = True  # whether calls may be waiting that the last claim left behind
        for claim_no in itertools.count(1):
            free = min(self._room.wait(), self._batch)
            if not free:
                break
            claimed = self._claim(claim_no, free, sleep=not more)
            if claimed is None:
                self._deliver(None)
                break
            self._room.take(len(claimed))
            if claimed:
                self._deliver(claimed)
            more = len(claimed) == free
        self._line.close()

    def _claim(self, claim_no: int, most: int, sleep: bool) -> list[Claimed] | None:
        """Claims, after a sleep on the bell if nothing is known to wait.

        A claim is repeated under its number until its reply has come, so a lost reply loses no call.
        """
        command = self._transitions.claim(self._engine, self._incarnation, claim_no, most)
        replies: list[list[Claimed] | None] = []

        def attempt() -> None:
            if sleep:
                replies.append(scripts.run_after(self._line, ("BLPOP", self._bell, _BELL_S), command))
            else:
                replies.append(scripts.run(self._line, command))

        persist(attempt, "claimer", self._closed.is_set)
        return replies[0] if replies else []
