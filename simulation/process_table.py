"""The process table in virtual time: the sessions of assign.lua and finish.lua, by the same rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rsm.broker.protocol.snapshot import CacheUse, SessionView


class Account(NamedTuple):
    """The charges of a program. Times in ms, service in service units. The fields are `TOTALS`."""

    service: float = 0.0
    waited_ms: float = 0
    ran_ms: float = 0
    paid_waited_ms: float = 0
    paid_ran_ms: float = 0


NOTHING = Account()


class Place(NamedTuple):
    """A call's place in a queue: its level, when it starves there, and whether it already starves."""

    level: int
    starves_ms: float
    promoted: bool


@dataclass(slots=True)
class Session:
    """One entry. Only a root session has an `account`."""

    account: Account = NOTHING
    engine: str = ""
    resident: dict[str, int] = field(default_factory=dict)
    used: dict[str, tuple[float, int]] = field(default_factory=dict)
    completed: int = 0
    completion_tokens: int = 0

    def view(self, now: float, service: float, level: int) -> SessionView:
        """The view that a router would get now. `service`, `level`: those of its program."""
        used = {e: CacheUse(now - at, computed) for e, (at, computed) in self.used.items()}
        mean = self.completion_tokens / max(self.completed, 1)
        return SessionView(self.engine, self.resident, used, "", int(service), level, self.completed, mean)

    def finished(self, engine: str, tokens: int, now: float, computed: int, answer: int) -> None:
        """A call of the session has ended; `tokens` of it are cached on `engine` now."""
        self.resident[engine] = tokens
        self.used[engine] = (now, computed)
        self.completed += 1
        self.completion_tokens += answer


class ProcessTable:
    """All entries. `rules`: the rules of programs.lua."""

    def __init__(self, rules: Any, level_bounds: tuple[int, ...], beta: float, rule: str = "path") -> None:
        self._rules = rules
        self._rule = rule
        self._bounds = rules.list(level_bounds)
        self._beta = beta
        self.promote_many = int(rules.PROMOTE_MANY)  # the most starving calls promoted in one claim
        self._sessions: dict[str, Session] = {}

    def session(self, name: str) -> Session:
        found = self._sessions.get(name)
        if found is None:
            found = self._sessions[name] = Session()
        return found

    def place(self, had: Account, submitted_ms: int, now_ms: int) -> Place:
        """The place of a call whose program has these charges."""
        waited, ran = self.unpaid(had)
        place = self._rules.place(had.service, waited, ran, submitted_ms, now_ms, self._bounds, self._beta)
        return Place(*place)

    def unpaid(self, had: Account) -> tuple[float, float]:
        """Its waiting and running time since the last promotion."""
        if had is NOTHING:
            return 0, 0
        unpaid = self._rules.unpaid
        return unpaid(had.waited_ms, had.paid_waited_ms), unpaid(had.ran_ms, had.paid_ran_ms)

    def score(self, priority: int, level: int, submitted_ms: int) -> float:
        return float(self._rules.queue_score(priority, level, submitted_ms))

    def charge(self, program: str, had: Account, service: float, waited_ms: int, ran_ms: int, promoted_ms: int) -> None:
        """A call of the program has ended.

        Args:
            had: what the program had been charged when the call was assigned.
            promoted_ms: how long it had waited when it was promoted; -1 = it was not.
        """
        entry, charged = self.session(program), self._rules.charged
        was = entry.account
        paid_waited, paid_ran = was.paid_waited_ms, was.paid_ran_ms
        if promoted_ms >= 0:
            paid_waited = charged(paid_waited, had.waited_ms, promoted_ms)
            paid_ran = charged(paid_ran, had.ran_ms, 0)
        entry.account = Account(
            self._rules.served(self._rule, was.service, had.service, service),
            charged(was.waited_ms, had.waited_ms, waited_ms),
            charged(was.ran_ms, had.ran_ms, ran_ms),
            paid_waited,
            paid_ran,
        )

    def end(self, program: str, sessions: set[str]) -> None:
        """Removes a program that has ended. In Redis its entries expire."""
        for name in (program, *sessions):
            self._sessions.pop(name, None)
