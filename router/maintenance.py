"""What every router does on a timer, so that no call waits for new traffic and no router is special."""

from __future__ import annotations

import logging
import time
from typing import Any

import redis

from rsm.broker.connection import execute
from rsm.broker.protocol.codec import text
from rsm.broker.protocol.keys import ROUTER_GROUP, Keys
from rsm.broker.protocol.models import EngineState
from rsm.broker.protocol.snapshot import EngineView
from rsm.broker.protocol.transitions import RETAIN_ENTRIES, Transitions
from rsm.broker.settings import Settings

log = logging.getLogger("rsm.router")


class Maintenance:
    """The timed tasks of one router. All routers can run all of them at the same time."""

    def __init__(self, server: redis.Redis, keys: Keys, settings: Settings, name: str) -> None:
        self._redis = server
        self._keys = keys
        self._settings = settings
        self._name = name
        self._transitions = Transitions(keys, settings)
        self._cursor = "0-0"
        self._connected_since = time.monotonic()
        self.engines: list[EngineView] = []  # from the last tick

    def note_outage(self) -> None:
        """Redis did not answer, so no worker could renew its lease. Delays `_reap` by the length of a lease."""
        self._connected_since = time.monotonic()

    def tick(self) -> Any:
        """Runs all tasks once. Returns the entries taken over from dead routers, which must be placed."""
        if time.monotonic() - self._connected_since > self._settings.lease_ms / 1000:
            self._reap()
        while execute.run(self._redis, self._transitions.expire(self._name)) == self._settings.batch:
            pass
        # Before entries are taken over, because this removes the entries of calls that ended on the stream.
        while execute.run(self._redis, self._transitions.retain()).entries == RETAIN_ENTRIES:
            pass
        self._unpark()
        self._admit_throttled()
        return self._take_over()

    def leave(self) -> None:
        """Deletes this consumer unless entries are pending for it, which would be lost with it."""
        try:
            self._drop_consumer(self._name)
        except redis.RedisError:
            log.debug("could not delete consumer %s", self._name)

    def _reap(self) -> None:
        while True:
            reaped = execute.run(self._redis, self._transitions.reap())
            for engine in reaped.engines:
                log.warning("engine %s is dead (its lease expired); its calls move to other engines", engine)
            if reaped.moved < self._settings.batch:
                return

    def _unpark(self) -> None:
        self.engines = execute.run(self._redis, self._transitions.snapshot()).engines
        for model in {e.model for e in self.engines if e.state == EngineState.READY}:
            for wanted in (model, ""):
                while execute.run(self._redis, self._transitions.unpark(wanted)) == self._settings.batch:
                    pass

    def _admit_throttled(self) -> None:
        while execute.run(self._redis, self._transitions.admit_throttled()) >= self._settings.batch:
            pass

    def _take_over(self) -> list[Any]:
        """Takes over entries that a dead router read but did not place. Our own pending ones come back the same way."""
        # Half a lease: placing takes milliseconds, and assign.lua places an entry once even if two routers have it.
        idle_ms = self._settings.lease_ms // 2
        cursor, entries, _ = self._redis.xautoclaim(
            self._keys.calls, ROUTER_GROUP, self._name, idle_ms, self._cursor, self._settings.batch
        )
        # Continues from the cursor: if it started at 0-0 each time, a long busy list would hide the entries after it.
        self._cursor = text(cursor)
        if entries:
            log.warning("took over %d entries from a dead router", len(entries))
        if self._cursor == "0-0":
            self._drop_idle_consumers()
        return [e for e in entries if e and e[0] is not None]

    def _drop_idle_consumers(self) -> None:
        consumers: Any = self._redis.xinfo_consumers(self._keys.calls, ROUTER_GROUP)
        for c in consumers:
            if c["pending"] == 0 and c["idle"] > 20 * self._settings.lease_ms:
                self._drop_consumer(text(c["name"]))

    def _drop_consumer(self, name: str) -> None:
        execute.run(self._redis, self._transitions.leave(name))
