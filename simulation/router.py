"""The router of a simulated fleet: the real placement (`router/placement.py`), with a snapshot as old as a real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

from rsm.broker.protocol.snapshot import EngineView, SessionView
from rsm.broker.protocol.waiting_calls import WaitingCall
from rsm.router.admission import Admission
from rsm.router.placement import Chooser, Decision
from rsm.router.policies import Policy
from rsm.router.views import CallView, Choice
from rsm.router.work_stealing.decision import Stealing, head, idle_and_loaded
from rsm.simulation.engine import Engine
from rsm.simulation.engine_queue import Waiting
from rsm.simulation.kv_admission import Residents
from rsm.simulation.process_table import Session

# The same as in router/router.py.
_SNAPSHOT_S = 0.02


class SimRouter:
    """Chooses engines. Like `router.Router`, between two snapshots it sees only its own assignments."""

    def __init__(
        self,
        policy: Policy,
        engines: Sequence[Engine],
        residents: Residents | None = None,
        factor: float = 1.0,
        stealing: bool = True,
    ) -> None:
        self._chooser = Chooser(policy, Admission(factor) if residents else None)
        model = policy.cost_model() if stealing else None
        self._stealing = Stealing(model, self._chooser.admission) if model else None
        self._residents = residents
        self._engines = {e.id: e for e in engines}
        self._changed = dict.fromkeys(engines)
        self._refreshed_at = -inf

    def changed(self, engine: Engine) -> None:
        """Notes that the engine's state in Redis differs from the router's snapshot."""
        self._changed[engine] = None

    def choose(self, now: float, call: CallView, entry: Session, service: float, level: int) -> tuple[Choice, Decision]:
        """The engine for a call of a program with this service and level, or that the call is throttled; and why."""
        wanted = self._chooser.needs_session(call)
        if now - self._refreshed_at > _SNAPSHOT_S:
            self._refresh(now)
        sessions = (
            {call.session: self._with_shares(call.session, entry.view(now, service, level), now)} if wanted else {}
        )
        decision = self._chooser.place([call], sessions, now)[0]
        choice = decision.choice
        if choice is None:
            raise ValueError("no engine takes calls")
        if not choice.throttle:
            self._changed[self._engines[choice.engine]] = None
        return choice, decision

    @property
    def steals(self) -> bool:
        return self._stealing is not None

    def to_move(self, now: float, session: Callable[[str], Session]) -> list[tuple[Engine, Waiting]]:
        """Waiting calls to move to idle engines: one round of router/work_stealing/loop.py.

        This does not refresh the router's own view of the fleet, by which it places calls.
        """
        engines = self._engines.values()
        if self._stealing is None or not (any(e.free for e in engines) and any(e.queued for e in engines)):
            return []
        idle, loaded = idle_and_loaded(self._view(e, now) for e in engines if e.free or e.queued)
        if not idle:
            return []
        full = [self._engines[e.id] for e in loaded]
        found = {w.id: (engine, w) for engine in full for w in engine.head(head(len(full)))}
        calls = [_waiting_call(engine, w) for engine, w in found.values()]
        views = {c.session: self._with_shares(c.session, session(c.session).view(now, 0, 0), now) for c in calls}
        return [found[c.id] for c in self._stealing.moves(idle, loaded, calls, views)]

    def _with_shares(self, session: str, view: SessionView, now: float) -> SessionView:
        return replace(view, shares=self._residents.shares(session, now)) if self._residents else view

    def _view(self, engine: Engine, now: float) -> EngineView:
        view = engine.view(now)
        return replace(view, spoken_for=self._residents.spoken_for(engine.id, now)) if self._residents else view

    def _refresh(self, now: float) -> None:
        if self._refreshed_at == -inf:
            self._chooser.see(self._view(engine, now) for engine in self._engines.values())
        else:
            # With admission, the contexts of thinking programs decay on every engine.
            for engine in self._engines.values() if self._residents else self._changed:
                self._chooser.update(self._view(engine, now))
        self._changed.clear()
        self._refreshed_at = now


def _waiting_call(engine: Engine, waiting: Waiting) -> WaitingCall:
    times, tokens = waiting.call.times, waiting.tokens
    reuse = tokens - waiting.work
    return WaitingCall(waiting.id, "", engine.id, times.session, "", 0, waiting.level, tokens, reuse, times.moves)
