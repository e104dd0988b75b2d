"""Baseline: the engine with the fewest waiting and running prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence

from rsm.broker.protocol.snapshot import EngineView, SessionView
from rsm.router.policies.base import Policy, least_loaded
from rsm.router.views import CallView, Choice


class LeastLoaded(Policy):
    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        engine = least_loaded(engines)
        return Choice(engine.id, f"least loaded ({engine.load_tokens} tokens)")
