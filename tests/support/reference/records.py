"""Calls, entries, sessions and engines of the reference model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

NEVER = float("inf")
ENDED = ("COMPLETED", "CANCELLED", "FAILED")
LONG_AGO = 10**9  # engines whose lease ended before this time are no longer listed
LIFE = ["STARTING", "READY", "DRAINING", "STOPPED"]


@dataclass
class Call:
    """A record. `timed`: listed in `deadlines`; `due`: its deadline has passed; `size`: bytes of its body."""

    id: str
    gen: str
    session: str
    digest: str
    priority: int
    tokens: int
    stream: bool
    timed: bool
    due: bool
    size: int
    on_engine_loss: str = "continue"
    arrival: int = 0
    state: str = "PENDING"
    attempt: int = 1
    failures: int = 0
    deaths: tuple[str, ...] = ()
    engine: str = ""
    level: int = 0
    reuse: int = 0
    inherited: int = 0
    waited: int = 0  # inherited waiting time of its program, in ages (test_state_machine.AGE)
    paid: int = 0
    promoted: bool = False
    starves: bool = False
    cancel: str = ""
    error_code: str = ""
    moves: int = 0
    log: list[str] = field(default_factory=list)
    begins: int = 0

    @property
    def open(self) -> bool:
        return self.state not in ENDED

    def seen(self) -> tuple[Any, ...]:
        """The expected content of its record."""
        flag = self.cancel if self.state == "RUNNING" else ""
        fence, lost = (self.gen, self.attempt), (self.failures, self.deaths)
        placed = self.level, self.promoted, self.waited, self.moves
        return *fence, self.state, *lost, self.engine, *placed, flag, self.error_code, self.session

    @property
    def rank(self) -> int:
        return (self.priority + 128) * 16 + self.level

    @property
    def work(self) -> int:
        return max(0, self.tokens - self.reuse)

    @property
    def place_in_queue(self) -> tuple[int, int, int, str]:
        return self.priority, self.level, self.arrival, self.id


@dataclass
class Entry:
    """An entry of the router stream. For a push, `gen` is empty: its name is the generation."""

    id: str
    gen: str
    name: str = ""


@dataclass
class Session:
    """A session. In a root, `service`, `waited` and `paid` are those of the program; the last two are in ages."""

    counts: Counter[str] = field(default_factory=Counter)
    parent: str = ""
    service: int = 0
    waited: int = 0
    paid: int = 0
    engine: str = ""
    cancel_before: str = ""
    cancel_tree_before: str = ""

    @property
    def worn(self) -> bool:
        """Whether its program has waited so long that calls after the first level starve at once."""
        return self.waited > self.paid


@dataclass
class Engine:
    """An engine. `beat`: when its lease ended, or NEVER; `listed`: whether `engines` has it."""

    incarnation: str
    state: str = "STARTING"
    beat: float = NEVER
    listed: bool = True
    claim_no: int = 0
    claimed: list[str] = field(default_factory=list)
    alone: str = ""  # the suspect that it makes room for, or that runs on it alone
    served: int = 0


def order(entry: str) -> tuple[int, ...]:
    return tuple(map(int, entry.split("-")))
