"""The router of a simulated fleet: the real choice (`router/choosing.py`), and a view as old as a real router's."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from router.choosing import Chooser
from router.policies import CallView, Choice, Policy
from simulation.engine import Engine
from simulation.table import Session

# As in router/router.py.
_LOOK_AGAIN_S = 0.02


class Front:
    """Chooses engines. Between two looks it knows of changes only what it assigned itself, like `router.Router`."""

    def __init__(self, policy: Policy, engines: Sequence[Engine]) -> None:
        self._chooser = Chooser(policy)
        self._engines = {e.id: e for e in engines}
        self._changed = dict.fromkeys(engines)
        self._looked = -inf

    def changed(self, engine: Engine) -> None:
        """What Redis knows of the engine is not what the router saw."""
        self._changed[engine] = None

    def choose(self, now: float, call: CallView, entry: Session) -> tuple[Engine, Choice] | None:
        """The engine for a call, and why; None: it is to wait in the router."""
        wanted = self._chooser.needs_session(call)
        if wanted or now - self._looked > _LOOK_AGAIN_S:
            self._look(now)
        sessions = {call.session: entry.view()} if wanted else {}
        choice = self._chooser.place([call], sessions, now)[0].choice
        if choice is None or choice.hold:
            return None
        engine = self._engines[choice.engine]
        self._changed[engine] = None
        return engine, choice

    def _look(self, now: float) -> None:
        if self._looked == -inf:
            self._chooser.see(engine.view(now) for engine in self._engines.values())
        else:
            for engine in self._changed:
                self._chooser.update(engine.view(now))
        self._changed.clear()
        self._looked = now
