"""Admission: assigns an engine's KV cache to programs in the order in which they wait. No clock and no I/O here.

If the contexts of the current programs exceed an engine's cache, they evict each other: each new call computes its
whole context again, and so evicts another context. To prevent this, calls of programs whose contexts are cached go
first. Others are throttled: they wait in the router until an engine has KV headroom. residents.lua defines the rules,
and which contexts count as cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rsm.broker.protocol.rules import LAST_TIER, tier_of
from rsm.broker.protocol.snapshot import NOT_THERE, EngineView, SessionView, Share
from rsm.router.views import CallView

THROTTLED = "no engine has KV headroom for its context of {tokens} tokens"


class Admission:
    """Decides which engines a call may go to. `factor`: the contexts of an engine as a multiple of its cache size."""

    def __init__(self, factor: float = 1.0) -> None:
        self._factor = factor

    def open_to(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> list[EngineView]:
        """The engines where the session's context is cached, or else those with headroom for it.

        If the list is empty, the call must be throttled. An engine that does not report its cache size has headroom for
        every call.
        """
        fitting = [e for e in engines if self._fits(call, e, session)]
        return [e for e in fitting if session.shares.get(e.id, NOT_THERE).cached] or fitting

    def _fits(self, call: CallView, engine: EngineView, session: SessionView) -> bool:
        """The same rule as `fits` in residents.lua, which decides if two routers place calls at the same time."""
        capacity, context = engine.kv_tokens * self._factor, context_of(call, engine, session)
        if capacity <= 0 or (context > capacity and not engine.queued + engine.running):
            return True
        share, tiers = session.shares.get(engine.id, NOT_THERE), tier_of(call.priority, session.level) + 1
        if share.cached:
            tiers -= 1  # it competes with better tiers only
        mine = share.tokens if share.tier < tiers else 0.0
        return sum(engine.spoken_for[:tiers]) - mine + context <= capacity


def context_of(call: CallView, engine: EngineView, session: SessionView) -> int:
    """Tokens of KV that a call will hold at its end: its prompt, and an answer of average length."""
    return call.prompt_tokens + round(session.completion_tokens or engine.completion_tokens)


def new_of(call: CallView, engine: EngineView, session: SessionView) -> int:
    """The part of a call's context that no other call of its session holds on that engine."""
    return max(0, context_of(call, engine, session) - session.resident.get(engine.id, 0))


def with_context(engine: EngineView, call: CallView, session: SessionView) -> tuple[EngineView, SessionView]:
    """The engine and the session after the call has been assigned."""
    share, tier = session.shares.get(engine.id, NOT_THERE), tier_of(call.priority, session.level)
    spoken = [*engine.spoken_for, *[0.0] * (LAST_TIER + 1 - len(engine.spoken_for))]
    if share.active:
        tier, tokens = share.tier, share.tokens + new_of(call, engine, session)
    else:
        tokens = float(context_of(call, engine, session))
    spoken[share.tier] -= share.tokens
    spoken[tier] += tokens
    shares = {**session.shares, engine.id: Share(tokens, cached=True, active=True, tier=tier)}
    return replace(engine, spoken_for=spoken), replace(session, shares=shares)
