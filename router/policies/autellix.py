"""The paper's rule: short calls go where there is least to do, long ones where their program's cache is."""

from __future__ import annotations

from collections.abc import Sequence

from rsm.broker.protocol.snapshot import EngineView, SessionView
from rsm.broker.settings import Settings
from rsm.router.affinity import best_engine
from rsm.router.policies.base import Policy, least_loaded
from rsm.router.views import CallView, Choice


class Autellix(Policy):
    """Autellix, Algorithm 2: up to `cache_token_threshold` prompt tokens → least loaded; longer → the session's
    engine, bound at its first long call.

    Mended where the paper is silent: load is counted in tokens, and a session whose engine is gone binds anew.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._threshold = settings.cache_token_threshold

    def needs_session(self, call: CallView) -> bool:
        return call.prompt_tokens > self._threshold

    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        if not self.needs_session(call):
            engine = least_loaded(engines)
            return Choice(engine.id, f"short prompt ({call.prompt_tokens} ≤ {self._threshold} tokens): least loaded")
        home = best_engine(session, [e.id for e in engines])
        if home is not None:
            return Choice(home, f"the session's cache is here ({session.resident.get(home, 0)} tokens)", True, True)
        engine = least_loaded(engines)
        return Choice(engine.id, "first long call of its session: least loaded, bound from now on", True, False)
