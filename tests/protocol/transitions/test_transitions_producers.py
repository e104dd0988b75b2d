"""What producers do: push, cancel, and what an id may be. Each script alone."""

from __future__ import annotations

from typing import Any

import pytest

from rsm.broker import RequestState
from rsm.broker.connection import execute
from rsm.broker.protocol import codec
from rsm.broker.protocol.keys import ROUTER_GROUP
from rsm.broker.protocol.scripts import Command
from rsm.broker.protocol.transitions import Submitted
from tests.support.world import LONG_AGO, World

# -- submit


def test_submit_makes_a_record_and_pushes_routing_fields_only(world: World) -> None:
    call = world.prepare(
        "c1", "tell me", session="s1", model="m", priority=-3, deadline_ms=1 << 50, stream=True, inbox="box",
        prompt_tokens=7, traceparent="00-ab", on_engine_loss="restart", params={"max_tokens": 4},
    )  # fmt: skip
    assert world.run(world.transitions.submit([call])) == [Submitted("new", RequestState.PENDING)]
    record = world.record("c1")
    entry, fields = world.entry_of("c1")
    assert fields == {"id": "c1", "session": "s1", "model": "m", "prompt_tokens": "7", "ref": "1", "priority": "-3"}
    assert record["gen"] == entry
    assert codec.decode(world.db.hget(world.keys.call("c1"), "body")) == {"prompt": "tell me", "max_tokens": 4}
    assert abs(int(record["submitted_ms"]) - int(entry.split("-")[0])) < 1000
    expected = {
        "state": "PENDING", "session": "s1", "kind": "generate", "model": "m", "priority": "-3", "prompt_tokens": "7",
        "deadline_ms": str(1 << 50), "stream": "1", "inbox": "box", "traceparent": "00-ab", "digest": call.digest,
        "on_engine_loss": "restart",
        "attempt": "1", "engine": "",
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert record.ints("failures", "events", "level") == (0, 0, 0)
    assert world.open_calls("s1") == {"c1"}
    assert world.session("s1")["arrivals"] == "1"
    assert world.db.zscore(world.keys.deadlines, "c1") == 1 << 50
    assert world.stat("submitted") == 1


def test_a_push_repeated_is_a_duplicate(world: World) -> None:
    call = world.prepare("c1", inbox="box")
    again = world.prepare("c1", inbox="other")
    codes = world.run(world.transitions.submit([call, again, world.prepare("c2")]))
    assert [c.code for c in codes] == ["new", "duplicate", "new"]
    assert [f["id"] for _, f in world.stream()] == ["c1", "c2"]
    assert world.record("c1")["inbox"] == "other", "the producer that came back has another inbox"
    assert world.stat("submitted") == 2


@pytest.mark.parametrize("change", [{"prompt": "other"}, {"model": "m2"}, {"kind": "completions"}])
def test_another_call_under_the_same_id_is_a_conflict(world: World, change: dict[str, Any]) -> None:
    world.submit("c1", inbox="box")
    before = world.record("c1")
    assert world.submit("c1", **{"inbox": "stealer", **change}).code == "conflict"
    assert world.record("c1") == before
    assert len(world.stream()) == 1


def test_a_repeated_push_says_how_the_call_ended(world: World) -> None:
    worker = world.worker()
    worker.finish(world.start("c1", worker))
    assert world.submit("c1") == Submitted("duplicate", RequestState.COMPLETED)
    assert not world.stream()


# -- cancel


def test_a_waiting_call_is_cancelled_at_once(world: World) -> None:
    worker = world.worker()
    world.queue("c1", inbox="box", session="s")
    assert world.cancel("c1", "enough") == "cancelled"
    assert (world.state("c1"), world.record("c1")["error"]) == ("CANCELLED", "enough")
    assert (world.waiting(), world.engine().ints("queued_tokens"), world.open_calls("s")) == ([], (0,), set())
    assert world.events("box")[0]["state"] == "CANCELLED"
    assert not world.record("c1")["body"]
    assert worker.claim() == []


def test_a_call_on_the_stream_is_cancelled_at_once(world: World) -> None:
    world.worker()
    world.submit("c1")
    assert world.cancel("c1") == "cancelled"
    assert world.assign("c1").code == "stale"
    assert not world.stream()
    assert not world.waiting()


@pytest.mark.parametrize("how", ["cancel", "session", "deadline", "transition"])
def test_the_entry_of_a_call_that_ended_on_the_stream_goes_with_its_record(world: World, how: str) -> None:
    """Otherwise it would be accepted again, if its router died and no router ran until the record had expired."""
    entry = world.push("c1", session="s")
    world.read("a router that dies")
    assert world.accept(entry, "c1", session="s", deadline_ms=1 << 50) == "new"
    if how == "cancel":
        assert world.cancel("c1") == "cancelled"
    elif how == "session":
        assert world.cancel_session("s") == 1
    elif how == "deadline":
        world.db.zadd(world.keys.deadlines, {"c1": LONG_AGO})
        assert world.run(world.transitions.expire()) == 1
    else:
        assert world.run(world.transitions.transition("c1", RequestState.CANCELLED)) == (True, "PENDING")
    other = world.push("c2")
    world.forget("c1")
    assert world.run(world.expired().retain()).entries == 1
    assert world.accept(entry, "c1", session="s") == "gone"
    assert [e for e, _ in world.stream()] == [other]
    assert world.db.xpending(world.keys.calls, ROUTER_GROUP)["pending"] == 0


def test_the_end_of_a_hand_made_call_takes_nobodys_entry(world: World) -> None:
    world.run(world.transitions.transition("mine", RequestState.PENDING, "s", ""))
    (born_ms,) = world.record("mine").ints("submitted_ms")
    assert world.db.xadd(world.keys.calls, {"id": "c1"}, id=f"{born_ms}-0")
    world.cancel("mine")
    world.run(world.expired().retain())
    assert world.entry_of("c1")


def test_a_parked_call_is_cancelled_at_once(world: World) -> None:
    world.submit("c1", model="m")
    world.assign("c1", "")
    assert world.cancel("c1") == "cancelled"
    assert not world.db.zcard(world.keys.parked("m"))


def test_a_running_call_is_flagged_and_its_worker_notified_once(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker)
    assert [world.cancel("c1"), world.cancel("c1", "again")] == ["cancelling", "cancelling"]
    assert worker.orders() == [{"op": "cancel", "id": "c1", "gen": call.fence.gen, "attempt": "1"}]
    assert world.state("c1") == "RUNNING"
    assert world.record("c1")["cancel_reason"] == "enough"


def test_a_cancel_may_be_repeated_after_a_lost_reply(world: World) -> None:
    """The reply must not be that it came too late."""
    world.submit("c1")
    assert [world.cancel("c1"), world.cancel("c1")] == ["cancelled", "cancelled"]
    worker = world.worker()
    call = world.start("c2", worker)
    assert world.cancel("c2") == "cancelling"
    worker.finish(call)
    assert world.cancel("c2") == "cancelled"


def test_whoever_listens_is_told_while_the_call_is_open(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, inbox="first")
    assert world.run(world.transitions.listen("c1", "second")) == "RUNNING"
    worker.finish(call)
    assert [len(world.events(box)) for box in ("first", "second")] == [0, 1]
    assert world.run(world.transitions.listen("c1", "third")) == "COMPLETED"
    assert world.record("c1")["inbox"] == "second"
    assert world.run(world.transitions.listen("gone", "third")) == ""
    assert not world.db.exists(world.keys.call("gone")), "its fields would never expire"


def test_too_late_to_cancel(world: World) -> None:
    worker = world.worker()
    worker.finish(world.start("c1", worker))
    assert world.cancel("c1") == "finished"
    assert world.state("c1") == "COMPLETED"


def test_a_call_that_ends_by_its_deadline_can_no_longer_be_cancelled(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, deadline_ms=1 << 50)
    world.db.zadd(world.keys.deadlines, {"c1": LONG_AGO})
    world.run(world.transitions.expire())
    assert world.cancel("c1") == "finished"
    worker.finish(call)
    assert world.record("c1")["error_code"] == "deadline_exceeded"


def test_a_cancel_that_came_before_the_deadline_holds(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, deadline_ms=1 << 50)
    assert world.cancel("c1") == "cancelling"
    world.db.zadd(world.keys.deadlines, {"c1": LONG_AGO})
    world.run(world.transitions.expire())
    assert len(worker.orders()) == 1
    worker.finish(call)
    assert world.state("c1") == "CANCELLED"


def test_nothing_to_cancel(world: World) -> None:
    assert world.cancel("c1") == "unknown"
    assert not world.record("c1")


def test_a_cancel_noted_before_the_entry_is_read_ends_it_on_arrival(world: World) -> None:
    world.worker()
    entry = world.push("c1")
    assert world.cancel("c1", "too slow") == "noted"
    assert 0 < world.db.ttl(world.keys.call("c1")) <= 3600, "a note without a call expires"
    assert world.accept(entry, "c1", inbox="box") == "new"
    assert world.assign("c1").code == "cancelled"
    assert (world.state("c1"), world.record("c1")["error"]) == ("CANCELLED", "too slow")
    assert world.events("box")[0]["state"] == "CANCELLED"
    assert not world.stream()


def test_a_noted_cancel_does_not_hit_a_later_call(world: World) -> None:
    world.worker()
    world.push("other")
    assert world.cancel("c1") == "noted"
    assert world.submit("c1").code == "new"
    assert world.db.ttl(world.keys.call("c1")) == -1, "an open call never expires"
    assert world.assign("c1").code == "assigned"


# -- cancel_session


def test_a_session_is_cancelled_in_all_its_states(world: World) -> None:
    worker, other = world.worker("e1"), world.worker("e2")
    running = world.start("running", worker, session="s")
    elsewhere = world.start("elsewhere", other, session="s")
    flagged = world.start("flagged", worker, session="s")
    worker.finish(world.start("finished", worker, session="s"))
    world.queue("queued", session="s")
    world.queue("foreign", session="t")
    world.submit("parked", session="s")
    world.assign("parked", "")
    world.submit("pushed", session="s", inbox="box")
    world.cancel("flagged")
    worker.orders()
    assert world.cancel_session("s", "the user left") == 5
    for call_id in ("queued", "parked", "pushed"):
        assert (world.state(call_id), world.record(call_id)["error"]) == ("CANCELLED", "the user left")
    assert [o["id"] for w in (worker, other) for o in w.orders()] == ["running", "elsewhere"]
    for call, w in ((running, worker), (elsewhere, other), (flagged, worker)):
        assert w.finish(call) == "done"
        assert world.state(call.fence.call_id) == "CANCELLED"
    assert (world.state("finished"), world.state("foreign")) == ("COMPLETED", "PENDING")
    assert not world.open_calls("s")
    assert world.waiting() == ["foreign"]


def test_a_sessions_raw_entries_end_on_arrival(world: World) -> None:
    world.worker()
    entry, foreign = world.push("c1", session="s"), world.push("c2", session="t")
    assert world.cancel_session("s", "the user left") == 0
    for e, call_id, session in ((entry, "c1", "s"), (foreign, "c2", "t")):
        world.accept(e, call_id, session=session)
    assert world.assign("c1").code == "cancelled"
    assert (world.state("c1"), world.record("c1")["error"]) == ("CANCELLED", "the user left")
    assert world.assign("c2").code == "assigned"


def test_a_cancelled_session_can_be_used_again(world: World) -> None:
    worker = world.worker()
    world.push("other")
    world.queue("c1", session="s")
    assert world.cancel_session("s") == 1
    call = world.start("c2", worker, session="s")
    worker.release(call, fault=False)
    assert world.assign("c2").code == "assigned", "also when it is on the stream a second time"
    entry = world.push("c3", session="s")
    world.accept(entry, "c3", session="s")
    assert world.assign("c3").code == "assigned"


def test_a_large_session_is_cancelled_in_rounds(world: World) -> None:
    ids = [f"c{i}" for i in range(600)]
    world.run(world.transitions.submit([world.prepare(i, session="s") for i in ids]))
    cursor, total, rounds = "0", 0, 0
    while True:
        cursor, n, _ = world.run(world.transitions.cancel_session("s", "enough", cursor))
        total, rounds = total + n, rounds + 1
        if cursor == "0":
            break
    assert total == 600
    assert {world.state(i) for i in ids} == {"CANCELLED"}
    assert rounds > 1


def test_cancelling_an_unknown_session_leaves_no_trace(world: World) -> None:
    assert world.cancel_session("nobody") == 0
    assert not world.session("nobody")


# -- names


def test_everything_may_be_called_0(world: World) -> None:
    """Fields that are zero need not be stored, but a name is not a number."""
    worker = world.worker("0", "0")
    call = world.start("0", worker, session="0", model="0", inbox="0", stream=True)
    assert (call.fence.call_id, call.session, call.inbox) == ("0", "0", "0")
    assert (world.record("0")["engine"], world.record("0")["model"]) == ("0", "0")
    assert worker.publish(call, "0") == ["ok"]
    worker.release(call, fault=True, error="0")
    world.assign("0", "0", bind=True)
    assert world.session("0")["engine"] == "0"
    assert world.cancel_session("0", "0") == 1
    assert (world.state("0"), world.record("0")["error"]) == ("CANCELLED", "0")
    assert [n["state"] for n in world.events("0")] == ["", "CANCELLED"]
    assert not world.open_calls("0")


# -- generations


def test_a_reused_id_is_not_hit_by_what_was_meant_for_its_predecessor(world: World) -> None:
    worker = world.worker()
    old = world.start("c1", worker, stream=True)
    worker.publish(old, "old")
    world.cancel("c1")
    (order,) = worker.orders()
    worker.finish(old)
    world.forget("c1")
    new = world.start("c1", worker, stream=True, inbox="box")
    assert new.fence.gen != old.fence.gen
    assert new.fence.attempt == old.fence.attempt
    assert worker.publish(old, "late") == ["stale"]
    assert worker.release(old, fault=True) == ["stale"]
    assert worker.finish(old) == "stale"
    assert order["gen"] == old.fence.gen != new.fence.gen, "the worker can tell which call the old command was for"
    assert "cancel" not in world.record("c1")
    assert (world.state("c1"), world.record("c1").ints("events"), world.events("box")) == ("RUNNING", (0,), [])
    assert worker.finish(new) == "done"
    assert world.state("c1") == "COMPLETED"


def test_one_run_of_every_script_survives_a_server_without_scripts(world: World) -> None:
    world.db.script_flush()
    worker = world.worker()
    assert worker.finish(world.start("c1", worker)) == "done"
    world.db.script_flush()
    commands: list[Command[Any]] = [world.transitions.snapshot(), world.transitions.expire(), world.transitions.reap()]
    assert [type(r).__name__ for r in execute.run_all(world.db, commands)] == ["FleetSnapshot", "int", "Reaped"]
