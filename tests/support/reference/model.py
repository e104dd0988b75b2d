"""A reference model of docs/protocol.md in plain Python: no Redis, no clock, no retries.

Each public method models the script of that name. Values that Redis chooses (entry ids, arrival times) are arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from rsm.broker import Settings
from rsm.broker.protocol.transitions import Fence
from tests.support.reference.records import LIFE, LONG_AGO, NEVER, Call, Engine, Entry, Session, order


class Model:
    def __init__(self, sessions: Iterable[str], s: Settings) -> None:
        self.max_attempts, self.max_deaths, self.max_open = s.max_attempts, s.max_deaths, s.max_open_calls
        self.bounds = s.level_bounds
        self.calls: dict[str, Call] = {}
        self.notes: dict[str, str] = {}  # cancellations that arrived before the call's record
        self.stream: list[Entry] = []
        self.parked: dict[str, int] = {}  # id, and arrival when it was parked
        self.engines: dict[str, Engine] = {}
        self.sessions = {s: Session() for s in sessions}
        self.solved: set[str] = set()  # deaths of engines whose cause is known
        self.left: list[str] = []  # generations of calls that ended before an engine had them
        self.stats: Counter[str] = Counter()
        self.reported: list[tuple[str, str, str]] = []  # ends in the inbox: id, generation, state
        self.forgotten: set[tuple[str, str]] = set()  # ids and generations of records that have expired

    # -- what the scripts have in common

    def queue(self, e: str) -> list[str]:
        waiting = [c for c in self.calls.values() if c.state == "PENDING" and c.engine == e]
        return [c.id for c in sorted(waiting, key=lambda c: c.place_in_queue)]

    def running(self, e: str) -> set[str]:
        return {c.id for c in self.calls.values() if c.state == "RUNNING" and c.engine == e}

    def work(self, e: str) -> Counter[str]:
        """The calls that wait for an engine, and their tokens to compute, by rank."""
        counts: Counter[str] = Counter()
        for c in (self.calls[i] for i in self.queue(e)):
            counts[str(c.rank)] += 1
            counts[f"{c.rank}:tokens"] += c.work
        return +counts

    def load(self, ids: Iterable[str]) -> int:
        return sum(self.calls[i].tokens for i in ids)

    def end(self, c: Call, state: str, code: str = "") -> None:
        if c.state == "PENDING" and not c.engine:
            self.parked.pop(c.id, None)
            self.left.append(c.gen)
        c.state, c.error_code, c.timed = state, code, False
        self.report(c.id, c.gen, state)
        self.stats[state.lower()] += 1
        self.sessions[c.session].counts[state.lower()] += 1

    def report(self, call_id: str, gen: str, state: str) -> None:
        self.reported.append((call_id, gen, state))

    def end_flagged(self, c: Call) -> None:
        if c.cancel == "deadline":
            self.end(c, "FAILED", "deadline_exceeded")
        else:
            self.end(c, "CANCELLED")

    def to_router(self, c: Call) -> None:
        c.state, c.engine, c.level, c.inherited = "PENDING", "", 0, 0
        c.waited, c.paid, c.promoted, c.starves, c.reuse = 0, 0, False, False, 0
        self.stream.append(Entry(c.id, c.gen))

    def lose(self, c: Call, fault: str, engine: str) -> None:
        """Ends the attempt without a result.

        Args:
            fault: "death" of the engine, "error", or "" if the call was returned in order.
            engine: the engine on which the call waits again. By default, it goes to the router.
        """
        if c.cancel:
            self.end_flagged(c)
            return
        if (fault == "death" and self.dies_too(c)) or (fault == "error" and self.fails_for_good(c)):
            return
        if c.on_engine_loss == "restart" and len(c.log) > c.begins:
            c.log.append("restart")
            c.begins = len(c.log)
        c.attempt += 1
        self.stats["requeued"] += 1
        if engine:
            c.state = "PENDING"
        else:
            self.to_router(c)

    def dies_too(self, c: Call) -> bool:
        engine = self.engines[c.engine]
        if c.on_engine_loss == "fail":
            self.end(c, "FAILED", "engine_lost")
            return True
        c.deaths = (*(d for d in c.deaths if d not in self.solved | {engine.incarnation}), engine.incarnation)
        guilty = len(c.deaths) >= self.max_deaths and engine.alone == c.id
        if guilty:
            self.solved |= set(c.deaths)
            self.dead_letter(c, "attempts_exhausted")
        return guilty

    def fails_for_good(self, c: Call) -> bool:
        c.failures += 1
        if c.failures >= self.max_attempts:
            self.dead_letter(c, "engine_error")
        return not c.open

    def dead_letter(self, c: Call, code: str) -> None:
        self.stats["dead_letters"] += 1
        self.end(c, "FAILED", code)

    def suspect(self, c: Call) -> bool:
        """Whether one more death fails the call, so that it must run alone."""
        return bool(c.deaths) and len(set(c.deaths) - self.solved) >= self.max_deaths - 1

    def give_back(self, e: str, limit: int) -> int:
        ids = self.queue(e)[:limit]
        for i in ids:
            self.to_router(self.calls[i])
        return len(ids)

    def stop(self, c: Call, flag: str) -> bool:
        """Ends a waiting call, flags a running one. Returns whether anything changed."""
        if not c.open or c.cancel:
            return False
        c.cancel, waiting = flag, c.state == "PENDING"
        if waiting:
            self.end_flagged(c)
            c.cancel = ""  # only a running call carries the flag
        return True

    def take(self, entry: str) -> None:
        self.stream = [e for e in self.stream if e.name != entry]

    def fenced(self, e: str, fence: Fence) -> Call | None:
        """The call, if the fence names its latest attempt and that is on this engine."""
        c = self.calls.get(fence.call_id)
        return c if c and (c.gen, c.attempt, c.engine) == (fence.gen, fence.attempt, e) else None

    # -- producers

    def lineage(self, session: str) -> list[str]:
        """A session and its ancestors, the root last."""
        parent = self.sessions[session].parent
        return [session, *(self.lineage(parent) if parent else [])]

    def program(self, session: str) -> Session:
        return self.sessions[self.lineage(session)[-1]]

    def adopt(self, session: str, parent: str) -> bool:
        """Makes one session the other's child. Returns whether that is allowed."""
        child = self.sessions[session]
        if child.parent or session in self.lineage(parent):
            return child.parent == parent
        root, child.parent = self.program(parent), parent
        for total in ("service", "waited", "paid"):
            setattr(root, total, max(getattr(root, total), getattr(child, total)))
        return True

    def create(self, new: Call, parent: str = "", always: bool = False) -> tuple[str, str]:
        """Creates a record. `always`: even above the limit of open calls."""
        old = self.calls.get(new.id)
        refused = old and old.error_code == "overloaded" and old.digest == new.digest
        if old and not refused:
            return ("duplicate" if old.digest == new.digest else "conflict"), old.state
        if not always and sum(c.open for c in self.calls.values()) >= self.max_open:
            return "overloaded", ""
        if parent and not self.adopt(new.session, parent):
            return "invalid", ""
        self.calls[new.id] = new
        self.stats["submitted"] += 1
        self.sessions[new.session].counts["arrivals"] += 1
        return "new", "PENDING"

    def submit(self, new: Call, parent: str) -> tuple[str, str]:
        code, state = self.create(new, parent)
        if code == "new":
            self.stream.append(Entry(new.id, "", new.gen))
        return code, state

    def cancel(self, call_id: str) -> str:
        c = self.calls.get(call_id)
        if c is None:
            if not self.stream:
                return "unknown"
            self.notes[call_id] = self.stream[-1].name
            return "noted"
        running = c.state == "RUNNING"
        if self.stop(c, "user"):
            return "cancelling" if running else "cancelled"
        if c.state == "CANCELLED":
            return "cancelled"  # repeated after a lost reply
        return "cancelling" if c.open and c.cancel == "user" else "finished"

    def cancel_session(self, session: str, descendants: bool) -> int:
        marks, last = self.sessions[session], self.stream[-1].name if self.stream else ""
        marks.cancel_before = last or marks.cancel_before
        ended = sum(self.stop(c, "user") for c in self.calls.values() if c.session == session)
        if not descendants:
            return ended
        marks.cancel_tree_before = last or marks.cancel_tree_before
        children = [s for s, x in self.sessions.items() if x.parent == session]
        return ended + sum(self.cancel_session(s, True) for s in children)

    def forget(self, call_id: str) -> None:
        if call_id in self.calls:
            self.forgotten.add((call_id, self.calls.pop(call_id).gen))
        self.notes.pop(call_id, None)

    # -- router

    def accept(self, entry: str, new: Call, parent: str) -> str:
        if not any(e.name == entry for e in self.stream):
            return "gone"
        old = self.calls.get(new.id)
        if old and old.gen == entry:
            return "duplicate"
        code, _ = self.create(new, parent)
        if code != "new":
            self.take(entry)
        if code in ("overloaded", "invalid"):
            new.size = 0
            self.create(new, always=True)
            self.end(new, "FAILED", "overloaded" if code == "overloaded" else "invalid_request")
        if code == "conflict":
            self.stats["dead_letters"] += 1
            self.report(new.id, entry, "FAILED")
        return code

    def reject(self, entry: str, gen: str, refused: Call) -> str:
        if not any(e.name == entry for e in self.stream):
            return "gone"
        self.take(entry)
        code, _ = self.create(refused, always=True)
        c = self.calls[refused.id]
        if code != "new" and c.gen == gen and (c.state != "PENDING" or c.engine):
            return "stale"
        if code != "new" and c.gen != gen:
            self.stats["dead_letters"] += 1
            self.report(refused.id, entry, "FAILED")
            return "buried"
        self.end(c, "FAILED", "invalid_request")
        return "failed"

    def ready(self, e: str) -> bool:
        return e in self.engines and self.engines[e].state == "READY"

    def cancelled_before(self, c: Call) -> bool:
        trees = [self.sessions[s].cancel_tree_before for s in self.lineage(c.session)]
        marks = (self.sessions[c.session].cancel_before, self.notes.get(c.id, ""), *trees)
        return any(order(c.gen) <= order(mark) for mark in marks if mark)

    def assign(self, entry: str, call_id: str, gen: str, e: str, bind: bool, seen: str, reuse: int) -> tuple[str, str]:
        c = self.calls.get(call_id)
        if c is None:
            return "missing", ""
        waits = c.state == "PENDING" and c.gen == gen and not c.engine
        cancelled = self.cancelled_before(c)
        if waits and not cancelled and not c.due and e and not self.ready(e):
            return "unplaced", e
        self.take(entry)
        if not waits:
            return "stale", c.engine
        if cancelled:
            self.end(c, "CANCELLED")
            return "cancelled", ""
        if c.due:
            self.end(c, "FAILED", "deadline_exceeded")
            return "expired", ""
        if not e:
            self.parked[call_id] = c.arrival
            return "parked", ""
        return "assigned", self.place(c, e, bind, seen, reuse)

    def place(self, c: Call, e: str, bind: bool, seen: str, reuse: int) -> str:
        session, program = self.sessions[c.session], self.program(c.session)
        self.parked.pop(c.id, None)
        if bind:
            bound = session.engine
            session.engine = bound if bound and bound != seen and self.ready(bound) else e
            e, reuse = session.engine, reuse if session.engine == e else 0
        c.reuse = reuse
        c.engine, c.inherited, c.waited, c.paid = e, program.service, program.waited, program.paid
        c.level = sum(program.service >= b for b in self.bounds)
        if c.level and program.worn:
            self.promote(c)
        self.engines[e].served += 1
        return e

    def reap(self, limit: int, claims: dict[str, list[str]], only: str = "", incarnation: str = "") -> Any:
        """Handles dead engines. `claims`: the running calls of each engine, in the order of their claims."""
        candidates = [e for _, e in sorted((x.beat, e) for e, x in self.engines.items() if x.listed and x.beat < NEVER)]
        if only:
            candidates = [only] if only in self.engines and self.engines[only].incarnation == incarnation else []
        moved, dead = 0, []
        for e in candidates:
            engine = self.engines[e]
            if engine.state not in ("DEAD", "STOPPED"):
                engine.state = "DEAD"
                dead.append(e)
            running = claims[e][: limit - moved]
            for i in running:
                self.lose(self.calls[i], "death", "")
            moved += len(running)
            moved += self.give_back(e, limit - moved)
            engine.listed = engine.listed and not (moved < limit and engine.beat < LONG_AGO)
        return moved, dead

    def expire(self) -> int:
        due = [c for c in self.calls.values() if c.timed and c.due]
        for c in due:
            c.timed = False
            self.stop(c, "deadline")
        return len(due)

    def unpark(self) -> int:
        ids = sorted(self.parked, key=lambda i: (self.parked[i], i))
        self.parked.clear()
        for c in (self.calls[i] for i in ids if i in self.calls):
            if c.state == "PENDING" and not c.engine:
                self.to_router(c)
        return len(ids)

    def steal(self, call_id: str, gen: str, e: str, moves: int) -> bool:
        c = self.calls.get(call_id)
        if c is None or (c.state, c.gen, c.engine, c.moves) != ("PENDING", gen, e, moves) or self.suspect(c):
            return False
        session = self.sessions[c.session]
        session.engine = "" if session.engine == e else session.engine
        c.moves += 1
        self.stats["stolen"] += 1
        self.to_router(c)
        return True

    def drain(self, e: str, limit: int) -> int:
        if e not in self.engines or self.engines[e].state in ("STOPPED", "DEAD"):
            return -1
        self.engines[e].state = "DRAINING"
        return self.give_back(e, limit)

    # -- workers

    def register(self, e: str, incarnation: str, claims: list[str]) -> bool:
        old = self.engines.get(e)
        alive = old and old.listed and old.beat == NEVER and old.state not in ("STOPPED", "DEAD")
        if old and alive and old.incarnation != incarnation:
            return False
        if old and old.incarnation != incarnation:
            for i in claims:
                self.lose(self.calls[i], "death", e)
        self.engines[e] = Engine(incarnation, served=old.served if old else 0)
        return True

    def heartbeat(self, e: str, incarnation: str, state: str) -> bool:
        x = self.engines.get(e)
        if x is None or x.incarnation != incarnation or x.state in ("DEAD", "STOPPED"):
            return False
        x.state, x.beat, x.listed = max(state, x.state, key=LIFE.index), NEVER, True
        return True

    def claim(
        self, e: str, incarnation: str, claim_no: int, most: int, ahead: int = 0, threshold: tuple[int, int] = (0, 0)
    ) -> list[Call] | None:
        x = self.engines.get(e)
        if x is None or x.incarnation != incarnation or x.state == "DEAD":
            return None
        if claim_no != x.claim_no:
            claimed = self.hand_out(e, x, most, ahead, threshold)
            if not claimed:
                return []
            x.claim_no, x.claimed = claim_no, [c.id for c in claimed]
        return [self.calls[i] for i in x.claimed if i in self.running(e)]

    def promote(self, c: Call) -> None:
        """Moves a call that has waited too long to the first level."""
        c.level, c.starves, c.promoted = 0, False, True
        self.stats["promoted"] += 1

    def hand_out(self, e: str, x: Engine, most: int, ahead: int, threshold: tuple[int, int]) -> list[Call]:
        for i in self.queue(e):
            if self.calls[i].starves:
                self.promote(self.calls[i])
        claimed: list[Call] = []
        better = sum((self.calls[i].priority, self.calls[i].level) < threshold for i in self.queue(e))
        for c in self.next_calls(e, x, max(most, min(ahead, better))):
            if c.due:
                self.end(c, "FAILED", "deadline_exceeded")
                continue
            if self.suspect(c):
                x.alone = c.id
                if self.running(e):
                    break
            c.state, c.starves = "RUNNING", False
            claimed.append(c)
            if self.suspect(c):
                break
        return claimed

    def next_calls(self, e: str, x: Engine, most: int) -> list[Call]:
        alone = self.calls.get(x.alone)
        if alone and alone.open and alone.engine == e and self.suspect(alone):
            return [alone] if alone.state == "PENDING" else []
        x.alone = ""
        return [self.calls[i] for i in self.queue(e)[:most]]

    def publish(self, e: str, fence: Fence, n: int, text: str) -> str:
        c = self.fenced(e, fence)
        if c is None or c.state != "RUNNING":
            return "stale"
        if n != len(c.log):
            return "seen" if n < len(c.log) else "gap"
        c.log.append(text)
        return "ok"

    def finish(self, e: str, fence: Fence, state: str, code: str, service: int, events: int) -> str:
        c = self.fenced(e, fence)
        if c is None or c.state == "PENDING":
            return "stale"
        if not c.open:
            return "again"
        if state == "COMPLETED" and not c.cancel and events > len(c.log):
            return "gap"
        program = self.program(c.session)
        program.service = max(program.service, c.inherited + service)
        program.waited = max(program.waited, c.waited)
        if c.promoted:
            program.paid = max(program.paid, c.waited)
        if c.cancel:
            self.end_flagged(c)
        else:
            self.end(c, state, code)
        return "done"

    def release(self, e: str, fence: Fence, fault: str) -> str:
        c = self.fenced(e, fence)
        if c is None or c.state != "RUNNING":
            return "stale"
        self.lose(c, fault, "")
        return "released"

    def reconcile(self, e: str, incarnation: str, claimed: list[Fence]) -> tuple[list[Fence], set[str]] | None:
        if e not in self.engines or self.engines[e].incarnation != incarnation:
            return None
        here = self.running(e)
        known = {f.call_id for f in claimed if f.call_id in here and self.fenced(e, f)}
        return [f for f in claimed if not (f.call_id in here and self.fenced(e, f))], here - known

    def retire(self) -> None:
        """Retention under pressure: removes every finished call's record, and its entry on the stream."""
        for entry in self.left:
            self.take(entry)
        self.left.clear()
        for c in [c for c in self.calls.values() if not c.open]:
            self.forget(c.id)

    # -- the expected state of Redis

    def view(self) -> dict[str, Any]:
        return {
            "calls": {c.id: c.seen() for c in self.calls.values()},
            "stream": [(e.id, e.gen) for e in self.stream],
            "parked": set(self.parked),
            "queues": {e: self.queue(e) for e in self.engines},
            "work": {e: self.work(e) for e in self.engines},
            "starving": {e: {i for i in self.queue(e) if self.calls[i].level} for e in self.engines},
            "running": {e: self.running(e) for e in self.engines},
            "engines": {
                e: (x.incarnation, x.state, x.served, self.load(self.queue(e)), self.load(self.running(e)))
                for e, x in self.engines.items()
            },
            "listed": {e for e, x in self.engines.items() if x.listed},
            "sessions": {
                s: (x.counts, x.parent, x.service, x.waited, x.paid, x.engine) for s, x in self.sessions.items()
            },
            "open": {s: {c.id for c in self.calls.values() if c.session == s and c.open} for s in self.sessions},
            "deadlines": {c.id for c in self.calls.values() if c.timed},
            "logs": {c.id: [*c.log, *([c.state] * (not c.open))] for c in self.calls.values() if c.stream},
            "reported": sorted(self.reported),
            "solved": self.solved,
            "stats": self.stats,
            "usage": self.usage(),
        }

    def usage(self) -> tuple[int, int, Counter[str]]:
        """Unfinished calls and the bytes of their bodies, in total and by session."""
        still_open = [c for c in self.calls.values() if c.open]
        by_session: Counter[str] = Counter()
        for c in still_open:
            by_session[c.session] += c.size
        return len(still_open), sum(c.size for c in still_open), by_session
