"""The paper's rule: short calls go to the least loaded engine, long ones to the engine with their program's cache."""

from __future__ import annotations

from collections.abc import Sequence

from rsm.broker.protocol.snapshot import EngineView, SessionView
from rsm.broker.settings import Settings
from rsm.router.affinity import best_engine
from rsm.router.policies.base import Policy, least_loaded
from rsm.router.views import CallView, Choice


class Autellix(Policy):
    """Autellix, Algorithm 2: prompts up to `cache_token_threshold` tokens → the least loaded engine; longer ones → the
    session's engine, which is bound at its first long call.

    Where the paper says nothing, load is counted in tokens, and a session whose engine is gone is bound again.
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
        cached = best_engine(session, [e.id for e in engines])
        if cached is not None:
            return Choice(cached, f"has the session's cache ({session.resident.get(cached, 0)} tokens)", True, True)
        engine = least_loaded(engines)
        return Choice(engine.id, "first long call of its session: least loaded, now bound to it", True, False)
