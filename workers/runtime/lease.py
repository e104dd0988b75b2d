"""The thread that renews a worker's lease and reports its load, so that a busy event loop does not lose the lease."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from rsm.broker.connection import execute
from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import OUTAGES, Backoff
from rsm.broker.protocol.models import EngineState
from rsm.broker.protocol.scripts import Arg
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings

log = logging.getLogger("rsm.worker")


class Lease(threading.Thread):
    """Holds the lease of one incarnation.

    Args:
        report: gives the load fields for each heartbeat.
        lost: called once from this thread when the lease is gone.
    """

    def __init__(
        self,
        engine: str,
        incarnation: str,
        settings: Settings,
        transitions: Transitions,
        report: Callable[[], Mapping[str, Arg]],
        lost: Callable[[], None],
    ) -> None:
        super().__init__(name="rsm-lease", daemon=True)
        self._engine = engine
        self._incarnation = incarnation
        self._period_s = settings.heartbeat_ms / 1000
        self._transitions = transitions
        self._report = report
        self._lost = lost
        self._redis = connect(settings)
        self._wake = threading.Event()
        self._closed = False
        self._facts: Mapping[str, Arg] = {}
        self.state = EngineState.STARTING

    def announce(self, facts: Mapping[str, Arg]) -> None:
        """Adds facts about the engine to its registration, with the next heartbeat that arrives."""
        self._facts = facts

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        if self is not threading.current_thread():
            self.join()

    def beat(self, state: EngineState) -> bool:
        """Reports a new state at once; False if the lease was lost. Called by the worker, not by this thread."""
        self.state = state
        return self._send()

    def run(self) -> None:
        backoff = Backoff("lease")
        pause = self._period_s
        while not self._closed:
            try:
                valid = self._send()
            except OUTAGES as e:
                pause = backoff.pause(e)
            else:
                backoff.recovered()
                pause = self._period_s
                if not valid:
                    log.warning("engine %s: the lease was lost", self._engine)
                    self._lost()
                    break
            self._wake.wait(pause)

    def _send(self) -> bool:
        facts = self._facts
        fields = {**facts, **self._report()}
        valid = execute.run(
            self._redis, self._transitions.heartbeat(self._engine, self._incarnation, self.state.value, fields)
        )
        if valid and self._facts is facts:
            self._facts = {}
        return valid
