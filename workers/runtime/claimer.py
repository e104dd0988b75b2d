"""The thread that claims calls: it waits for free slots, then claims what the engine can start, or sleeps until woken.

Late binding: a call that no engine can start yet stays in its queue in Redis, where it can be reordered, cancelled or
moved to another engine. So no more calls are claimed than there are free slots. The exception is an engine that
preempts: even when full, it claims calls above its threshold (`Backend.preemption_threshold`).
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

# The longest sleep. A wake-up ends it sooner, so it only limits how soon a stop is noticed.
_SLEEP_S = 1
# Calls per claim. Small, so that the engine runs the first ones while the next are being fetched.
CLAIM_MANY = 32


class Slots:
    """The free slots of the engine: fewer after a claim, more when a call leaves the engine.

    Negative: calls were claimed that will preempt others.
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

    def release(self, n: int = 1) -> bool:
        """Frees slots. Returns True if the claimer sleeps and has to be woken, because a slot is free now."""
        with self._changed:
            self._free += n
            self._changed.notify()
            wake = self._asleep and self._free > 0
            self._asleep = self._asleep and not wake
            return wake

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def wait(self) -> int:
        """Waits until a slot is free; returns the number of free slots, 0 once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0 or self._closed)
            return 0 if self._closed else self._free

    def fall_asleep(self) -> bool:
        """Notes that the claimer sleeps while the engine is full. False if a slot is free: it must not sleep."""
        with self._changed:
            self._asleep = self._free <= 0 and not self._closed
            return self._asleep

    def wake(self) -> None:
        with self._changed:
            self._asleep = False


class Want(NamedTuple):
    """What to claim: up to `most` calls of any kind, or up to `ahead` calls above `threshold`, a class and level."""

    most: int
    ahead: int = 0
    threshold: tuple[int, int] = (0, 0)


class Claimer(threading.Thread):
    """Claims for one incarnation of an engine.

    Args:
        deliver: called from this thread with the calls claimed, or with None if the lease was lost.
        threshold: gives the engine's `Backend.preemption_threshold`; None if it does not preempt.
    """

    def __init__(
        self,
        engine: str,
        incarnation: str,
        settings: Settings,
        transitions: Transitions,
        slots: Slots,
        deliver: Callable[[list[Claimed] | None], None],
        threshold: Callable[[], tuple[int, int] | None] = lambda: None,
    ) -> None:
        super().__init__(name="rsm-claim", daemon=True)
        self._engine = engine
        self._incarnation = incarnation
        self._batch = min(settings.batch, CLAIM_MANY)
        self._transitions = transitions
        self._slots = slots
        self._deliver = deliver
        self._threshold_now = threshold
        self._wake_key = Keys(settings.namespace).bell(engine)
        self._connection = DedicatedConnection(settings, block_s=_SLEEP_S)
        self._closed = threading.Event()

    def close(self) -> None:
        """Stops claiming; returns when the thread has ended."""
        self._closed.set()
        self._slots.close()
        if self is not threading.current_thread():
            self.join()

    def run(self) -> None:
        # Whether the last claim may have left calls waiting: of any kind (more), or above the threshold (better).
        more = better = True
        for claim_no in itertools.count(1):
            want = self._want(better)
            if want is None:
                break
            claimed = self._claim(claim_no, want, sleep=want.most > 0 and not more)
            if claimed is None:
                self._deliver(None)
                break
            self._slots.take(len(claimed))
            if claimed:
                self._deliver(claimed)
            if want.most:
                more, better = len(claimed) == want.most, True
            else:
                better = len(claimed) == want.ahead
        self._connection.close()

    def _want(self, better: bool) -> Want | None:
        """What to claim next; None once closed. Waits for a free slot, or, if the engine preempts, for a wake-up.

        Args:
            better: calls above the threshold may be waiting.
        """
        while not self._closed.is_set():
            free = self._slots.free
            if free > 0:
                return Want(min(free, self._batch))
            threshold, ahead = self._threshold_now(), min(self._slots.size + free, self._batch)
            if threshold is None or ahead <= 0:
                self._slots.wait()
            elif better:
                return Want(0, ahead, threshold)
            elif self._slots.fall_asleep():
                self._sleep()
                better = True
        return None

    def _sleep(self) -> None:
        """Sleeps until woken, or for a while: the threshold may drop below a waiting call in the meantime."""
        sleep = ("BLPOP", self._wake_key, _SLEEP_S)
        persist(lambda: self._connection.execute_command(*sleep), "claimer", self._closed.is_set)
        self._slots.wake()

    def _claim(self, claim_no: int, want: Want, sleep: bool) -> list[Claimed] | None:
        """Claims, with `sleep` after a wake-up.

        A claim is repeated under its number until its reply arrives, so a lost reply loses no call.
        """
        command = self._transitions.claim(self._engine, self._incarnation, claim_no, *want)
        replies: list[list[Claimed] | None] = []

        def attempt() -> None:
            if sleep:
                replies.append(execute.run_after(self._connection, ("BLPOP", self._wake_key, _SLEEP_S), command))
            else:
                replies.append(execute.run(self._connection, command))

        persist(attempt, "claimer", self._closed.is_set)
        return replies[0] if replies else []
