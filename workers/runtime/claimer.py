"""The thread that fetches work: waits for room, claims what the engine can start now, else sleeps on the bell.

Late binding: a call that no engine can start yet stays in its queue in Redis, where it can be re-ordered, cancelled
and given to another engine. So never more than `room` calls are taken; but an engine that lets a better call take the
place of a running one has room for calls above its threshold (`Backend.preemption_threshold`), even if it is full.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import NamedTuple

from rsm.broker.connection import execute
from rsm.broker.connection.dedicated import DedicatedConnection
from rsm.broker.connection.retry import persist
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.messages import Claimed
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings

# How long one sleep on the bell lasts; the bell makes it shorter, so this bounds only how soon a stop is noticed.
_WAKE_S = 1
# Calls per claim. Small, so that the engine is at work on the first while the next are on their way.
CLAIM_MANY = 32


class Room:
    """How many more calls the engine can take. Counts down on a claim, up when a call leaves the engine.

    Negative: calls were claimed that will take the places of others.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = size
        self._changed = threading.Condition()
        self._closed = False
        self._asleep = False

    @property
    def free(self) -> int:
        with self._changed:
            return self._free

    def take(self, n: int) -> None:
        with self._changed:
            self._free -= n

    def give(self, n: int = 1) -> bool:
        """True: the claimer sleeps on the bell, and has to be woken, for now there is room."""
        with self._changed:
            self._free += n
            self._changed.notify()
            ring = self._asleep and self._free > 0
            self._asleep = self._asleep and not ring
            return ring

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def wait(self) -> int:
        """Waits until there is room; 0 = closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0 or self._closed)
            return 0 if self._closed else self._free

    def fall_asleep(self) -> bool:
        """The claimer goes to sleep on the bell although there is no room; False: better not, there is some."""
        with self._changed:
            self._asleep = self._free <= 0 and not self._closed
            return self._asleep

    def wake(self) -> None:
        with self._changed:
            self._asleep = False


class Want(NamedTuple):
    """What to claim: `most` calls whatever they are, or up to `ahead` above `threshold`, a class and level."""

    most: int
    ahead: int = 0
    threshold: tuple[int, int] = (0, 0)


class Claimer(threading.Thread):
    """Claims for one incarnation of an engine.

    Args:
        deliver: called from this thread with the calls claimed, or with None if the lease was lost.
        threshold: the engine's, None = it has none (`Backend.preemption_threshold`).
    """

    def __init__(
        self,
        engine: str,
        incarnation: str,
        settings: Settings,
        transitions: Transitions,
        room: Room,
        deliver: Callable[[list[Claimed] | None], None],
        threshold: Callable[[], tuple[int, int] | None] = lambda: None,
    ) -> None:
        super().__init__(name="rsm-claim", daemon=True)
        self._engine = engine
        self._incarnation = incarnation
        self._batch = min(settings.batch, CLAIM_MANY)
        self._transitions = transitions
        self._room = room
        self._deliver = deliver
        self._threshold_now = threshold
        self._wake_key = Keys(settings.namespace).bell(engine)
        self._line = DedicatedConnection(settings, block_s=_WAKE_S)
        self._closed = threading.Event()

    def close(self) -> None:
        """Claims no more; returns once that is certain."""
        self._closed.set()
        self._room.close()
        if self is not threading.current_thread():
            self.join()

    def run(self) -> None:
        # Whether calls may be waiting that the last claim left behind: any, where there was room; better ones.
        more = better = True
        for claim_no in itertools.count(1):
            want = self._want(better)
            if want is None:
                break
            claimed = self._claim(claim_no, want, sleep=want.most > 0 and not more)
            if claimed is None:
                self._deliver(None)
                break
            self._room.take(len(claimed))
            if claimed:
                self._deliver(claimed)
            if want.most:
                more, better = len(claimed) == want.most, True
            else:
                better = len(claimed) == want.ahead
        self._line.close()

    def _want(self, look: bool) -> Want | None:
        """What to claim next, None = nothing any more. Waits for room; a full engine with a threshold, for a wake-up.

        Args:
            look: better calls may be waiting.
        """
        while not self._closed.is_set():
            free = self._room.free
            if free > 0:
                return Want(min(free, self._batch))
            threshold, ahead = self._threshold_now(), min(self._room.size + free, self._batch)
            if threshold is None or ahead <= 0:
                self._room.wait()
            elif look:
                return Want(0, ahead, threshold)
            elif self._room.fall_asleep():
                self._sleep()
                look = True
        return None

    def _sleep(self) -> None:
        """Until somebody rings, or for a while: a running call may have become worse than one that waits."""
        persist(lambda: self._line.execute_command("BLPOP", self._wake_key, _WAKE_S), "claimer", self._closed.is_set)
        self._room.wake()

    def _claim(self, claim_no: int, want: Want, sleep: bool) -> list[Claimed] | None:
        """Claims, after a sleep on the bell if nothing is known to wait.

        A claim is repeated under its number until its reply has come, so a lost reply loses no call.
        """
        command = self._transitions.claim(self._engine, self._incarnation, claim_no, *want)
        replies: list[list[Claimed] | None] = []

        def attempt() -> None:
            if sleep:
                replies.append(execute.run_after(self._line, ("BLPOP", self._wake_key, _WAKE_S), command))
            else:
                replies.append(execute.run(self._line, command))

        persist(attempt, "claimer", self._closed.is_set)
        return replies[0] if replies else []
