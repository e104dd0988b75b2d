"""An order to a node is valid as long as its client waits: a key that the client renews and the node's job checks.

So an abandoned order is never begun, and a start in progress is undone, whether the client withdrew the order or was
killed.
"""

from __future__ import annotations

from typing import Any

import redis

from rsm.broker.connection.retry import persist
from rsm.broker.errors import EngineFailed
from rsm.broker.protocol.keys import Keys
from rsm.broker.settings import Settings

# The pause between two checks of a job.
POLL_S = 0.1
# How long a client may not renew: longer than the timeout of a Redis command, after which it tries again.
_LEASE_S = 15
# A job gives up after this many checks in a row (3 s) without a client. An outage of Redis longer than a lease lets the
# lease expire, and a client that still waits renews it within a second of Redis's return.
_MAX_MISSED = 30


class OrderLease:
    """The lease of one order."""

    def __init__(self, server: redis.Redis, settings: Settings, job_id: str) -> None:
        self._server: Any = server
        self._key = Keys(settings.namespace).order(job_id)
        self._missed = 0

    def renew(self) -> None:
        """Renews the lease. The client calls it every few seconds."""
        self._server.set(self._key, "", ex=_LEASE_S)

    def end(self) -> None:
        """Ends the lease. The client calls it when it stops waiting."""
        self._server.delete(self._key)

    def check(self) -> bool:
        """Whether the client waits. The job calls it; it waits for an unreachable Redis.

        Raises:
            EngineFailed: the client is gone.
        """
        found = bool(persist(lambda: self._server.exists(self._key), "order", lambda: False))
        self._missed = 0 if found else self._missed + 1
        if self._missed >= _MAX_MISSED:
            raise EngineFailed("The client withdrew this order or is gone. Send the order again if it is still wanted.")
        return found
