"""The engine on which the call takes least: affinity is a discount, not a pin."""

from __future__ import annotations

from collections.abc import Sequence

from rsm.broker.protocol.snapshot import EngineView, SessionView
from rsm.broker.settings import Settings
from rsm.router.cost_model import CostModel, reusable
from rsm.router.policies.base import Policy
from rsm.router.views import CallView, Choice

# Costs that differ by less than so many seconds, or such a share, are equal: then the engine that has most of the
# prompt cached computes least, and of those the one that has served least is next.
_SAME_S, _SAME = 0.001, 0.02


class Cost(Policy):
    """Expected time on each engine: see `router/cost_model.py`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.model = CostModel()

    def needs_session(self, call: CallView) -> bool:
        return True

    def cost_model(self) -> CostModel:
        return self.model

    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        costs = self.model.costs(call, engines, session, self.now)
        least = min(costs.values())
        bound = least * (1 + _SAME) + _SAME_S
        equal = {e.id: reusable(call, e, session) for e in engines if costs[e.id] <= bound}
        engine = min((e for e in engines if e.id in equal), key=lambda e: (-equal[e.id], e.served, e.id))
        reuse = equal[engine.id]
        held = bool(session.resident) or bool(session.bound)
        return Choice(
            engine.id,
            f"least time: {costs[engine.id]:.3g} s, {reuse} of {call.prompt_tokens} tokens cached",
            bind=True,
            hit=reuse > 0 if held else None,
            reuse=reuse,
            costs=costs,
        )
