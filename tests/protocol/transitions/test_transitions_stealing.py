"""Calls that are stolen from a loaded engine's queue: what routers read, and what they take. Each script alone."""

from __future__ import annotations

from typing import Any

import pytest

from rsm.broker.protocol.models import CallRecord
from rsm.broker.protocol.rules import rank_of
from rsm.broker.protocol.waiting_calls import Waiting, WaitingCall
from tests.protocol.test_poison import suspect
from tests.support.world import World


def waiting(world: World, *loaded: str, idle: tuple[str, ...] = (), most: int = 10) -> Waiting:
    return world.run(world.transitions.waiting(idle, loaded or ("e1",), most))


def steal(world: World, *calls: WaitingCall) -> list[bool]:
    return world.run(world.transitions.steal(calls))


def first(world: World) -> WaitingCall:
    return waiting(world).calls[0]


def test_the_heads_of_queues_are_read_in_their_order(world: World) -> None:
    for e in ("e1", "e2"):
        world.worker(e)
    world.submit("c1", session="s", model="m", prompt_tokens=70)
    world.assign("c1", reuse=20)
    for call, engine, priority in (("c2", "e1", -3), ("c3", "e2", 0), ("c4", "e1", 5)):
        world.queue(call, engine, priority=priority)
    gen = {c: world.record(c)["gen"] for c in ("c1", "c2", "c3", "c4")}
    assert waiting(world, "e1", "e2", most=2).calls == [
        WaitingCall("c2", gen["c2"], "e1", "c2", "", -3, 0, 10),
        WaitingCall("c1", gen["c1"], "e1", "s", "m", 0, 0, 70, reuse=20),
        WaitingCall("c3", gen["c3"], "e2", "c3", "", 0, 0, 10),
    ]


def test_what_is_taken_goes_back_to_the_router_and_leaves_no_count(world: World) -> None:
    worker = world.worker()
    world.charge("s", 5_000)
    world.submit("c1", session="s", prompt_tokens=100, priority=-1)
    world.assign("c1", reuse=30, costs="e1=900 e2=100")
    assert world.starving()
    assert steal(world, first(world)) == [True]
    record = world.record("c1")
    assert (record["state"], record["engine"], record["stolen_from"], record["attempt"]) == ("PENDING", "", "e1", "1")
    assert not {"level", "costs", "reuse", "starves_ms"} & record.keys()
    _, entry = world.entry_of("c1")
    assert (entry["gen"], entry["prompt_tokens"], entry["priority"]) == (record["gen"], "100", "-1")
    assert (world.waiting(), world.starving(), world.stat("stolen")) == ([], {}, 1)
    assert not world.db.exists(world.keys.work("e1"))
    assert world.engine()["queued_tokens"] == "0"
    assert worker.claim() == []


def test_it_is_placed_again_and_records_where_it_was(world: World) -> None:
    world.worker()
    taker = world.worker("e2")
    world.queue("c1")
    steal(world, first(world))
    assert world.assign("c1", "e2", costs="e2=100 e1=900").code == "assigned"
    record = CallRecord.from_hash("c1", world.db.hgetall(world.keys.call("c1")))
    assert (record.engine_id, record.stolen_from, list(record.costs)) == ("e2", ("e1",), ["e2", "e1"])
    assert taker.finish(taker.take()) == "done"
    assert world.state("c1") == "COMPLETED"


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda w, worker: worker.take(),
        lambda w, worker: worker.finish(worker.take()),
        lambda w, worker: w.cancel("c1"),
        lambda w, worker: steal(w, first(w)),
        lambda w, worker: (steal(w, first(w)), w.assign("c1", "e2")),
        lambda w, worker: (steal(w, first(w)), w.assign("c1", "e1")),
        lambda w, worker: w.run(w.transitions.drain("e1")),
    ],
    ids=["claimed", "ended", "cancelled", "taken", "moved", "taken and back", "drained"],
)
def test_a_call_that_is_gone_is_not_taken(world: World, meanwhile: Any) -> None:
    worker = world.worker()
    world.worker("e2")
    world.queue("c1")
    seen = first(world)
    meanwhile(world, worker)
    before = world.record("c1"), world.stream(), world.waiting(), world.waiting("e2"), world.stat("stolen")
    assert steal(world, seen) == [False]
    assert steal(world, seen._replace(gen="1-1")) == [False]
    assert steal(world, seen._replace(id="none")) == [False]
    assert before == (world.record("c1"), world.stream(), world.waiting(), world.waiting("e2"), world.stat("stolen"))


def test_the_number_of_moves_is_reported(world: World) -> None:
    world.worker()
    world.queue("c1")
    for moves in range(3):
        assert first(world).moves == moves
        steal(world, first(world))
        world.assign("c1")
    assert world.record("c1")["stolen_from"] == "e1 e1 e1"


def test_its_session_is_unbound_from_that_engine_and_no_other(world: World) -> None:
    for e in ("e1", "e2"):
        world.worker(e)
    for call, session, engine in (("c1", "s", "e1"), ("c2", "t", "e1"), ("c3", "t", "e2")):
        world.submit(call, session=session)
        world.assign(call, engine, bind=True, seen=world.session(session)["engine"])
    steal(world, *waiting(world).calls)
    assert (world.session("s")["engine"], world.session("t")["engine"]) == ("", "e2")
    world.assign("c1", "e2", bind=True)
    assert world.session("s")["engine"] == "e2"


def test_a_suspect_is_neither_shown_nor_taken(world: World) -> None:
    suspect(world, "bad")
    world.queue("good")
    calls = waiting(world).calls
    assert [c.id for c in calls] == ["good"]
    record = world.record("bad")
    assert record["engine"] == "e1"
    bad = WaitingCall("bad", record["gen"], "e1", "bad", "", 0, 0, 10)
    assert steal(world, bad, *calls) == [False, True]
    assert world.waiting() == ["bad"]


def test_an_engine_that_is_reserved_for_a_suspect_is_reported(world: World) -> None:
    worker = suspect(world, "bad")
    world.worker("e2")
    assert waiting(world, "e2", idle=("e1", "e2")).reserved == frozenset()
    assert [c.fence.call_id for c in worker.claim() or ()] == ["bad"]
    assert waiting(world, "e2", idle=("e1", "e2")).reserved == {"e1"}


def test_of_many_each_is_counted(world: World) -> None:
    world.worker()
    for n in range(5):
        world.queue(f"c{n}", prompt_tokens=10 + n)
    taken = waiting(world).calls[1:4]
    assert steal(world, *taken) == [True] * 3
    assert world.waiting() == ["c0", "c4"]
    rank = rank_of(0, 0)
    assert world.db.hgetall(world.keys.work("e1")) == {b"%d" % rank: b"2", b"%d:tokens" % rank: b"24"}
    assert world.stat("stolen") == 3
