"""Algorithm 2 of the paper to the letter (arXiv 2502.13965, section 4.3), as a baseline.

What router/policies/autellix.py mends is left as it is there: load is a number of calls, and the first long call of a
program goes to the engine that has fewest, wherever its shorter calls have left their cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from rsm.broker.protocol.snapshot import EngineView, SessionView
from rsm.broker.settings import Settings
from rsm.router.policies import Policy
from rsm.router.views import CallView, Choice


class Algorithm2(Policy):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._threshold = settings.cache_token_threshold

    def needs_session(self, call: CallView) -> bool:
        return call.prompt_tokens > self._threshold

    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        least_used = least_used_of(engines)
        if not self.needs_session(call):
            return Choice(least_used.id, "a short prompt: least used")
        if session.bound in {e.id for e in engines}:
            return Choice(session.bound, "bound", True, True)
        return Choice(least_used.id, "its program's first long prompt: least used", True, False)


class LeastUsed(Policy):
    """The baseline of section 6.4: the engine with the fewest calls."""

    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        return Choice(least_used_of(engines).id, "least used")


def least_used_of(engines: Sequence[EngineView]) -> EngineView:
    """Fewest calls waiting or running; the paper says nothing of ties: they go to the one that has served least."""
    return min(engines, key=lambda e: (e.running + e.queued, e.served, e.id))
