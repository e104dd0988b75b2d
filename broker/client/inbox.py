"""The thread that reads a client's inbox: one blocking read for the events of all its calls."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import redis

from rsm.broker.connection.dedicated import DedicatedConnection
from rsm.broker.connection.retry import OUTAGES, Backoff
from rsm.broker.protocol import codec
from rsm.broker.settings import Settings

_BLOCK_S = 2.0
# Entries per read.
READ_MANY = 1000
# After this many entries the inbox is trimmed up to the last one read, as it has no other reader.
TRIM_MANY = 128
# How often the records of open calls are checked for missed events.
RECONCILE_S = 5.0

Entries = Sequence[tuple[bytes, Mapping[bytes, bytes]]]


class Inbox(threading.Thread):
    """Reads one inbox until `closed` is set.

    Args:
        key: the inbox's key in Redis.
        deliver: called from this thread with new entries, in order.
        reconcile: called from this thread to look for missed events, on a timer and after each outage of Redis. It may
            raise the errors of an unreachable Redis.
    """

    def __init__(
        self,
        key: str,
        settings: Settings,
        closed: threading.Event,
        deliver: Callable[[Entries], None],
        reconcile: Callable[[], None],
    ) -> None:
        super().__init__(name="rsm-inbox", daemon=True)
        self._key = key
        self._settings = settings
        self._closed = closed
        self._deliver = deliver
        self._reconcile = reconcile

    def run(self) -> None:
        connection, last, backoff = DedicatedConnection(self._settings, _BLOCK_S), "0-0", Backoff("inbox")
        block = ("BLOCK", int(_BLOCK_S * 1000), "COUNT", READ_MANY)
        reconciled, read = time.monotonic(), 0
        while not self._closed.is_set():
            try:
                if read >= TRIM_MANY:
                    connection.execute_command("XTRIM", self._key, "MINID", last)
                    read = 0
                entries = connection.read_stream("XREAD", *block, "STREAMS", self._key, last)
                if backoff.recovered() or time.monotonic() - reconciled > RECONCILE_S:
                    reconciled = time.monotonic()
                    self._reconcile()
            except OUTAGES as e:
                self._closed.wait(backoff.pause(e))
                continue
            if entries:
                last, read = codec.text(entries[-1][0]), read + len(entries)
                self._deliver(entries)
        connection.close()

    def wake(self, server: redis.Redis) -> None:
        """Ends the thread once `closed` is set: an empty entry ends its blocking read."""
        if self is threading.current_thread():
            return
        with contextlib.suppress(redis.RedisError):
            server.xadd(self._key, {"closed": "1"})
            server.pexpire(self._key, self._settings.result_ttl_s * 1000)
        self.join(_BLOCK_S + 1)
