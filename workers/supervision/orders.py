"""An order to a node lasts as long as its giver waits: a key that the giver renews, and that the node's job looks at.

So an order that was given up is never begun, and a start that is under way is undone. It makes no difference whether
the giver withdrew the order or was killed.
"""

from __future__ import annotations

from typing import Any

import redis

from rsm.broker.connection.retry import persist
from rsm.broker.errors import EngineFailed
from rsm.broker.protocol.keys import Keys
from rsm.broker.settings import Settings

# The pause between two looks of a job.
POLL_S = 0.1
# How long a giver may say nothing: longer than the time limit of a command, after which it tries again.
_LEASE_S = 15
# A job gives up after so many looks in a row, 3 s, that found no giver. A Redis that was away for longer than a lease
# has forgotten it, and each giver that is still there renews it within a second of Redis's return.
_LOOKS = 30


class OrderLease:
    """The lease of one order."""

    def __init__(self, server: redis.Redis, settings: Settings, job_id: str) -> None:
        self._server: Any = server
        self._key = Keys(settings.namespace).order(job_id)
        self._missed = 0

    def renew(self) -> None:
        """For the giver, at least every few seconds."""
        self._server.set(self._key, "", ex=_LEASE_S)

    def end(self) -> None:
        """For the giver: it waits no longer."""
        self._server.delete(self._key)

    def look(self) -> bool:
        """For the job: whether the giver waits. A Redis that is away is waited for.

        Raises:
            EngineFailed: the giver is gone.
        """
        found = bool(persist(lambda: self._server.exists(self._key), "order", lambda: False))
        self._missed = 0 if found else self._missed + 1
        if self._missed >= _LOOKS:
            raise EngineFailed("Nobody waits for this order any longer: it was withdrawn, or its giver is gone.")
        return found
