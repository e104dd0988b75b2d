"""The process table in virtual time: what lua/assign.lua and lua/finish.lua keep of sessions, by the same rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from broker.messages import SessionView


@dataclass(slots=True)
class Session:
    """One entry. Times in ms, service in service units."""

    service: float = 0.0
    waited_ms: int = 0
    ran_ms: int = 0
    engine: str = ""
    resident: dict[str, int] = field(default_factory=dict)

    def view(self) -> SessionView:
        return SessionView(self.engine, self.resident, service=int(self.service))


class ProcessTable:
    """All entries. `rules`: those of broker/lua/programs.lua."""

    def __init__(self, rules: Any, level_bounds: tuple[int, ...]) -> None:
        self._rules = rules
        self._bounds = rules.list(level_bounds)
        self._sessions: dict[str, Session] = {}

    def session(self, name: str) -> Session:
        found = self._sessions.get(name)
        if found is None:
            found = self._sessions[name] = Session()
        return found

    def level_of(self, service: float) -> int:
        return int(self._rules.level_of(service, self._bounds))

    def score(self, priority: int, level: int, submitted_ms: int) -> float:
        return float(self._rules.queue_score(priority, level, submitted_ms))

    def charge(self, program: str, had: Session, service: float, waited_ms: int, ran_ms: int) -> None:
        """A call of the program has ended; `had`: what the entry was when the call was assigned."""
        entry, charged = self.session(program), self._rules.charged
        entry.service = charged(entry.service, had.service, service)
        entry.waited_ms = charged(entry.waited_ms, had.waited_ms, waited_ms)
        entry.ran_ms = charged(entry.ran_ms, had.ran_ms, ran_ms)

    def end(self, program: str, sessions: set[str]) -> None:
        """The program is over: in Redis its entries expire."""
        for name in (program, *sessions):
            self._sessions.pop(name, None)
