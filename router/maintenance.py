"""What any router does on a timer, so that nothing waits for new traffic and no single router is needed."""

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
    """Timed duties of one router. All of them may run in every router at once."""

    def __init__(self, server: redis.Redis, keys: Keys, settings: Settings, name: str) -> None:
        self._redis = server
        self._keys = keys
        self._settings = settings
        self._name = name
        self._transitions = Transitions(keys, settings)
        self._cursor = "0-0"
        self._connected_since = time.monotonic()
        self.engines: list[EngineView] = []  # as the last tick saw them

    def blip(self) -> None:
        """Redis did not answer. Leases that ran out meanwhile prove nothing: their owners could not renew them."""
        self._connected_since = time.monotonic()

    def tick(self) -> Any:
        """Does all duties once; returns entries taken over from dead routers, to be placed."""
        if time.monotonic() - self._connected_since > self._settings.lease_ms / 1000:
            self._reap()
        while execute.run(self._redis, self._transitions.expire(self._name)) == self._settings.batch:
            pass
        # Before entries are taken over: of a call that ended on the stream long ago, it takes the entry.
        while execute.run(self._redis, self._transitions.retain()).entries == RETAIN_ENTRIES:
            pass
        self._unpark()
        self._admit_throttled()
        return self._take_over()

    def leave(self) -> None:
        """Deletes this consumer if nothing is pending for it (deleting it would drop what is)."""
        try:
            self._drop_consumer(self._name)
        except redis.RedisError:
            log.debug("consumer %s stays behind", self._name)

    def _reap(self) -> None:
        while True:
            reaped = execute.run(self._redis, self._transitions.reap())
            for engine in reaped.engines:
                log.warning("engine %s is dead (lease ended); its calls go to others", engine)
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
        """Entries that a dead router read and did not place. Ours that are still pending come back the same way."""
        # Half a lease: placing takes milliseconds, and an entry that two routers place is placed once (assign.lua).
        idle_ms = self._settings.lease_ms // 2
        cursor, entries, _ = self._redis.xautoclaim(
            self._keys.calls, ROUTER_GROUP, self._name, idle_ms, self._cursor, self._settings.batch
        )
        # The cursor is kept: starting at 0-0 each time would let a long busy list hide what lies behind it.
        self._cursor = text(cursor)
        if entries:
            log.warning("took over %d entries of a router that is gone", len(entries))
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
