"""A producer process: `python -m chaos.producers.process KIND …`, restarted when it dies.

It works on a few calls at once until SIGTERM, then finishes the calls in progress and exits. After SIGUSR1 it kills
itself (kill -9) between its next push and its wait. Its successor continues from its ledger: it waits for unfinished
calls by their ids, and resumes streams after the last event id.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

from chaos.ledger import Ledger, Story, read
from chaos.producers.calls import Plan, Pool, draw, is_real
from rsm.broker import Settings, logs

KINDS = ("sync", "aio", "raw")
# The raw producer's inbox, which it never reads. Our clients trim their inboxes, so only here can all ends be counted.
INBOX = "untrimmed"
LANES = 6
# Number of lanes that call the real engine. It restarts slowly, so only these lanes wait for it.
REAL_LANES = 2
# Pause between two calls of a lane.
PAUSE_S = 0.3
_LEAVE_S = 120


class Book:
    """A producer's work: its plans, the facts from its predecessors, and the ledger for its own. Thread-safe."""

    def __init__(self, place: int, seed: int, path: Path, pool: Pool | None = None) -> None:
        self._seed, self._place, self._pool = seed, place, pool
        self._stories = read([path])
        self._ledger = Ledger(path)
        numbers = {_number(call) for call in self._stories}
        self._unfinished = sorted({_number(c) for c, s in self._stories.items() if not s.ends})
        even = (max(numbers, default=-1) + 2) // 2 * 2
        self._fresh = {False: itertools.count(even, 2), True: itertools.count(even + 1, 2)}
        self._lock = threading.Lock()
        self._dies_at_push = False
        self.stopping = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: self._stop())
        signal.signal(signal.SIGUSR1, lambda *_: self._die_at_push())

    def take(self, lane: int) -> list[Plan] | None:
        """Returns the next calls of a lane, new or a predecessor's; None if there is no more work."""
        real = lane < REAL_LANES
        with self._lock:
            left = [number for number in self._unfinished if is_real(number) is real]
            if left:
                self._unfinished.remove(left[0])
            elif self.stopping.is_set():
                return None
            number = left[0] if left else next(self._fresh[real])
        plans = draw(self._seed, self._place, number, self._pool)
        for plan in plans:
            if plan.id not in self._stories:
                self._stories[plan.id] = Story(plan)
                self._ledger.note("planned", plan.id, plan=plan.as_json())
        return [plan for plan in plans if not self.story(plan).ends]

    def story(self, plan: Plan) -> Story:
        """Returns what this process and its predecessors know about a call."""
        return self._stories[plan.id]

    def accepted(self, plan: Plan) -> None:
        """Notes that the push was acknowledged."""
        self._note("accepted", plan)
        if self._dies_at_push:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadline(self, plan: Plan, ms: int) -> None:
        self._note("deadline", plan, ms=ms)

    def chunk(self, plan: Plan, n: int, eid: str, text: str, token_ids: list[int]) -> None:
        self._note("chunk", plan, n=n, eid=eid, text=text, ids=token_ids)

    def cancel(self, plan: Plan) -> None:
        """Notes that a cancel of the call, or of its session, is about to be sent."""
        self._note("cancel", plan)

    def cancelled(self, plan: Plan, ms: int) -> None:
        """Notes that the cancel was acknowledged as effective, at `ms` on Redis's clock."""
        self._note("cancelled", plan, ms=ms)

    def session_cancelled(self, plan: Plan, ms: int) -> None:
        self._note("session_cancelled", plan, ms=ms)

    def lost(self, plan: Plan) -> None:
        """Notes that an accepted call has no record."""
        self._note("lost", plan)
        self.end(plan, "LOST")

    def end(self, plan: Plan, state: str, text: str = "", token_ids: list[int] | None = None, code: str = "") -> None:
        self._note("end", plan, state=state, text=text, ids=token_ids or [], error_code=code)

    def _stop(self) -> None:
        self._dies_at_push = False
        self.stopping.set()
        signal.alarm(_LEAVE_S)  # its parent and Redis may be gone

    def _die_at_push(self) -> None:
        self._dies_at_push = not self.stopping.is_set()  # while stopping, it would not be restarted

    def _note(self, what: str, plan: Plan, **more: Any) -> None:
        self._ledger.note(what, plan.id, **more)
        self.story(plan).add({"what": what, "at": 1.0, **more})


def ready_file(ledger: Path) -> Path:
    """Returns the file with the pid of the producer on a ledger; the producer writes it once it handles SIGTERM."""
    return ledger.with_suffix(".pid")


def _number(call_id: str) -> int:
    """Returns the number in a call's id: 17 for "p2-17.0"."""
    return int(call_id.partition("-")[2].partition(".")[0])


def main() -> None:
    parser = argparse.ArgumentParser(prog="chaos.producers.process")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("place", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--pool", type=json.loads)
    args = parser.parse_args()
    logs.configure(Settings(), f"producer {args.place}")
    pool = Pool(args.pool["model"], tuple(args.pool["prompts"]), args.pool["max_tokens"]) if args.pool else None
    book = Book(args.place, args.seed, args.ledger, pool)
    ready_file(args.ledger).write_text(str(os.getpid()))
    importlib.import_module(f"chaos.producers.{args.kind}").run(book, Settings())


if __name__ == "__main__":
    main()
