"""Calls that kill engines: suspected, isolated, convicted."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from rsm.broker.protocol import codec
from rsm.broker.protocol.models import CallRecord
from tests.support.fake_worker import FakeWorker
from tests.support.world import LONG_AGO, World


def suspect(world: World, *calls: str, **options: Any) -> FakeWorker:
    """Waiting calls that have seen as many engine deaths as a call may see without running alone."""
    worker = world.worker()
    for call_id in calls:
        world.queue(call_id, **options)
    for _ in range(world.settings.max_deaths - 1):
        assert len(worker.claim() or ()) == len(calls)
        worker = world.die(worker)
    return worker


def claimed(worker: FakeWorker, most: int = 10) -> list[str]:
    return [c.fence.call_id for c in worker.claim(most) or ()]


def woken(world: World, engine: str = "e1") -> bool:
    """Whether a wake-up was sent. Takes it, as the worker does."""
    return bool(world.db.lpop(world.keys.bell(engine)))


def deaths(world: World, call_id: str) -> int:
    raw: Any = world.db.hgetall(world.keys.call(call_id))
    record = CallRecord.from_hash(call_id, raw)
    assert record.failures == codec.number(raw.get(b"failures"))
    return record.deaths


# -- counting


def test_deaths_and_errors_are_counted_apart(world: World) -> None:
    worker = suspect(world, "c1")
    assert (deaths(world, "c1"), world.record("c1").ints("failures")) == (2, (0,))
    for n in range(1, world.settings.max_attempts):
        worker.release(worker.take(), fault=True)
        assert (deaths(world, "c1"), world.record("c1").ints("failures")) == (2, (n,))
        world.assign("c1")
    worker.release(worker.take(), fault=True)
    assert world.record("c1")["error_code"] == "engine_error"


def test_the_death_of_one_process_counts_once_however_often_it_is_reported(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker)
    worker.release(call, death=True)
    world.assign("c1")
    worker.take()
    world.die(worker)
    assert world.record("c1")["deaths"] == worker.incarnation


def test_a_call_that_is_given_back_in_order_is_no_suspect(world: World) -> None:
    worker = world.worker()
    world.queue("c1")
    for _ in range(5):
        worker.release(worker.take())
        world.assign("c1")
    assert deaths(world, "c1") == 0
    world.queue("c2")
    assert claimed(worker) == ["c1", "c2"]


def test_a_call_that_waited_is_no_suspect(world: World) -> None:
    worker = suspect(world, "poison")
    world.queue("waiting")
    worker.take()
    world.die(worker)
    assert deaths(world, "waiting") == 0


# -- isolation


def test_a_suspect_runs_alone(world: World) -> None:
    worker = suspect(world, "x-suspect")
    world.queue("before", priority=-1)
    world.queue("after")
    assert claimed(worker) == ["before"], "calls ahead of it go first"
    woken(world)
    assert claimed(worker) == [], "then the engine is emptied for it"
    worker.finish(worker.held["before"])
    assert woken(world), "the worker is woken when the engine is empty"
    assert claimed(worker) == ["x-suspect"]
    assert claimed(worker) == []
    worker.finish(worker.held["x-suspect"])
    assert woken(world)
    assert claimed(worker) == ["after"]
    assert deaths(world, "x-suspect") == 2


def test_no_call_overtakes_a_suspect_for_which_the_engine_is_emptied(world: World) -> None:
    worker = suspect(world, "suspect")
    world.queue("first", priority=-1)
    assert claimed(worker) == ["first"]
    world.queue("urgent", priority=-100)
    assert claimed(worker) == []
    worker.finish(worker.held["first"])
    assert claimed(worker) == ["suspect"]


def test_claims_of_a_suspect_may_be_repeated(world: World) -> None:
    worker = suspect(world, "suspect")
    world.queue("other")
    first = worker.claim(claim_no=7)
    assert [c.fence.call_id for c in first or ()] == ["suspect"]
    assert worker.claim(claim_no=7) == first
    assert worker.claim(claim_no=8) == []
    assert worker.claim(claim_no=8) == []


def test_suspects_run_one_after_the_other(world: World) -> None:
    worker = suspect(world, "a", "b", "c")
    for call_id in ("a", "b", "c"):
        assert claimed(worker) == [call_id]
        assert claimed(worker) == []
        assert worker.finish(worker.held[call_id]) == "done"
    assert claimed(worker) == []


def test_a_trace_of_a_call_that_moved_blocks_no_suspect(world: World) -> None:
    worker = suspect(world, "suspect")
    world.db.zadd(world.keys.running("e1"), {"long-gone": 1})
    assert claimed(worker) == ["suspect"]
    world.db.zrem(world.keys.running("e1"), "long-gone")


@pytest.mark.parametrize("how", ["cancel", "session", "deadline", "late"])
def test_a_suspect_that_ends_while_it_waits_frees_the_engine(world: World, how: str) -> None:
    worker = suspect(world, "suspect", deadline_ms=1 << 50)
    world.queue("running", priority=-1)
    assert claimed(worker) == ["running"]
    world.queue("next")
    assert claimed(worker) == []
    woken(world)
    if how == "cancel":
        assert world.cancel("suspect") == "cancelled"
    elif how == "session":
        assert world.cancel_session("suspect") == 1
    elif how == "deadline":
        world.db.zadd(world.keys.deadlines, {"suspect": LONG_AGO})
        world.run(world.transitions.expire())
    else:
        world.db.hset(world.keys.call("suspect"), "deadline_ms", LONG_AGO)
        assert claimed(worker) == []
    assert woken(world)
    assert world.state("suspect") in ("CANCELLED", "FAILED")
    assert claimed(worker) == ["next"]


def test_a_suspect_cancelled_while_it_runs_frees_the_engine(world: World) -> None:
    worker = suspect(world, "suspect")
    world.queue("next")
    assert claimed(worker) == ["suspect"]
    woken(world)
    assert world.cancel("suspect") == "cancelling"
    assert claimed(worker) == []
    worker.finish(worker.held["suspect"])
    assert woken(world)
    assert claimed(worker) == ["next"]


def test_a_suspect_moves_on_when_its_engine_drains(world: World) -> None:
    worker = suspect(world, "suspect")
    world.queue("running", priority=-1)
    assert claimed(worker) == ["running"]
    assert claimed(worker) == []
    world.run(world.transitions.drain("e1"))
    other = world.worker("e2")
    world.assign("suspect", "e2")
    assert claimed(other) == ["suspect"]
    worker.release(worker.held["running"])
    world.assign("running", "e2")
    assert claimed(other) == []


def test_a_suspect_given_back_waits_again_for_an_empty_engine(world: World) -> None:
    worker = suspect(world, "suspect")
    worker.release(worker.take())
    assert woken(world)
    assert claimed(worker) == []
    world.queue("beside", priority=-1)
    world.assign("suspect")
    assert claimed(worker) == ["beside"]
    assert claimed(worker) == []
    world.die(worker)
    assert world.state("suspect") == "PENDING", "it was not running"


# -- conviction


@pytest.mark.parametrize("how", ["reap", "supervisor", "register", "release"])
def test_a_suspect_that_kills_again_is_a_dead_letter(world: World, how: str) -> None:
    worker = suspect(world, "poison", session="s", inbox="box", model="m")
    call = worker.take()
    if how == "reap":
        world.lapse()
        world.run(world.transitions.reap())
    elif how == "supervisor":
        world.run(world.transitions.reap("e1", worker.incarnation))
    elif how == "register":
        world.lapse()
        world.worker()
    else:
        assert worker.release(call, death=True) == ["released"]
    record = world.record("poison")
    assert (record["state"], record["error_code"]) == ("FAILED", "attempts_exhausted")
    assert "3 engine processes" in record["error"]
    assert (deaths(world, "poison"), record.ints("attempt", "failures")) == (3, (3, 0))
    (letter,) = world.dead()
    assert (letter["id"], letter["error_code"], letter["session"], letter["attempts"]) == (
        "poison", "attempts_exhausted", "s", "3",
    )  # fmt: skip
    assert [n["state"] for n in world.events("box")] == ["FAILED"]
    assert not world.stream()
    assert not world.running()


def test_neighbours_of_a_convict_are_innocent(world: World) -> None:
    worker = suspect(world, "a-poison", "b-neighbour", "c-neighbour")
    assert claimed(worker) == ["a-poison"]
    worker = world.die(worker)
    assert [world.state(c) for c in ("a-poison", "b-neighbour", "c-neighbour")] == ["FAILED", "PENDING", "PENDING"]
    assert claimed(worker) == ["b-neighbour", "c-neighbour"], "in parallel again"
    assert world.record("b-neighbour").ints("failures") == (0,)
    worker = world.die(worker)
    assert deaths(world, "b-neighbour") == 1, "the deaths that the convict caused no longer count"
    assert 0 < world.db.pttl(world.keys.solved) <= world.settings.session_ttl_s * 1000


def test_a_process_that_lives_clears_its_calls_of_its_death(world: World) -> None:
    """Its lease expired while it hung or was cut off, so no call killed it."""
    worker = world.worker()
    for call_id in ("a", "b"):
        world.queue(call_id)
    assert claimed(worker) == ["a", "b"]
    worker = world.die(worker)
    assert claimed(worker) == ["a", "b"]
    world.run(world.transitions.reap(worker.engine, worker.incarnation))
    assert deaths(world, "a") == world.settings.max_deaths - 1, "a suspect, as far as Redis can know"

    awake = FakeWorker(world.settings, worker.engine, server=world.db)
    assert awake.register(survived=worker.incarnation).ok
    assert awake.beat()
    world.assign("a")
    world.assign("b")
    assert claimed(awake) == ["a", "b"], "in parallel"

    world.lapse()
    again = FakeWorker(world.settings, worker.engine, server=world.db)
    assert again.register(survived=awake.incarnation).ok, "no router has noticed: it takes its own calls back"
    assert again.beat()
    assert claimed(again) == ["a", "b"]


def test_a_suspect_found_innocent_while_it_waits_is_no_longer_waited_for(world: World) -> None:
    worker = suspect(world, "a-poison", "b-neighbour")
    other = world.worker("e2")
    world.queue("running", "e2", priority=-1)
    worker.release(worker.take())
    world.assign("a-poison", "e2")
    assert claimed(other) == ["running"]
    assert claimed(other) == [], "e2 is emptied for the poison"
    assert claimed(worker) == ["b-neighbour"], "e1 runs the neighbour alone"
    world.queue("next")
    assert claimed(worker) == []
    other.finish(other.held["running"])
    assert claimed(other) == ["a-poison"]
    world.run(world.transitions.reap("e2", other.incarnation))
    assert world.state("a-poison") == "FAILED"
    assert claimed(worker) == ["next"], "the neighbour no longer needs an engine for itself"
    world.die(worker)
    assert (world.state("b-neighbour"), deaths(world, "b-neighbour")) == ("PENDING", 1)


def test_an_innocent_call_that_still_runs_alone_is_not_convicted(world: World) -> None:
    suspect(world, "a-poison", "b-neighbour")
    other = world.worker("e2")
    world.run(world.transitions.drain("e1"))
    world.assign("a-poison", "e2")
    third = world.worker("e3")
    world.assign("b-neighbour", "e3")
    assert (claimed(other), claimed(third)) == (["a-poison"], ["b-neighbour"])
    world.die(other)
    assert world.state("a-poison") == "FAILED"
    world.die(third)
    assert (world.state("b-neighbour"), deaths(world, "b-neighbour")) == ("PENDING", 1)


def test_an_error_of_a_suspect_convicts_it_of_nothing(world: World) -> None:
    worker = suspect(world, "suspect")
    worker.release(worker.take(), fault=True)
    world.assign("suspect")
    assert claimed(worker) == ["suspect"], "still alone"
    assert (deaths(world, "suspect"), world.record("suspect").ints("failures")) == (2, (1,))


def test_a_cancelled_suspect_that_kills_is_cancelled(world: World) -> None:
    worker = suspect(world, "suspect")
    worker.take()
    world.cancel("suspect")
    world.die(worker)
    assert world.state("suspect") == "CANCELLED"
    assert not world.dead()


# -- any order of events


class Plague:
    """Random events with calls, some of which kill every engine that they run on."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = Random(seed)
        self.workers = {e: world.worker(e) for e in ("e1", "e2")}
        self.calls = [f"c{i}" for i in range(24)]
        self.poison = set(self.random.sample(self.calls, 3))
        self.alone = 0  # how often a suspect was handed out
        for call_id in self.calls:
            world.submit(call_id, priority=self.random.choice([-1, 0, 0]))

    def step(self) -> None:
        for _, fields in self.world.stream():
            self.world.assign(fields["id"], self.random.choice(list(self.workers)))
        worker = self.random.choice(list(self.workers.values()))
        self.random.choice([self.claim, self.claim, self.finish, self.finish, self.give_back, self.kill])(worker)
        for engine in self.workers:
            alone = self.world.engine(engine)["alone"]
            assert alone not in self.world.running(engine) or self.world.running(engine) == [alone]

    def claim(self, worker: FakeWorker) -> None:
        waiting = {c: self.is_suspect(c) for c in self.world.waiting(worker.engine)}
        for call in worker.claim(self.random.randint(1, 6)) or ():
            if waiting[call.fence.call_id]:
                self.alone += 1
                assert self.world.running(worker.engine) == [call.fence.call_id]

    def is_suspect(self, call_id: str) -> bool:
        unsolved = [d for d in self.world.record(call_id)["deaths"].split() if not self.is_solved(d)]
        return len(unsolved) >= self.world.settings.max_deaths - 1

    def is_solved(self, incident: str) -> bool:
        return self.world.db.zscore(self.world.keys.solved, incident) is not None

    def finish(self, worker: FakeWorker) -> None:
        harmless = sorted(worker.held.keys() - self.poison)
        if harmless:
            worker.finish(worker.held[self.random.choice(harmless)])

    def give_back(self, worker: FakeWorker) -> None:
        if worker.held and self.random.random() < 0.2:
            worker.release(self.random.choice(list(worker.held.values())), fault=False)

    def kill(self, worker: FakeWorker) -> None:
        if not worker.held.keys() & self.poison:
            return
        if self.random.random() < 0.5:
            self.world.run(self.world.transitions.reap(worker.engine, worker.incarnation))
        self.world.lapse(worker.engine)
        self.workers[worker.engine] = self.world.worker(worker.engine)

    def left(self) -> list[str]:
        return [c for c in self.calls if self.world.state(c) in ("PENDING", "RUNNING")]


@pytest.mark.parametrize("seed", range(4))
def test_in_any_order_suspects_run_alone_and_only_the_guilty_die(world: World, seed: int) -> None:
    plague = Plague(world, seed)
    for _ in range(4000):
        plague.step()
        if not plague.left():
            break
    assert not plague.left(), "no call is left"
    assert {letter["id"] for letter in world.dead()} == plague.poison
    assert {c for c in plague.calls if world.state(c) == "FAILED"} == plague.poison
    assert all(world.record(c)["failures"] == "" for c in plague.calls)
    assert plague.alone >= len(plague.poison)
    assert world.engine("e1").ints("queued_tokens", "running_tokens") == (0, 0)
