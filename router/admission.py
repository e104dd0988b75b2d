"""Admission: an engine's KV cache is given to programs in the order in which they wait. No clock and no I/O here.

Where the contexts of the programs in hand exceed an engine's cache, they evict each other: each next call computes its
whole context anew, and while it does so, evicts another's. So calls of programs whose contexts are there go first, and
others wait at the router until there is room. Whose contexts are there: lua/residents.lua.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from broker.messages import NOT_THERE, EngineView, SessionView, Share
from router.policies.base import CallView

HELD = "no engine has room for its context of {tokens} tokens"


class Admission:
    """Says which engines a call may go to. `factor`: contexts that an engine may have, over what its cache holds."""

    def __init__(self, factor: float = 1.0) -> None:
        self._factor = factor

    def open_to(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> list[EngineView]:
        """The engines where the session's context is, or else those that have room for it; none: the call is held.

        An engine that does not say how large its cache is has room for everybody.
        """
        homes = [e for e in engines if session.shares.get(e.id, NOT_THERE).home]
        return homes or [e for e in engines if self._fits(call, e, session)]

    def _fits(self, call: CallView, engine: EngineView, session: SessionView) -> bool:
        """As lua/residents.lua has it, which decides where two routers place calls at once."""
        room, context = engine.kv_tokens * self._factor, context_of(call, engine, session)
        spoken = engine.spoken_for - session.shares.get(engine.id, NOT_THERE).tokens + context
        return room <= 0 or spoken <= room or (context > room and not engine.queued + engine.running)


def context_of(call: CallView, engine: EngineView, session: SessionView) -> int:
    """Tokens of KV that a call will hold at its end: its prompt, and an answer as long as others of late."""
    return call.prompt_tokens + round(session.completion_tokens or engine.completion_tokens)


def new_of(call: CallView, engine: EngineView, session: SessionView) -> int:
    """What of its context no other call of its session holds on that engine."""
    return max(0, context_of(call, engine, session) - session.resident.get(engine.id, 0))


def with_context(engine: EngineView, call: CallView, session: SessionView) -> tuple[EngineView, SessionView]:
    """The engine and the session as they are once the call has been given to it."""
    share = session.shares.get(engine.id, NOT_THERE)
    more = new_of(call, engine, session) if share.active else context_of(call, engine, session) - share.tokens
    there = Share(share.tokens + more, home=True, active=True)
    spoken = replace(engine, spoken_for=engine.spoken_for + more)
    return spoken, replace(session, shares={**session.shares, engine.id: there})
