"""Baseline: each engine in turn."""

from __future__ import annotations

from collections.abc import Sequence

from rsm.broker.protocol.snapshot import EngineView, SessionView
from rsm.broker.settings import Settings
from rsm.router.policies.base import Policy
from rsm.router.views import CallView, Choice


class RoundRobin(Policy):
    """Each router rotates on its own. With several routers, the engines still get equal shares on average."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._turn = 0

    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        self._turn += 1
        return Choice(sorted(e.id for e in engines)[self._turn % len(engines)], "next in turn")
