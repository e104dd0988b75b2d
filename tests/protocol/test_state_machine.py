"""The scripts against the reference model: producers, two routers, two engines and their zombies, in any order.

RSM_TEST_MODEL_EXAMPLES=N runs N random walks (`make model`). Without it the walks are the same in each run.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import fakeredis
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import settings as profile_of
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from chaos.leaks import LASTING
from rsm.broker import RequestState, Settings
from rsm.broker.client.request import build
from rsm.broker.client.session_tree import TreeCancel
from rsm.broker.connection import execute
from rsm.broker.connection.factory import connect
from rsm.broker.protocol import codec
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.keys import ROUTER_GROUP, Keys
from rsm.broker.protocol.models import CallRequest
from rsm.broker.protocol.scripts import Command, T
from rsm.broker.protocol.transitions import Claimed, Event, Fault, Finish, Placement, Rejection, Release, Transitions
from rsm.broker.protocol.waiting_calls import WaitingCall
from rsm.router.intake import Arrival, read_entry
from tests.support.reference.model import Model
from tests.support.reference.records import NEVER, Call, Entry
from tests.support.reference.view import AGE, look, texts

EXAMPLES = int(os.environ.get("RSM_TEST_MODEL_EXAMPLES", "0"))
CALLS, SESSIONS, ENGINES, ROUTERS = ("c1", "c2", "c3", "c4"), ("s1", "s2", "s3"), ("e1", "e2"), ("A", "B")
TOKENS = dict(zip(CALLS, (1, 20, 300, 4000), strict=True))
LONG_AGO, FAR_AWAY = 1, 1 << 50
LEASE_MS = 600_000  # leases expire only by `lapse`
BODY = '{"prompt":"hi"}'

call_ids, sessions, engines, routers = map(st.sampled_from, (CALLS, SESSIONS, ENGINES, ROUTERS))
latest = st.sampled_from((0, 0, 0, 1, 2, 5))
which = st.integers(0, 5)  # picks from a list of any length
FAULTS: tuple[Fault, ...] = ("death", "error", "")
parents = st.sampled_from((*("",) * 5, *SESSIONS))
losses = st.sampled_from(("continue", "continue", "restart", "fail"))
reuses = st.sampled_from((0, 0, 10, 250))
limits = st.sampled_from((100, 1))
choices = st.lists(st.sampled_from(("e1", "e1", "e2", "e2", "")), min_size=1, max_size=3)
rarely = st.integers(0, 7).map(lambda n: n == 7)


def when(what: Callable[[Protocol], object]) -> Callable[[Any], Any]:
    """Skips a rule that would do nothing.

    It is no `precondition`: Hypothesis sometimes repeats a walk, and reports an error if other rules apply then. But
    the order of calls depends on the clock: two calls of one millisecond are ordered by their ids.
    """

    def only(step: Callable[..., None]) -> Callable[..., None]:
        @wraps(step)
        def tried(machine: Protocol, *given: Any, **drawn: Any) -> None:
            if what(machine):
                step(machine, *given, **drawn)

        return tried

    return only


def any_call(wanted: Callable[[Call], object]) -> Callable[[Any], Any]:
    return when(lambda m: any(wanted(c) for c in m.model.calls.values()))


def pick(items: list[T], n: int) -> T | None:
    """Small numbers pick the latest."""
    return items[-1 - n % len(items)] if items else None


class Protocol(RuleBasedStateMachine):
    def __init__(self, db: Any, config: Settings) -> None:
        super().__init__()
        self.db = db
        bounds: dict[str, Any] = {"max_open_calls": len(CALLS) - 1, "max_attempts": 2, "max_deaths": 2}
        bounds |= {"starvation_beta": AGE // 1000 - 1}  # a call starves only after it has waited for an age
        bounds |= {"level_bounds": (15, 1000)}  # one call is enough for the second level
        self.config = config.model_copy(update={"namespace": f"m{new_id()}", "lease_ms": LEASE_MS, **bounds})
        self.keys = Keys(self.config.namespace)
        self.transitions = Transitions(self.keys, self.config)
        self.model = Model(SESSIONS, self.config)
        self.hands: dict[str, list[Any]] = {r: [] for r in ROUTERS}  # what each router has read, not placed
        self.grants: list[tuple[str, Claimed]] = []  # every claim that a worker got, with its engine
        self.workers: list[tuple[str, str]] = []  # every incarnation, with its engine
        self.seen_waiting: list[WaitingCall] = []  # every call that routers have seen in queues
        self.claims: Counter[str] = Counter()  # the latest claim number of an incarnation
        self.fences: dict[tuple[str, str], int] = {}
        self.lapses = 0
        db.xgroup_create(self.keys.calls, ROUTER_GROUP, id="0", mkstream=True)
        seconds, _ = db.time()
        self.start_ms = seconds * 1000

    def run(self, command: Command[T]) -> T:
        return execute.run(self.db, command)

    # -- producers

    def known(self, r: CallRequest, digest: str, gen: str, size: int = 0) -> Call:
        timed, due = r.deadline_ms is not None, r.deadline_ms == LONG_AGO
        fields = (r.priority, r.prompt_tokens, r.stream, timed, due, size, r.on_engine_loss)
        return Call(r.id, gen, r.session, digest, *fields)

    @rule(
        call_id=call_ids, session=sessions, prompt=st.sampled_from(("hi",) * 7 + ("other",)), stream=st.booleans(),
        priority=st.sampled_from((0, 0, -1)), deadline=st.sampled_from((None, None, FAR_AWAY, FAR_AWAY, LONG_AGO)),
        on_engine_loss=losses, parent=parents,
    )  # fmt: skip
    def submit(self, call_id: str, session: str, prompt: str, parent: str = "", **options: Any) -> None:
        deadline = options.pop("deadline")
        call = build(
            prompt, max_body_bytes=1 << 20, id=call_id, session=session, inbox="box", prompt_tokens=TOKENS[call_id],
            deadline_ms=deadline, parent_session=parent, **options,
        )  # fmt: skip
        reply = self.run(self.transitions.submit([call]))[0]
        gen = self.entries()[-1][0] if reply.code == "new" else ""
        expected = self.model.submit(self.known(call.request, call.digest, gen, len(call.body)), parent)
        assert (reply.code, reply.state or "") == expected

    @rule(call_id=call_ids, session=sessions, body=st.sampled_from((BODY, BODY, "junk")), parent=parents)
    def push(self, call_id: str, session: str, body: str, parent: str) -> None:
        fields = {"id": call_id, "session": session, "json": body, "inbox": "box", "prompt_tokens": TOKENS[call_id]}
        fields |= {"parent_session": parent} if parent else {}
        name = codec.text(self.db.xadd(self.keys.calls, fields))
        self.model.stream.append(Entry(call_id, "", name))

    @rule(call_id=call_ids)
    @when(lambda m: m.model.stream or any(c.open for c in m.model.calls.values()))
    def cancel(self, call_id: str) -> None:
        assert self.run(self.transitions.cancel(call_id, "enough")) == self.model.cancel(call_id)

    @rule(session=sessions, descendants=st.booleans())
    @any_call(lambda c: c.open)
    def cancel_session(self, session: str, descendants: bool) -> None:
        cancelled = self.model.cancel_session(session, descendants)
        tree = TreeCancel(self.transitions, session, "enough", descendants)
        while command := tree.command():
            tree.take(self.run(command))
        assert tree.ended == cancelled

    @rule(call_id=call_ids)
    @when(lambda m: m.model.notes or any(not c.open for c in m.model.calls.values()))
    def forget(self, call_id: str) -> None:
        """The record and log of a finished call expire, or the note of a cancel does."""
        if call_id not in self.model.calls or not self.model.calls[call_id].open:
            self.db.delete(self.keys.call(call_id), self.keys.events(call_id))
            self.model.forget(call_id)

    # -- time

    @rule(call_id=call_ids)
    @any_call(lambda c: c.timed and not c.due)
    def pass_deadline(self, call_id: str) -> None:
        call = self.model.calls.get(call_id)
        if call and call.timed:
            call.due = True
            self.db.hset(self.keys.call(call_id), "deadline_ms", LONG_AGO)
            self.db.zadd(self.keys.deadlines, {call_id: LONG_AGO})

    @rule(call_id=call_ids)
    @any_call(lambda c: c.level and c.state == "PENDING")
    def starve(self, call_id: str) -> None:
        """A waiting call of a lower level has waited too long."""
        call = self.model.calls.get(call_id)
        if call and call.level and call.state == "PENDING":
            call.starves = True
            self.db.zadd(self.keys.starving(call.engine), {call_id: LONG_AGO})

    @rule(call_id=call_ids, session=sessions, parent=parents, e=engines, worn=rarely, starve=st.booleans())
    def live(self, call_id: str, session: str, parent: str, e: str, worn: bool, starve: bool) -> None:
        """The whole life of a call, as one of a sequential program's. It may wait for too long."""
        self.forget(call_id)
        if worn:
            self.wear_out(session, True)
        self.submit(call_id, session, "hi", parent, deadline=FAR_AWAY, priority=0, on_engine_loss="continue")
        self.route("A", e)
        if starve:
            self.starve(call_id)
        self.claim([w for w, _ in reversed(self.workers)].index(e), 10)
        self.finish([0], "COMPLETED", 5, False)

    @rule(session=sessions, really=rarely)
    @when(lambda m: any(s.service for s in m.model.sessions.values()))
    def wear_out(self, session: str, really: bool) -> None:
        """A program has waited for an age."""
        program = self.model.lineage(session)[-1]
        if really:
            self.model.sessions[program].waited += 1
            self.db.hincrby(self.keys.session(program), "waited_ms", AGE)
            self.db.expire(self.keys.session(program), self.config.session_ttl_s)

    @rule(e=engines)
    def come_back(self, e: str) -> None:
        """A worker comes back before any router has noticed the death of its predecessor."""
        self.lapse(e)
        self.come(e)

    @rule(e=engines, long_ago=st.booleans())
    def lapse(self, e: str, long_ago: bool = False) -> None:
        """The lease of an engine expires."""
        engine = self.model.engines.get(e)
        if engine and engine.listed:
            self.lapses += 1
            engine.beat = (LONG_AGO if long_ago else self.start_ms - 2 * LEASE_MS) + self.lapses
            self.db.zadd(self.keys.engines, {e: engine.beat})

    # -- routers

    @rule(router=routers, count=st.integers(1, 4))
    def read(self, router: str, count: int) -> None:
        for _, entries in self.db.xreadgroup(ROUTER_GROUP, router, {self.keys.calls: ">"}, count=count):
            self.hand(router, entries)

    @rule(router=routers)
    def take_over(self, router: str) -> None:
        """Takes over the entries of the other router and its own. The other router may still place the ones it has."""
        self.hands[router].clear()
        self.hand(router, self.db.xautoclaim(self.keys.calls, ROUTER_GROUP, router, 0)[1])

    def hand(self, router: str, entries: Any) -> None:
        read = [read_entry(codec.text(e), f, self.config.max_body_bytes) for e, f in entries if f]
        self.hands[router] += read

    @rule(router=routers, e=engines)
    def route(self, router: str, e: str) -> None:
        self.read(router, 4)
        self.place(router, [e] * 4, False, "", False, 0)

    @rule(router=routers, chosen=choices, bind=st.booleans(), seen=engines, again=rarely, reuse=reuses)
    @when(lambda m: any(m.hands.values()))
    def place(self, router: str, chosen: list[str], bind: bool, seen: str, again: bool, reuse: int) -> None:
        """Accepts, rejects and assigns a batch like Router._place. again: the batch may be repeated (a lost reply)."""
        batch = self.hands[router][: len(chosen)]
        arrivals = [a for a in batch if isinstance(a, Arrival)]
        self.refuse([r for r in batch if isinstance(r, Rejection)])
        self.accept(arrivals)
        placements = [
            Placement(a.entry, a.call_id, a.gen, e, bind, seen, None, "the model says so", reuse)
            for a, e in zip(arrivals, chosen, strict=False)
        ]
        self.sync()
        placed = [self.model.assign(p.entry, p.call_id, p.gen or p.entry, *p[3:6], p.reuse) for p in placements]
        if placements:
            assert self.run(self.transitions.assign(placements)) == placed
        left = [a for a, (code, _) in zip(arrivals, placed, strict=True) if code == "unplaced"]
        self.hands[router] = (batch if again else left) + self.hands[router][len(batch) :]

    def accept(self, arrivals: list[Arrival]) -> None:
        raw = [a.raw for a in arrivals if a.raw]
        codes = [
            self.model.accept(a.entry, self.known(a.request, a.digest, a.entry, len(BODY)), a.request.parent_session)
            for a in raw
        ]
        if raw:
            assert self.run(self.transitions.accept(raw)) == codes

    def refuse(self, rejections: list[Rejection]) -> None:
        codes = []
        for r in rejections:
            request = CallRequest(id=r.call_id, session=r.session, inbox="box")
            codes.append(self.model.reject(r.entry, r.gen or r.entry, self.known(request, "", r.entry)))
        if rejections:
            assert self.run(self.transitions.reject(rejections)) == codes

    @rule(router=routers)
    @when(lambda m: any(m.hands.values()))
    def no_engine(self, router: str) -> None:
        """The router finds no engine for the model of the next call."""
        batch = self.hands[router][:1]
        self.hands[router] = self.hands[router][1:]
        for a in batch:
            if isinstance(a, Arrival):
                self.accept([a])
                self.refuse(
                    [Rejection(a.entry, a.call_id, a.gen, "s1", "box", "invalid_request", "No engine serves it.")]
                )

    @rule()
    @any_call(lambda c: not c.open)
    def retain(self) -> None:
        """Finished calls use too many bytes."""
        none = Transitions(self.keys, self.config.model_copy(update={"max_retained_bytes": 1}))
        while self.run(none.retain()).entries:
            pass
        self.model.retire()

    @rule(limit=limits)
    @when(lambda m: any(x.beat < NEVER for x in m.model.engines.values()))
    def reap(self, limit: int) -> None:
        small = Transitions(self.keys, self.config.model_copy(update={"batch": limit}))
        expected = self.model.reap(limit, self.claimed())
        assert self.run(small.reap()) == expected

    @rule(n=which, limit=limits, really=rarely)
    def report_death(self, n: int, limit: int, really: bool) -> None:
        """A supervisor reports a death, perhaps late."""
        worker = pick(self.workers, n)
        if worker and really:
            small = Transitions(self.keys, self.config.model_copy(update={"batch": limit}))
            expected = self.model.reap(limit, self.claimed(), *worker)
            assert self.run(small.reap(*worker)) == expected

    @rule()
    @any_call(lambda c: c.timed and c.due)
    def expire(self) -> None:
        assert self.run(self.transitions.expire("A")) == self.model.expire()

    @rule()
    @when(lambda m: m.model.parked)
    def unpark(self) -> None:
        expected = self.model.unpark()
        assert self.run(self.transitions.unpark("")) == expected

    @rule(e=engines, limit=limits, op=st.sampled_from(("drain", "stop")), really=rarely)
    def drain(self, e: str, limit: int, op: str, really: bool) -> None:
        if not really:
            return
        small = Transitions(self.keys, self.config.model_copy(update={"batch": limit}))
        assert self.run(small.drain(e, op)) == self.model.drain(e, limit)

    @rule(e=engines, most=st.integers(1, 3), later=st.booleans())
    @any_call(lambda c: c.state == "PENDING" and c.engine)
    def look_for_work(self, e: str, most: int, later: bool) -> None:
        """A router reads the calls that wait for an engine, and takes some at once, later, or never."""
        found = self.run(self.transitions.waiting([], [e], most)).calls
        suspects = {i for i in self.model.queue(e)[:most] if self.model.suspect(self.model.calls[i])}
        assert [(c.id, c.moves) for c in found] == [
            (i, self.model.calls[i].moves) for i in self.model.queue(e)[:most] if i not in suspects
        ]
        self.seen_waiting += found
        if not later:
            self.steal_these(found)

    @rule(call_id=call_ids, session=sessions, e=engines, seen=engines, bind=st.booleans(), later=st.booleans())
    def come_and_be_taken(self, call_id: str, session: str, e: str, seen: str, bind: bool, later: bool) -> None:
        """A call arrives, and waits for an engine that looks loaded."""
        self.forget(call_id)
        self.submit(call_id, session, "hi", deadline=FAR_AWAY, priority=0, on_engine_loss="continue")
        self.read("A", 4)
        self.place("A", [e] * 4, bind, seen, False, 0)
        self.look_for_work(e, 3, later)

    @rule(n=which, more=which)
    @when(lambda m: m.seen_waiting)
    def steal(self, n: int, more: int) -> None:
        self.steal_these([c for c in (pick(self.seen_waiting, n), pick(self.seen_waiting, more)) if c])

    def steal_these(self, chosen: list[WaitingCall]) -> None:
        expected = [self.model.steal(c.id, c.gen, c.engine, c.moves) for c in chosen]
        assert self.run(self.transitions.steal(chosen)) == expected

    # -- workers; each may be a zombie, and may repeat a command

    @initialize()
    def two_engines(self) -> None:
        for e in ENGINES:
            self.come(e)

    @rule(e=engines)
    def come(self, e: str) -> None:
        """A worker starts: the first one of an engine, a second one, or one after a death."""
        worker = (e, new_id())
        if self.register(worker):
            self.workers.append(worker)
            self.beat_as(worker, "READY")

    def register(self, worker: tuple[str, str]) -> bool:
        expected = self.model.register(*worker, self.claimed().get(worker[0], []))
        assert self.run(self.transitions.register(*worker, {"model": "m"})).ok is expected
        return expected

    @rule(n=which, really=rarely)
    def register_again(self, n: int, really: bool) -> None:
        """The reply was lost."""
        worker = pick(self.workers, n)
        if worker and really:
            self.register(worker)

    def beat_as(self, worker: tuple[str, str], state: str) -> None:
        assert self.run(self.transitions.heartbeat(*worker, state, {})) is self.model.heartbeat(*worker, state)

    @rule(n=which, state=st.sampled_from(("READY",) * 7 + ("STARTING", "DRAINING", "STOPPED")))
    def beat(self, n: int, state: str) -> None:
        worker = pick(self.workers, n)
        if worker:
            self.beat_as(worker, state)

    @rule(
        n=which,
        most=st.sampled_from((0, 1, 2, 10)),
        again=st.sampled_from((False, False, False, True)),
        ahead=st.sampled_from((0, 0, 2)),
        threshold=st.sampled_from(((0, 1), (0, 0), (5, 2))),
    )
    def claim(
        self, n: int, most: int, again: bool = False, ahead: int = 0, threshold: tuple[int, int] = (0, 0)
    ) -> None:
        worker = pick(self.workers, n)
        if worker is None:
            return
        e, incarnation = worker
        if not (again and self.claims[incarnation]):
            self.claims[incarnation] += 1
        number = self.claims[incarnation]
        expected = self.model.claim(e, incarnation, number, most, ahead, threshold)
        claimed = self.run(self.transitions.claim(e, incarnation, number, most, ahead, threshold))
        assert (claimed is None) is (expected is None)
        for got, c in zip(claimed or [], expected or [], strict=True):
            f = got.fence
            assert (f.call_id, f.gen, f.attempt, got.events) == (c.id, c.gen, c.attempt, len(c.log))
            assert (got.session, got.level, got.cancelled) == (c.session, c.level, bool(c.cancel))
            assert (got.on_engine_loss, got.begins) == (c.on_engine_loss, c.begins)
            waited = 0 if c.promoted else max(0, c.waited - c.paid)
            assert (got.inherited, got.waited_ms // AGE) == (c.inherited, waited)
        self.grants += [(e, c) for c in claimed or []]

    @rule(call_id=call_ids, session=sessions, e=engines, on_engine_loss=losses, stream=rarely.map(lambda n: not n))
    def start(self, call_id: str, session: str, e: str, **options: Any) -> None:
        """What most calls do, with a new id or a reused one."""
        self.forget(call_id)
        self.submit(call_id, session, "hi", deadline=FAR_AWAY, priority=0, **options)
        self.route("A", e)
        self.claim([w for w, _ in reversed(self.workers)].index(e), 10)

    def granted(self, n: int, elsewhere: bool) -> tuple[str, Claimed] | None:
        """A claim, the running ones first, and the engine that acts on it, which is sometimes another one."""
        running = {(c.id, c.gen, c.attempt) for c in self.model.calls.values() if c.state == "RUNNING"}
        self.grants.sort(key=lambda g: (g[1].fence.call_id, g[1].fence.gen, g[1].fence.attempt) in running)
        grant = pick(self.grants, n)
        if grant is None or not elsewhere:
            return grant
        return ("e2" if grant[0] == "e1" else "e1"), grant[1]

    @rule(
        n=latest,
        back=st.sampled_from((0, 0, 0, 1, -1)),
        count=st.integers(1, 3),
        elsewhere=rarely,
    )
    @when(lambda m: m.grants)
    def publish(self, n: int, back: int, count: int, elsewhere: bool) -> None:
        grant = self.granted(n, elsewhere)
        if grant is None or not grant[1].stream:
            return
        e, claimed = grant
        first = max(0, self.events(claimed) - back)
        events = [Event(claimed.fence, first + i, f"{claimed.fence}", (), "", "") for i in range(count)]
        expected = [self.model.publish(e, ev.fence, ev.n, ev.text) for ev in events]
        assert self.run(self.transitions.publish(e, events)) == expected

    @rule(
        picks=st.lists(latest, min_size=1, max_size=3), state=st.sampled_from(("COMPLETED", "COMPLETED", "FAILED")),
        completion=st.sampled_from((5, 600)), elsewhere=rarely, lost=rarely,
    )  # fmt: skip
    @when(lambda m: m.grants)
    def finish(self, picks: list[int], state: str, completion: int, elsewhere: bool, lost: bool = False) -> None:
        """lost: Redis has forgotten the last event."""
        grants = [g for g in (self.granted(n, elsewhere) for n in picks) if g]
        code, service = "engine_error" if state == "FAILED" else "", 10 + 2 * completion
        for e in {g[0] for g in grants}:
            ends = [
                Finish(
                    c.fence, RequestState(state), code, "", b"\x80", 10, completion, 0, 0, self.events(c, lost), service
                )
                for at, c in grants
                if at == e
            ]
            expected = [self.model.finish(e, end.fence, state, code, service, end.events or 0) for end in ends]
            assert self.run(self.transitions.finish(e, ends)) == expected

    def events(self, claimed: Claimed, one_more: bool = False) -> int:
        call = self.model.calls.get(claimed.fence.call_id)
        return (len(call.log) if call else 0) + one_more

    @rule(n=which, forgotten=which)
    def reconcile(self, n: int, forgotten: int) -> None:
        """A worker compares its calls with Redis. It may have forgotten some of its latest ones."""
        worker = pick(self.workers, n)
        if worker:
            e, incarnation = worker
            held = [c.fence for at, c in self.grants if at == e][-forgotten:]
            expected = self.model.reconcile(e, incarnation, held)
            differences = self.run(self.transitions.reconcile(e, incarnation, held))
            seen = differences and (differences.lost, {f.call_id for f in differences.unknown})
            assert seen == expected

    @rule(
        picks=st.lists(latest, min_size=1, max_size=2),
        fault=st.sampled_from(FAULTS),
        elsewhere=rarely,
    )
    @when(lambda m: m.grants)
    def release(self, picks: list[int], fault: Fault, elsewhere: bool) -> None:
        grants = [g for g in (self.granted(n, elsewhere) for n in picks) if g]
        for e in {g[0] for g in grants}:
            releases = [Release(c.fence, fault, "engine_error", "") for at, c in grants if at == e]
            expected = [self.model.release(e, r.fence, fault) for r in releases]
            assert self.run(self.transitions.release(e, releases)) == expected

    # -- what must be true after each step

    @invariant()
    def redis_is_as_the_model_says(self) -> None:
        self.sync()
        seen, expected = look(self.db, self.keys, CALLS, ENGINES, SESSIONS).view(), self.model.view()
        assert seen == expected
        for c in self.model.calls.values():
            assert c.attempt >= self.fences.get((c.id, c.gen), 0), "a fence went back"
            self.fences[c.id, c.gen] = c.attempt
            if c.state == "PENDING" and not c.engine:
                on_stream = any(e.id == c.id and c.gen in (e.gen, e.name) for e in self.model.stream)
                assert on_stream or c.id in self.model.parked, "a call is lost"
            else:
                assert c.id not in self.model.parked, "a call that does not wait is parked"
        ends = Counter((i, gen) for i, gen, _ in self.model.reported if (i, gen) not in self.model.forgotten)
        assert all(n == 1 for n in ends.values()), "an end was reported twice"

    @invariant()
    def nothing_lasts_that_should_expire(self) -> None:
        names = [codec.text(k) for k in self.db.keys(f"{self.keys.prefix}*")]
        pipe = self.db.pipeline(transaction=False)
        for name in names:
            pipe.ttl(name)
        lasting = [n.removeprefix(self.keys.prefix) for n, ttl in zip(names, pipe.execute(), strict=True) if ttl == -1]
        still_open = {c.id for c in self.model.calls.values() if c.open}
        open_keys = {f"call:{i}{tail}" for i in still_open for tail in ("", ":events")}
        assert not [n for n in lasting if n not in open_keys and not LASTING.fullmatch(n)]

    def entries(self) -> list[tuple[str, dict[str, str]]]:
        return [(codec.text(e), texts(f)) for e, f in self.db.xrange(self.keys.calls)]

    def claimed(self) -> dict[str, list[str]]:
        return {e: [codec.text(c) for c in self.db.zrange(self.keys.running(e), 0, -1)] for e in ENGINES}

    def sync(self) -> None:
        """Copies to the model the ids that Redis gave to entries, and the times of arrival."""
        for entry, (name, _) in zip(self.model.stream, self.entries(), strict=True):
            assert entry.name in ("", name)
            entry.name = name
        for c in self.model.calls.values():
            if not c.arrival:
                c.arrival = codec.number(self.db.hget(self.keys.call(c.id), "submitted_ms"))

    # -- the end

    def teardown(self) -> None:
        try:
            if sys.exception() is None:
                self.heal()
        finally:
            self.db.delete(*self.db.keys(f"{self.keys.prefix}*"), self.keys.calls)

    def heal(self) -> None:
        """There are no more faults from now on, so every call must end."""
        for e in ENGINES:
            self.lapse(e)
        self.reap(1000)
        self.come("e1")
        for _ in range(2 * len(CALLS)):
            self.unpark()
            self.take_over("A")
            self.read("A", 100)
            while self.hands["A"]:
                self.place("A", ["e1"], False, "e1", False, 0)
            self.claim(0, 100)
            for n in range(min(len(self.grants), 2 * len(CALLS))):
                self.finish([n], "COMPLETED", 5, False)
        self.redis_is_as_the_model_says()
        assert not [c for c in self.model.calls.values() if c.open], "a call did not end"


@pytest.fixture(params=["server", "fakeredis"])
def world(request: pytest.FixtureRequest, settings: Settings) -> Iterator[tuple[Any, int]]:
    """A server, and how many walks to run on it; fewer on fakeredis, which is slow."""
    db = connect(settings) if request.param == "server" else fakeredis.FakeRedis(server_type="valkey", version=(7, 2))
    yield db, 80 if request.param == "server" else 6
    db.close()


@pytest.mark.timeout(0 if EXAMPLES else 300)
def test_whatever_happens_redis_is_as_the_model_says(world: tuple[Any, int], settings: Settings) -> None:
    """A failure prints its steps and a blob for `@reproduce_failure`; a random run (`make model`) shrinks them, too."""
    db, examples = world
    profile = profile_of(
        max_examples=EXAMPLES or examples,
        stateful_step_count=80,
        derandomize=not EXAMPLES,
        phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: Protocol(db, settings), settings=profile)  # type: ignore[arg-type]  # a factory
