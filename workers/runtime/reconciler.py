"""Keeps a worker's calls and Redis's account of them the same.

A Redis that comes back may have lost its last writes: up to a second of them after a crash (appendfsync everysec), or
what a replica had not received before it was made the primary. Then calls run here that are somebody else's by now,
and calls are said to run here that ended long ago. No event tells of that, so a timer looks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import redis

from rsm.broker.connection import execute
from rsm.broker.protocol.messages import Fence, Release
from rsm.broker.protocol.transitions import Transitions
from rsm.workers.runtime.blocking import aside
from rsm.workers.runtime.calls import Calls
from rsm.workers.runtime.publisher import Publisher

log = logging.getLogger("rsm.worker")

_UNKNOWN = "Redis had forgotten how the call ended."


class Reconciler:
    """Compares, for one engine. In the worker's event loop."""

    def __init__(
        self,
        engine: str,
        server: redis.Redis,
        transitions: Transitions,
        calls: Calls,
        publisher: Publisher,
    ) -> None:
        self._engine = engine
        self._redis = server
        self._transitions = transitions
        self._calls = calls
        self._publisher = publisher
        self._suspects: set[Fence] = set()

    async def look(self, incarnation: str, current: Callable[[], str]) -> None:
        """One comparison. What Redis says runs here, and is not here, is given back at the second sight of it: at the
        first it may be on its way to us, in the reply to a claim.

        Args:
            current: the worker's incarnation by now; an answer for another one is not used.

        Raises:
            redis.ConnectionError or its kin: Redis is away.
        """
        held = [*self._calls.held(), *self._publisher.leaving()]
        command = self._transitions.reconcile(self._engine, incarnation, held)
        found = await aside(lambda: execute.run(self._redis, command))
        if found is None or incarnation != current():
            self._suspects.clear()
            return
        lost = set(found.lost) & set(self._calls.held())  # the others have ended here since the question was put
        self._calls.drop([*lost])
        unknown = set(found.unknown) - {*self._calls.held(), *self._publisher.leaving()}
        again, self._suspects = unknown & self._suspects, unknown - self._suspects
        for fence in again:
            self._publisher.put(Release(fence, "", "", _UNKNOWN))
        if lost or again:
            message = "engine %s and Redis differ: %d calls were not this engine's any more, %d ends were not known"
            log.warning(message, self._engine, len(lost), len(again))
