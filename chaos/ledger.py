"""The ledger: what each producer knows, one JSON line per fact, written before its next step.

It is outside Redis. The kernel has a line once `note` returns, so the line survives a kill -9 of the producer.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.producers.calls import Plan


class Ledger:
    """Writes one producer's file; its successor appends to it. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        # The predecessor died while writing an incomplete line, and nobody has acted on it.
        os.ftruncate(self._file, path.read_bytes().rfind(b"\n") + 1)

    def note(self, what: str, call: str, **more: Any) -> None:
        """Writes one fact about a call. The time is this machine's, and is never compared with Redis's."""
        line = json.dumps({"at": time.time(), "what": what, "call": call, **more}, separators=(",", ":"))
        os.write(self._file, line.encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)


@dataclass(slots=True)
class Chunk:
    """One chunk of a stream, as received by a producer."""

    n: int
    eid: str
    text: str
    token_ids: list[int]


@dataclass(slots=True)
class End:
    """The end of a call, as received by a waiter."""

    state: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    error_code: str = ""


@dataclass(slots=True)
class Story:
    """Everything known about one call outside Redis. Times are this machine's epoch seconds unless they end in _ms.

    Attributes:
        accepted: when a push was acknowledged; 0: never.
        deadline_ms: on Redis's clock; 0: none.
        cancels: when a cancel was requested.
        cancelled_ms: Redis's clock just after a cancel was acknowledged as effective; 0: never.
        session_cancelled_ms: the same for a cancel of its session that was requested after this call was accepted.
        lost: whether its record was missing after the push had been acknowledged.
    """

    plan: Plan
    producer: int = 0
    planned: float = 0.0
    accepted: float = 0.0
    deadline_ms: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    ended: float = 0.0
    cancels: list[float] = field(default_factory=list)
    cancelled_ms: int = 0
    session_cancelled_ms: int = 0
    lost: bool = False

    @property
    def last_eid(self) -> str:
        """The event id after which a reader of the stream resumes."""
        return self.chunks[-1].eid if self.chunks else "0-0"

    def add(self, fact: dict[str, Any]) -> None:
        """Applies one line of a ledger."""
        getattr(self, f"_on_{fact['what']}")(fact)

    def _on_planned(self, fact: dict[str, Any]) -> None:
        """Does nothing: a successor plans the same call again."""

    def _on_deadline(self, fact: dict[str, Any]) -> None:
        self.deadline_ms = fact["ms"]

    def _on_accepted(self, fact: dict[str, Any]) -> None:
        self.accepted = self.accepted or fact["at"]

    def _on_chunk(self, fact: dict[str, Any]) -> None:
        self.chunks.append(Chunk(fact["n"], fact["eid"], fact["text"], fact["ids"]))

    def _on_cancel(self, fact: dict[str, Any]) -> None:
        self.cancels.append(fact["at"])

    def _on_cancelled(self, fact: dict[str, Any]) -> None:
        self.cancelled_ms = self.cancelled_ms or fact["ms"]

    def _on_session_cancelled(self, fact: dict[str, Any]) -> None:
        self.session_cancelled_ms = self.session_cancelled_ms or fact["ms"]

    def _on_lost(self, _: dict[str, Any]) -> None:
        self.lost = True

    def _on_end(self, fact: dict[str, Any]) -> None:
        self.ends.append(End(fact["state"], fact["text"], fact["ids"], fact["error_code"]))
        self.ended = fact["at"]


def read(paths: Iterable[Path]) -> dict[str, Story]:
    """Returns the stories of all calls in these ledgers, by call id."""
    stories: dict[str, Story] = {}
    for producer, path in enumerate(paths):
        for fact in _facts(path):
            call = fact["call"]
            if call not in stories:
                plan = Plan.of(fact["plan"])
                stories[call] = Story(plan, producer, fact["at"])
            stories[call].add(fact)
    return stories


def _facts(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)
