"""Reconciles a worker's calls with Redis's account of them.

After a crash Redis may have lost up to a second of writes (appendfsync everysec); after a failover, those that the new
primary had not received. Then calls may run here that another worker owns by now, and Redis may count calls as running
here that ended long ago. No event reports that, so a timer compares.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import redis

from rsm.broker.connection import execute
from rsm.broker.protocol.messages import Fence, Release
from rsm.broker.protocol.transitions import Transitions
from rsm.workers.runtime.blocking import in_thread
from rsm.workers.runtime.calls import Calls
from rsm.workers.runtime.publisher import Publisher

log = logging.getLogger("rsm.worker")

_END_LOST = "Redis lost the end of the call, so the call runs again."


class Reconciler:
    """Reconciles for one engine. Runs in the worker's event loop."""

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

    async def reconcile(self, incarnation: str, current: Callable[[], str]) -> None:
        """Compares once. A call that Redis counts as running here, but that is not here, is released the second time
        it is found: the first time it may still be on its way, in the reply to a claim.

        Args:
            current: gives the worker's current incarnation; an answer for another one is not used.

        Raises:
            redis.ConnectionError or similar: Redis is unreachable.
        """
        owned = [*self._calls.owned(), *self._publisher.leaving()]
        command = self._transitions.reconcile(self._engine, incarnation, owned)
        found = await in_thread(lambda: execute.run(self._redis, command))
        if found is None or incarnation != current():
            self._suspects.clear()
            return
        lost = set(found.lost) & set(self._calls.owned())  # the others have ended here since the request
        self._calls.drop([*lost])
        unknown = set(found.unknown) - {*self._calls.owned(), *self._publisher.leaving()}
        again, self._suspects = unknown & self._suspects, unknown - self._suspects
        for fence in again:
            self._publisher.put(Release(fence, "", "", _END_LOST))
        if lost or again:
            message = (
                "engine %s and Redis disagreed: dropped %d calls of other engines, released %d calls without an end"
            )
            log.warning(message, self._engine, len(lost), len(again))
