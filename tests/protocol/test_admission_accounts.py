"""Random events with admission, in any order: the accounts are right, and no call is forgotten."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from rsm.broker import RequestState
from rsm.broker.protocol import codec
from rsm.broker.protocol.rules import tier_of
from rsm.broker.protocol.transitions import Claimed, Transitions
from tests.support.admission_world import CAPACITY, Rooms
from tests.support.fake_worker import FakeWorker
from tests.support.world import LONG_AGO, Fields, World

ENGINES = {"e1": "m", "e2": "m", "e3": "m2"}
MODELS = ("", "m", "m2")


class Walk:
    """Random events in a namespace of five sessions and three engines, and what must be true after each of them."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rooms = world, Rooms(world)
        self.random = random.Random(seed)
        self.calls: list[str] = []
        self.workers = {e: self.rooms.engine(e, model) for e, model in ENGINES.items()}
        self.events: list[Callable[[], object]] = [
            self.submit, self.submit, self.submit, self.place, self.place, self.place, self.place, self.claim,
            self.claim, self.finish, self.finish, self.finish, self.release, self.cancel, self.cancel_session, self.die,
            self.come_back, self.come_back, self.drain, self.tick, self.tick, self.expire, self.think, self.charge,
            self.end_session, self.starve, self.switch,
        ]  # fmt: skip

    def worker(self) -> FakeWorker:
        return self.random.choice(list(self.workers.values()))

    def session(self) -> str:
        return f"s{self.random.randint(1, 5)}"

    def in_hand(self) -> tuple[FakeWorker, Claimed] | None:
        found = [(w, c) for w in self.workers.values() for c in w.held.values()]
        return self.random.choice(found) if found else None

    # -- events

    def submit(self) -> None:
        call_id = f"c{len(self.calls):03}"
        self.calls.append(call_id)
        options: dict[str, Any] = {"session": call_id if self.random.random() < 0.2 else self.session()}
        options["prompt_tokens"] = self.random.choice([10, 200, 400, 700, 1500])
        options["priority"] = self.random.choice([0, 0, 0, -1, 1])
        options["model"] = self.random.choice(MODELS)
        options["on_engine_loss"] = self.random.choice(["continue", "continue", "fail"])
        if self.random.random() < 0.2:
            options["deadline_ms"] = 1 << 50
        self.world.submit(call_id, **options)

    def place(self) -> None:
        """Places some calls of the stream, as a router that only knows the sizes of contexts."""
        for call_id in self.random.sample(self.rooms.on_stream(), min(3, len(self.rooms.on_stream()))):
            self.place_one(call_id)

    def place_one(self, call_id: str) -> None:
        record = self.world.record(call_id)
        model, context = record["model"], codec.number(record["prompt_tokens"])
        engine = self.random.choice([e for e, serves in ENGINES.items() if model in ("", serves)])
        new = self.random.randint(0, context)
        self.rooms.place(call_id, context, engine, new, bind=self.random.random() < 0.2)

    def claim(self) -> None:
        worker = self.worker()
        if worker.claim(self.random.randint(1, 4)) is None:
            worker.held.clear()

    def finish(self) -> None:
        if found := self.in_hand():
            state = self.random.choice([RequestState.COMPLETED, RequestState.COMPLETED, RequestState.FAILED])
            found[0].finish(found[1], state=state, resident_tokens=self.random.choice([0, 50, 900]), service=300)

    def release(self) -> None:
        if found := self.in_hand():
            found[0].release(found[1], fault=self.random.random() < 0.5, death=self.random.random() < 0.3)

    def cancel(self) -> None:
        if self.calls:
            self.world.cancel(self.random.choice(self.calls))

    def cancel_session(self) -> None:
        if self.random.random() < 0.2:
            self.world.cancel_session(self.session())

    def die(self) -> None:
        """Its calls are moved a few at a time."""
        if self.random.random() < 0.3:
            self.world.lapse(self.worker().engine)
            small = Transitions(self.world.keys, self.world.settings.model_copy(update={"batch": 2}))
            while self.world.run(small.reap()).moved == 2:
                self.check()

    def come_back(self) -> None:
        engine = self.worker().engine
        self.world.lapse(engine)
        self.workers[engine] = self.rooms.engine(engine, ENGINES[engine])

    def drain(self) -> None:
        if self.random.random() < 0.2:
            self.world.run(self.world.transitions.drain(self.worker().engine))

    def tick(self) -> None:
        self.rooms.admit()
        for model in MODELS:
            self.world.run(self.world.transitions.unpark(model))

    def expire(self) -> None:
        due = [codec.text(c) for c in self.world.db.zrange(self.world.keys.deadlines, 0, -1)]
        if due:
            self.world.db.zadd(self.world.keys.deadlines, {self.random.choice(due): LONG_AGO})
            self.world.run(self.world.transitions.expire())

    def think(self) -> None:
        if self.world.db.exists(self.world.keys.residents(engine := self.worker().engine)):
            self.rooms.think(engine, self.random.choice([1, 5, 20]))

    def charge(self) -> None:
        self.world.charge(self.session(), self.random.choice([500, 5_000]))

    def end_session(self) -> None:
        self.world.run(self.world.transitions.session("end", self.session()))

    def starve(self) -> None:
        if held := [c for m in MODELS for c in self.rooms.held(m)]:
            call_id = self.random.choice(held)
            self.rooms.age(call_id, 30_000, self.world.record(call_id)["model"])

    def switch(self) -> None:
        """Admission is switched off for a moment, or by one router of several."""
        if self.random.random() < 0.2:
            self.rooms.use(admission=False)
            self.place()
            self.tick()
            self.rooms.use(admission=True)

    def bring_to_an_end(self) -> None:
        for engine in self.workers:
            self.come_back_as(engine)
        for _ in range(1000):
            self.tick()
            for call_id in self.rooms.on_stream():
                self.place_one(call_id)
            for worker in self.workers.values():
                for call in worker.claim(100) or ():
                    assert worker.finish(call, resident_tokens=100) == "done"
            if not self.unfinished():
                return
        raise AssertionError(f"these wait for ever: {self.unfinished()}")

    def come_back_as(self, engine: str) -> None:
        self.world.lapse(engine)
        self.workers[engine] = self.rooms.engine(engine, ENGINES[engine])

    # -- what must be true

    def unfinished(self) -> dict[str, Fields]:
        records = {c: self.world.record(c) for c in self.calls}
        return {c: r for c, r in records.items() if r["state"] in ("PENDING", "RUNNING")}

    def check(self) -> None:
        open_ = self.unfinished()
        counted = {c: r for c, r in open_.items() if r["engine"] and r["context"]}
        self.check_accounts(counted)
        self.check_places(open_)

    def check_accounts(self, counted: dict[str, Fields]) -> None:
        """The counted calls and tokens are those that exist."""
        db, keys = self.world.db, self.world.keys
        by_home = Counter((r["session"], r["engine"]) for r in counted.values())
        shares = {s: self.rooms.shares(s) for s in {f"s{n}" for n in range(1, 6)} | set(self.calls)}
        active = {(s, e): share for s, by_engine in shares.items() for e, share in by_engine.items() if share[0]}
        assert {home: share[0] for home, share in active.items()} == by_home
        for engine in ENGINES:
            calls = sum(n for (_, e), n in by_home.items() if e == engine)
            tokens = sum(share[1] for (_, e), share in active.items() if e == engine)
            if calls or db.exists(keys.residents(engine)):
                assert self.rooms.account(engine)[:2] == (calls, tokens), engine

    def check_places(self, open_: dict[str, Fields]) -> None:
        """Every waiting call without an engine is in exactly one place, the one that its record says."""
        held = [c for m in MODELS for c in self.rooms.held(m)]
        parked = [codec.text(c) for m in MODELS for c in self.world.db.zrange(self.world.keys.parked(m), 0, -1)]
        stream = [c for c in self.rooms.on_stream() if c in open_]  # those of ended calls go when they are read
        found = Counter([*held, *parked, *stream])
        assert found == Counter(c for c, r in open_.items() if not r["engine"])
        models = {codec.text(m) for m in self.world.db.smembers(self.world.keys.holding)}
        for model in MODELS:
            here = self.rooms.held(model)
            assert all(open_[c]["model"] == model for c in here)
            assert not here or model in models
            starving = {codec.text(c) for c in self.world.db.zrange(self.world.keys.held_starving(model), 0, -1)}
            assert starving == {c for c in here if open_[c]["level"]}


@pytest.mark.parametrize("seed", range(8))
def test_the_accounts_are_right_and_all_calls_end(world: World, seed: int) -> None:
    walk = Walk(world, seed)
    for _ in range(150):
        walk.random.choice(walk.events)()
        walk.check()
    walk.bring_to_an_end()
    walk.check()
    assert world.stat("held") > 1, "the test has throttled calls"
    assert [rooms for e in ENGINES if (rooms := walk.rooms.account(e)[:2]) != (0, 0)] == []
    for model in MODELS:
        assert not world.db.exists(world.keys.held(model), world.keys.held_starving(model))


@pytest.mark.parametrize("seed", range(4))
def test_no_engine_has_more_than_fits(world: World, seed: int) -> None:
    """In one tier, in any order and from any router: at most what its cache can hold, or one large call."""
    rooms, chance = Rooms(world), random.Random(seed)
    workers = [rooms.engine(e) for e in ("e1", "e2")]
    for n in range(150):
        rooms.bring(f"c{n:03}", chance.choice([100, 300, 600, 1200]), chance.choice(["e1", "e2"]), session=f"s{n}")
        worker = chance.choice(workers)
        worker.claim(2)
        if worker.held and chance.random() < 0.8:
            worker.finish(chance.choice(list(worker.held.values())), resident_tokens=0, service=0)
        for call_id in rooms.on_stream():
            tokens = codec.number(world.record(call_id)["prompt_tokens"])
            rooms.place(call_id, tokens, chance.choice(["e1", "e2"]))
        for e in ("e1", "e2"):
            calls, tokens, _ = rooms.account(e)
            assert tier_of(0, 0) == 0
            assert tokens <= CAPACITY or calls == 1
