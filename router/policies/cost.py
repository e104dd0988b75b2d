"""The engine with the lowest expected time. Affinity lowers the cost of an engine, but does not decide alone."""

from __future__ import annotations

from collections.abc import Sequence

from rsm.broker.protocol.snapshot import EngineView, SessionView
from rsm.broker.settings import Settings
from rsm.router.cost_model import CostModel, reusable
from rsm.router.policies.base import Policy
from rsm.router.views import CallView, Choice

# Costs that differ by less than this many seconds, or this fraction, count as equal. Then the engine with most of the
# prompt cached is chosen, and among these the one that has served fewest calls.
_SAME_S, _SAME = 0.001, 0.02


class Cost(Policy):
    """The lowest expected time, from `router/cost_model.py`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.model = CostModel()

    def needs_session(self, call: CallView) -> bool:
        return True

    def cost_model(self) -> CostModel:
        return self.model

    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        costs = self.model.costs(call, engines, session, self.now)
        limit = min(costs.values()) * (1 + _SAME) + _SAME_S
        equal = {e.id: reusable(call, e, session) for e in engines if costs[e.id] <= limit}
        engine = min((e for e in engines if e.id in equal), key=lambda e: (-equal[e.id], e.served, e.id))
        reuse = equal[engine.id]
        has_cache = bool(session.resident) or bool(session.bound)
        return Choice(
            engine.id,
            f"lowest expected time: {costs[engine.id]:.3g} s, {reuse} of {call.prompt_tokens} tokens cached",
            bind=True,
            hit=reuse > 0 if has_cache else None,
            reuse=reuse,
            costs=costs,
        )
