"""Whose contexts the engines of a fleet hold, and the throttled calls: as in Redis, by residents.lua."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rsm.broker.protocol.snapshot import Share
from rsm.broker.settings import Settings
from rsm.simulation.engine import Engine
from rsm.simulation.engine_queue import Queue, Waiting
from rsm.simulation.process_table import ProcessTable


class Residents:
    """All engines of a fleet. Times in seconds, contexts in tokens."""

    def __init__(self, rules: Any, settings: Settings, engines: Sequence[Engine], table: ProcessTable) -> None:
        self._rules = rules
        self._half = settings.admission_half_life_s * 1000
        self._factor = settings.admission_factor
        self._beta = settings.starvation_beta
        self._engines = engines
        self._table = table
        self._sums = {e.id: self._nothing() for e in engines}
        self._mine: dict[str, dict[str, Any]] = {}
        self.throttled = Queue(table)

    def _nothing(self) -> Any:
        none = [0.0] * (int(self._rules.LAST_TIER) + 1)
        return self._rules.list({"at": 0, "active": self._rules.list(none), "thinking": self._rules.list(none)})

    def _spoken(self, engine: str, now: float) -> Any:
        return self._rules.spoken_for(self._sums[engine], now * 1000, self._half)

    def spoken_for(self, engine: str, now: float) -> list[float]:
        """Tokens of the engine's cache, by tier."""
        return list(self._spoken(engine, now).values())

    def shares(self, session: str, now: float) -> dict[str, Share]:
        """What it has of each engine's cache."""
        return {e: self._share(mine, now * 1000) for e, mine in self._mine.get(session, {}).items()}

    def _share(self, mine: Any, now_ms: float) -> Share:
        tokens = self._rules.share_of(mine, now_ms, self._half)
        return Share(tokens, self._rules.is_cached_here(mine, now_ms, self._half), mine.calls > 0, mine.tier)

    def arrives(self, engine: str, session: str, context: int, new: int, level: int, now: float) -> None:
        """A call has been assigned."""
        there = self._mine.setdefault(session, {})
        if engine not in there:
            there[engine] = self._rules.list({"calls": 0, "tokens": 0, "since": 0, "tier": 0})
        self._rules.arrives(self._sums[engine], there[engine], context, new, level, now * 1000, self._half)

    def leaves(self, engine: str, session: str, more: int, now: float) -> None:
        """A call has ended. `more`: how much larger its context was than had been thought."""
        self._rules.leaves(self._sums[engine], self._mine[session][engine], more, now * 1000, self._half)

    def gives_back(self, engine: str, session: str, now: float) -> None:
        """A call has left the engine's queue for another engine: it did not run."""
        self._rules.leaves(self._sums[engine], self._mine[session][engine], None, now * 1000, self._half)

    def must_wait(self, session: str, waiting: Waiting, now: float) -> bool:
        """Whether a call has to wait behind throttled ones. One whose context is still in some cache never does."""
        first = self.throttled.first(1, int(now * 1000))
        return (
            bool(first)
            and first[0].score < waiting.score
            and not any(s.cached for s in self.shares(session, now).values())
        )

    def admit(self, now: float) -> list[Waiting]:
        """The throttled calls for which there is headroom now; they are no longer throttled."""
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
        spoken, capacity = self._spoken(engine.id, now), view.kv_tokens * self._factor
        calls = view.queued + view.running
        return self._rules.list({"id": engine.id, "spoken": spoken, "capacity": capacity, "calls": calls})

    def _demand(self, waiting: Waiting, now: float) -> Any:
        shares = {e: self._rules.list(s._asdict()) for e, s in self.shares(waiting.call.times.session, now).items()}
        since = self._rules.starves_at(waiting.submitted_ms, *self._table.unpaid(waiting.had), self._beta)
        demand = {"context": waiting.tokens, "tier": waiting.level, "starves": since <= now * 1000}
        return self._rules.list({**demand, "shares": self._rules.list(shares)})

    def _list(self, items: Any) -> Any:
        return self._rules.list(list(items))

    def end(self, program: str, sessions: set[str]) -> None:
        """The program is over: in Redis its entries expire."""
        for name in (program, *sessions):
            self._mine.pop(name, None)
