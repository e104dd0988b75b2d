"""Algorithm 2 of the paper, exactly as written (arXiv 2502.13965, section 4.3), as a baseline.

It lacks the improvements of router/policies/autellix.py. Load is a number of calls. A program's first long call goes to
the engine with the fewest calls, even if its shorter calls are cached elsewhere.
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
            return Choice(least_used.id, "short prompt: least used")
        if session.bound in {e.id for e in engines}:
            return Choice(session.bound, "bound", True, True)
        return Choice(least_used.id, "first long prompt of its program: least used", True, False)


class LeastUsed(Policy):
    """The baseline of section 6.4: the engine with the fewest calls."""

    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        return Choice(least_used_of(engines).id, "least used")


def least_used_of(engines: Sequence[EngineView]) -> EngineView:
    """Returns the engine with the fewest waiting or running calls; the paper does not define ties."""
    # A tie goes to the engine that has served the fewest calls.
    return min(engines, key=lambda e: (e.running + e.queued, e.served, e.id))
