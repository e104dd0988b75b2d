"""The router of a simulated fleet: the real policy, and a view of the fleet as old as a real router's."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from broker.messages import EngineView, SessionView
from router.policies import CallView, Choice, Policy
from router.policies.base import with_call
from simulation.engine import Engine
from simulation.table import Session

# As in router/router.py.
_LOOK_AGAIN_S = 0.02


class Front:
    """Chooses engines. Between two looks it knows of changes only what it assigned itself, like `router.Router`."""

    def __init__(self, policy: Policy, engines: Sequence[Engine]) -> None:
        self._policy = policy
        self._engines = {e.id: e for e in engines}
        self._views: dict[str, EngineView] = {}
        self._changed = dict.fromkeys(engines)
        self._looked = -inf

    def changed(self, engine: Engine) -> None:
        """What Redis knows of the engine is not what the router saw."""
        self._changed[engine] = None

    def choose(self, now: float, session: str, prompt_tokens: int, entry: Session) -> tuple[Engine, Choice]:
        call = CallView(session, "", prompt_tokens)
        wanted = self._policy.needs_session(call)
        if wanted or now - self._looked > _LOOK_AGAIN_S:
            self._look(now)
        choice = self._policy.choose(call, list(self._views.values()), entry.view() if wanted else SessionView())
        engine = self._engines[choice.engine]
        self._views[engine.id] = with_call(self._views[engine.id], prompt_tokens)
        self._changed[engine] = None
        return engine, choice

    def _look(self, now: float) -> None:
        for engine in self._changed:
            self._views[engine.id] = engine.view(now)
        self._changed.clear()
        self._looked = now
