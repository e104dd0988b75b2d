"""Work stealing on a router's timer: reads the waiting calls, and takes those that decision.py selects."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import redis

from rsm.broker.connection import execute
from rsm.broker.protocol.models import EngineState
from rsm.broker.protocol.snapshot import EngineView, SessionView
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.protocol.waiting_calls import Waiting, WaitingCall
from rsm.router.placement import Chooser
from rsm.router.work_stealing.decision import Stealing, head, idle_and_loaded

log = logging.getLogger("rsm.router")


class WorkStealer:
    """Steals calls for one router. Several can run at once: if two take a call, only one succeeds (steal.lua)."""

    def __init__(self, server: redis.Redis, transitions: Transitions, chooser: Chooser) -> None:
        self._redis = server
        self._transitions = transitions
        self._chooser = chooser
        self._model = chooser.policy.cost_model()

    def round(self, engines: Sequence[EngineView]) -> int:
        """Takes calls once. Returns how many. Reads Redis only if one engine is idle while calls wait for another."""
        idle, loaded = idle_and_loaded(engines)
        if self._model is None or not idle:
            return 0
        waiting = self._waiting(idle, loaded)
        idle = [e for e in idle if e.id not in waiting.reserved]
        if not (idle and waiting.calls):
            return 0
        self._model.update_means([e for e in engines if e.state == EngineState.READY], time.monotonic())
        stealing = Stealing(self._model, self._chooser.admission)
        return self._take(stealing.moves(idle, loaded, waiting.calls, self._sessions(waiting.calls)))

    def _waiting(self, idle: Sequence[EngineView], loaded: Sequence[EngineView]) -> Waiting:
        command = self._transitions.waiting([e.id for e in idle], [e.id for e in loaded], head(len(loaded)))
        return execute.run(self._redis, command)

    def _sessions(self, calls: Sequence[WaitingCall]) -> dict[str, SessionView]:
        sessions = list({c.session for c in calls})
        return execute.run(self._redis, self._transitions.snapshot(sessions, fleet=False)).sessions

    def _take(self, calls: Sequence[WaitingCall]) -> int:
        if not calls:
            return 0
        taken = execute.run(self._redis, self._transitions.steal(calls)).count(True)
        if taken:
            log.info("stole %d waiting calls from loaded engines", taken)
        return taken
