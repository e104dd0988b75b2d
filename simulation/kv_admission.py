"""Admission in virtual time: the contexts in the engines' caches, and the throttled calls, by the rules of
residents.lua."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rsm.broker.protocol.snapshot import Share
from rsm.broker.settings import Settings
from rsm.simulation.engine import Engine
from rsm.simulation.engine_queue import Queue, Waiting
from rsm.simulation.process_table import ProcessTable


class Residents:
    """The contexts on all engines of a fleet. Times in seconds, contexts in tokens."""

    def __init__(self, rules: Any, settings: Settings, engines: Sequence[Engine], table: ProcessTable) -> None:
        self._rules = rules
        self._half_life_ms = settings.admission_half_life_s * 1000
        self._factor = settings.admission_factor
        self._beta = settings.starvation_beta
        self._engines = engines
        self._table = table
        self._sums = {e.id: self._empty() for e in engines}
        self._shares: dict[str, dict[str, Any]] = {}
        self.throttled = Queue(table)

    def _empty(self) -> Any:
        zeros = [0.0] * (int(self._rules.LAST_TIER) + 1)
        return self._rules.list({"at": 0, "active": self._rules.list(zeros), "thinking": self._rules.list(zeros)})

    def _reserved(self, engine: str, now: float) -> Any:
        return self._rules.spoken_for(self._sums[engine], now * 1000, self._half_life_ms)

    def spoken_for(self, engine: str, now: float) -> list[float]:
        """Reserved tokens of the engine's cache, by tier."""
        return list(self._reserved(engine, now).values())

    def shares(self, session: str, now: float) -> dict[str, Share]:
        """The session's share of each engine's cache."""
        return {e: self._share(share, now * 1000) for e, share in self._shares.get(session, {}).items()}

    def _share(self, share: Any, now_ms: float) -> Share:
        tokens = self._rules.share_of(share, now_ms, self._half_life_ms)
        return Share(tokens, self._rules.is_cached_here(share, now_ms, self._half_life_ms), share.calls > 0, share.tier)

    def arrives(self, engine: str, session: str, context: int, new: int, level: int, now: float) -> None:
        """A call has been assigned."""
        shares = self._shares.setdefault(session, {})
        if engine not in shares:
            shares[engine] = self._rules.list({"calls": 0, "tokens": 0, "since": 0, "tier": 0})
        self._rules.arrives(self._sums[engine], shares[engine], context, new, level, now * 1000, self._half_life_ms)

    def leaves(self, engine: str, session: str, more: int, now: float) -> None:
        """A call has ended. `more`: how much larger its context was than expected."""
        self._rules.leaves(self._sums[engine], self._shares[session][engine], more, now * 1000, self._half_life_ms)

    def moves(self, engine: str, session: str, now: float) -> None:
        """A call has moved to another engine's queue without running."""
        self._rules.leaves(self._sums[engine], self._shares[session][engine], None, now * 1000, self._half_life_ms)

    def must_wait(self, session: str, waiting: Waiting, now: float) -> bool:
        """Whether a call has to wait after throttled ones. A call whose context is still in a cache never does."""
        first = self.throttled.first(1, int(now * 1000))
        return (
            bool(first)
            and first[0].score < waiting.score
            and not any(s.cached for s in self.shares(session, now).values())
        )

    def admit(self, now: float) -> list[Waiting]:
        """Removes and returns the throttled calls for which there is headroom now."""
        if not self.throttled:
            return []
        first = self.throttled.first(self._rules.BYPASS + 1, int(now * 1000))
        caches = [self._cache(e, now) for e in self._engines]
        chosen = self._rules.admissible(self._list(self._demand(w, now) for w in first), self._list(caches))
        found = [first[int(n) - 1] for n in chosen.values()]
        for waiting in found:
            self.throttled.remove(waiting)
        return found

    def _cache(self, engine: Engine, now: float) -> Any:
        view = engine.view(now)
        reserved, capacity = self._reserved(engine.id, now), view.kv_tokens * self._factor
        calls = view.queued + view.running
        return self._rules.list({"id": engine.id, "spoken": reserved, "capacity": capacity, "calls": calls})

    def _demand(self, waiting: Waiting, now: float) -> Any:
        shares = {e: self._rules.list(s._asdict()) for e, s in self.shares(waiting.call.times.session, now).items()}
        since = self._rules.starves_at(waiting.submitted_ms, *self._table.unpaid(waiting.had), self._beta)
        demand = {"context": waiting.tokens, "tier": waiting.level, "starves": since <= now * 1000}
        return self._rules.list({**demand, "shares": self._rules.list(shares)})

    def _list(self, items: Any) -> Any:
        return self._rules.list(list(items))

    def end(self, program: str, sessions: set[str]) -> None:
        """Removes a program that has ended. In Redis its entries expire."""
        for name in (program, *sessions):
            self._shares.pop(name, None)
