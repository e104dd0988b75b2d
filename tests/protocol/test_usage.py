"""Random events in any order: the usage counters are right, and under pressure no data stays."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from rsm.broker import RequestState
from rsm.broker.protocol import codec
from rsm.broker.protocol.transitions import Claimed, Transitions
from tests.support.fake_worker import FakeWorker
from tests.support.world import LONG_AGO, World, texts


class Walk:
    """Random events in a namespace of three sessions and three engines, and what must be true after each of them."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.weights: dict[str, int] = {}
        self.workers = {e: world.worker(e) for e in ("e1", "e2", "e3")}
        self.stale: list[Claimed] = []
        self.events: list[Callable[[], object]] = [
            self.submit, self.submit, self.push, self.assign, self.assign, self.assign, self.claim, self.claim,
            self.publish, self.finish, self.finish, self.finish_late, self.release, self.cancel, self.cancel_session,
            self.die, self.come_back, self.drain, self.unpark, self.expire,
        ]  # fmt: skip

    def worker(self) -> FakeWorker:
        return self.random.choice(list(self.workers.values()))

    def any_running(self) -> tuple[FakeWorker, Claimed] | None:
        found = [(w, c) for w in self.workers.values() for c in w.held.values()]
        return self.random.choice(found) if found else None

    def _new(self) -> tuple[str, dict[str, Any]]:
        call_id = f"c{len(self.weights)}"
        self.weights[call_id] = self.random.randint(1, 100)
        options = {"session": f"s{self.random.randint(1, 3)}", "inbox": "box", "prompt_tokens": self.weights[call_id]}
        options["stream"] = self.random.random() < 0.5
        options["on_engine_loss"] = self.random.choice(["continue", "continue", "restart", "fail"])
        if self.random.random() < 0.2:
            options["deadline_ms"] = self.random.choice([LONG_AGO, 1 << 50])
        return call_id, options

    def submit(self) -> None:
        call_id, options = self._new()
        self.world.submit(call_id, **options)

    def push(self) -> None:
        call_id, options = self._new()
        self.world.accept(self.world.push(call_id), call_id, **options)

    def assign(self) -> None:
        entries = self.world.stream()
        if entries:
            call_id = self.random.choice(entries)[1]["id"]
            engine = self.random.choice([*self.workers, *self.workers, ""])
            self.world.assign(call_id, engine, bind=self.random.random() < 0.3)

    def claim(self) -> None:
        worker = self.worker()
        if worker.claim(self.random.randint(1, 4)) is None:
            self.stale += worker.held.values()
            worker.held.clear()

    def publish(self) -> None:
        found = self.any_running()
        if found and found[1].stream:
            found[0].publish(found[1], "a", first=self.world.record(found[1].fence.call_id).ints("events")[0])

    def finish(self) -> None:
        found = self.any_running()
        if found:
            state = self.random.choice([RequestState.COMPLETED, RequestState.COMPLETED, RequestState.FAILED])
            found[0].finish(found[1], state=state, resident_tokens=self.random.choice([0, 50]))
            self.stale.append(found[1])

    def finish_late(self) -> None:
        if self.stale:
            late = self.random.choice(self.stale)
            assert self.worker().finish(late) in ("stale", "again")
            assert self.worker().publish(late, "late", first=99) == ["stale"]

    def release(self) -> None:
        found = self.any_running()
        if found:
            found[0].release(found[1], fault=self.random.random() < 0.5, death=self.random.random() < 0.3)
            self.stale.append(found[1])

    def cancel(self) -> None:
        if self.weights:
            self.world.cancel(self.random.choice(list(self.weights)))

    def cancel_session(self) -> None:
        if self.random.random() < 0.2:
            self.world.cancel_session(f"s{self.random.randint(1, 3)}")

    def die(self) -> None:
        self.world.lapse(self.worker().engine)
        small = Transitions(self.world.keys, self.world.settings.model_copy(update={"batch": 3}))
        while self.world.run(small.reap()).moved == 3:
            self.check()

    def come_back(self) -> None:
        worker = self.worker()
        self.stale += worker.held.values()
        self.world.lapse(worker.engine)
        self.workers[worker.engine] = self.world.worker(worker.engine)

    def drain(self) -> None:
        self.world.run(self.world.transitions.drain(self.worker().engine))

    def unpark(self) -> None:
        self.world.run(self.world.transitions.unpark(""))

    def expire(self) -> None:
        due = [codec.text(c) for c in self.world.db.zrange(self.world.keys.deadlines, 0, -1)]
        if due:
            self.world.db.zadd(self.world.keys.deadlines, {self.random.choice(due): LONG_AGO})
            self.world.run(self.world.transitions.expire())

    def bring_to_an_end(self) -> None:
        for engine in self.workers:
            self.world.lapse(engine)
        worker = self.workers["e1"] = self.world.worker("e1")
        self.world.run(self.world.transitions.reap())
        self.world.run(self.world.transitions.unpark(""))
        for _, fields in self.world.stream():
            self.world.assign(fields["id"], "e1")
        while calls := worker.claim(1000):  # more than once: suspects run alone
            for call in calls:
                assert worker.finish(call) == "done"

    # -- what must be true

    def check(self) -> None:
        """The counters equal what exists."""
        records = {c: self.world.record(c) for c in self.weights}
        open_ = {c for c, r in records.items() if r["state"] in ("PENDING", "RUNNING")}
        sizes = {c: self._size(c, "body") + self._size(c, "json") for c in records}
        usage = texts(self.world.db.hgetall(self.world.keys.usage))
        assert usage.ints("open_calls", "open_bytes") == (len(open_), sum(sizes[c] for c in open_))
        by_session: Counter[str] = Counter()
        for call_id in open_:
            by_session[records[call_id]["session"]] += sizes[call_id]
        assert self.world.db.hgetall(self.world.keys.session_bytes) == {
            s.encode(): str(n).encode() for s, n in by_session.items()
        }
        ended = sorted(c for c in records if c not in open_)
        index = [texts(f) for _, f in self.world.db.xrange(self.world.keys.finished)]
        assert sorted(c for e in index for c in e["ids"].split()) == ended
        kept = sum(768 + sizes[c] + self._size(c, "result") + self._log_bytes(c) for c in ended)
        assert usage.ints("retained_bytes") == (sum(int(e["bytes"]) for e in index),) == (kept,)

    def _size(self, call_id: str, field: str) -> int:
        return int(self.world.db.hstrlen(self.world.keys.call(call_id), field))

    def _log_bytes(self, call_id: str) -> int:
        chunks = [f for _, f in self.world.log(call_id) if not f["state"]]
        return sum(32 + sum(len(f[n]) for n in ("text", "token_ids", "chunk", "replay", "restart")) for f in chunks)


@pytest.mark.parametrize("seed", range(6))
def test_the_counters_are_right_and_under_pressure_nothing_stays(world: World, seed: int) -> None:
    walk = Walk(world, seed)
    for step in range(120):
        walk.random.choice(walk.events)()
        if step % 4 == 0:
            walk.check()
    walk.bring_to_an_end()
    walk.check()
    tight = Transitions(world.keys, world.settings.model_copy(update={"max_retained_bytes": 1}))
    while world.run(tight.retain()).entries:
        pass
    assert not [c for c in walk.weights if world.db.exists(world.keys.call(c), world.keys.events(c))]
    assert world.db.hmget(world.keys.usage, "open_calls", "open_bytes", "retained_bytes") == [b"0"] * 3
    assert not world.db.exists(world.keys.session_bytes)
    assert not world.db.xlen(world.keys.finished)
    assert not world.leaks()
