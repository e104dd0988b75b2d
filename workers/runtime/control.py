"""The thread that reads commands (cancel, drain, stop) from a durable stream, so that none is lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from rsm.broker.connection.dedicated import DedicatedConnection
from rsm.broker.connection.retry import OUTAGES, Backoff
from rsm.broker.protocol.codec import number, text
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.messages import Fence
from rsm.broker.settings import Settings

log = logging.getLogger("rsm.worker")

_BLOCK_S = 1.0
_COMMANDS = ("drain", "stop")


class Control(threading.Thread):
    """Reads the commands for one engine.

    Args:
        start: the entry of the control stream after which to read, from the registration.
        cancel, command: called from this thread; `command` with "drain" or "stop".
    """

    def __init__(
        self,
        engine: str,
        start: str,
        settings: Settings,
        cancel: Callable[[Fence], None],
        command: Callable[[str], None],
    ) -> None:
        super().__init__(name="rsm-control", daemon=True)
        self._key = Keys(settings.namespace).control(engine)
        self._last = start
        self._cancel = cancel
        self._command = command
        self._connection = DedicatedConnection(settings, block_s=_BLOCK_S)
        self._closed = threading.Event()

    def close(self) -> None:
        self._closed.set()

    def run(self) -> None:
        backoff = Backoff("control")
        while not self._closed.is_set():
            try:
                entries = self._connection.read_stream(
                    "XREAD", "BLOCK", int(_BLOCK_S * 1000), "STREAMS", self._key, self._last
                )
            except OUTAGES as e:
                self._closed.wait(backoff.pause(e))
                continue
            backoff.recovered()
            for entry, fields in entries:
                self._last = text(entry)
                self._run_command(fields)
        self._connection.close()

    def _run_command(self, fields: dict[bytes, bytes]) -> None:
        """Runs one command. A malformed one must not end this thread."""
        op = text(fields.get(b"op"))
        if op == "cancel":
            self._cancel(Fence(text(fields.get(b"id")), text(fields.get(b"gen")), number(fields.get(b"attempt"))))
        elif op in _COMMANDS:
            self._command(op)
        else:
            log.warning("skipped an unknown command on the control stream")
