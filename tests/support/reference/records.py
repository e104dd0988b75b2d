"""What the reference model knows of a call, an entry, a session and an engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

NEVER = float("inf")
ENDED = ("COMPLETED", "CANCELLED", "FAILED")
LONG_AGO = 10**9  # a lease that ended before then ended longer ago than an engine stays listed
LIFE = ["STARTING", "READY", "DRAINING", "STOPPED"]


@dataclass
class Call:
    """A record. `timed`: listed under `deadlines`; `due`: its deadline has passed; `size`: bytes of its body."""

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
    waited: int = 0  # its program's ages of waiting (test_state_machine.AGE), as inherited
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
        """What its record must show."""
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
    """An entry of the router stream. `gen` is empty for a push: its name is the generation."""

    id: str
    gen: str
    name: str = ""


@dataclass
class Session:
    """`service`, `waited` and `paid` are those of its program if it is a root; the last two in ages."""

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
        """Its program has waited so long that whatever is behind the first level starves at once."""
        return self.waited > self.paid


@dataclass
class Engine:
    """`beat`: when its lease ended, NEVER while it holds; `listed`: it stands among `engines`."""

    incarnation: str
    state: str = "STARTING"
    beat: float = NEVER
    listed: bool = True
    claim_no: int = 0
    claimed: list[str] = field(default_factory=list)
    alone: str = ""  # the suspect for which it empties itself, or which runs on it alone
    served: int = 0


def order(entry: str) -> tuple[int, ...]:
    return tuple(map(int, entry.split("-")))
