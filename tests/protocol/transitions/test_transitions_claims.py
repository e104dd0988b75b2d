"""How workers get calls and stream them: claim, reconcile, publish. Each script alone."""

from __future__ import annotations

from rsm.broker.connection import execute
from rsm.broker.protocol import codec
from rsm.broker.protocol.transitions import Claimed, Differences, Event
from tests.support.fake_worker import FakeWorker
from tests.support.world import LONG_AGO, World

# -- claim


def test_claim_hands_over_all_that_a_worker_needs(world: World) -> None:
    worker = world.worker()
    world.queue(
        "c1", prompt="tell", session="s", priority=4, stream=True, inbox="box", prompt_tokens=9, traceparent="00-ab"
    )
    call = worker.take()
    assert (call.fence.call_id, call.fence.attempt, call.session, call.kind) == ("c1", 1, "s", "generate")
    assert (call.stream, call.inbox, call.priority, call.level, call.events) == (True, "box", 4, 0, 0)
    assert (call.traceparent, call.prompt_tokens, call.body_field, call.cancelled) == ("00-ab", 9, "body", False)
    assert codec.decode(call.body) == {"prompt": "tell"}
    assert call.fence.gen == world.record("c1")["gen"]
    assert (call.program, call.inherited, call.ran_ms) == ("s", 0, 0)
    assert 0 <= call.waited_ms == world.record("c1").ints("started_ms")[0] - world.record("c1").ints("submitted_ms")[0]
    assert world.state("c1") == "RUNNING"
    assert (world.waiting(), world.running()) == ([], ["c1"])
    assert world.engine().ints("queued_tokens", "running_tokens") == (0, 9)


def test_a_raw_json_body_is_handed_over_as_json(world: World) -> None:
    worker = world.worker()
    entry = world.push("c1")
    world.accept(entry, "c1")
    world.assign("c1")
    call = worker.take()
    assert (call.body_field, call.body) == ("json", b'{"prompt":"hi"}')


def test_claim_takes_at_most_so_many_in_order(world: World) -> None:
    worker = world.worker()
    for i in range(5):
        world.queue(f"c{i}", priority=i)
    assert [c.fence.call_id for c in worker.claim(2) or ()] == ["c0", "c1"]
    assert world.waiting() == ["c2", "c3", "c4"]
    assert [c.fence.call_id for c in worker.claim(9) or ()] == ["c2", "c3", "c4"]
    assert worker.claim(9) == []


def test_the_same_claim_number_gives_the_same_calls(world: World) -> None:
    worker = world.worker()
    for i in range(3):
        world.queue(f"c{i}")
    first = worker.claim(2, claim_no=7)
    assert worker.claim(2, claim_no=7) == first
    assert world.waiting() == ["c2"]
    assert first is not None
    worker.finish(first[0])
    assert worker.claim(2, claim_no=7) == first[1:], "a call that ended meanwhile is not handed over again"
    assert [c.fence.call_id for c in worker.claim(2, claim_no=8) or ()] == ["c2"]


def test_a_claim_that_got_nothing_may_get_something_under_its_number(world: World) -> None:
    worker = world.worker()
    assert worker.claim(claim_no=1) == []
    world.queue("c1")
    assert len(worker.claim(claim_no=1) or ()) == 1


def test_a_full_engine_may_take_calls_that_are_better_than_its_threshold(world: World) -> None:
    worker = world.worker()
    world.charge("old", 5_000)
    for name, session, priority in (("a", "", 0), ("b", "old", 0), ("c", "", 1), ("d", "old", 1), ("e", "", 2)):
        world.queue(name, session=session or f"new-{name}", priority=priority)

    assert worker.claim(0) == []
    assert worker.claim(0, ahead=0, threshold=(9, 9)) == []
    assert [c.fence.call_id for c in worker.claim(0, ahead=9, threshold=(0, 0)) or ()] == []
    assert [c.fence.call_id for c in worker.claim(0, ahead=9, threshold=(0, 2)) or ()] == ["a"]
    assert [c.fence.call_id for c in worker.claim(0, ahead=1, threshold=(1, 1)) or ()] == ["b"]
    assert [c.fence.call_id for c in worker.claim(2, ahead=9, threshold=(1, 1)) or ()] == ["c", "d"], (
        "free slots take any call"
    )
    assert [c.fence.call_id for c in worker.claim(1, ahead=1, threshold=(0, 0)) or ()] == ["e"]
    assert (world.waiting(), len(world.running())) == ([], 5)


def test_a_claim_for_better_calls_can_be_repeated(world: World) -> None:
    worker = world.worker()
    for i in range(3):
        world.queue(f"c{i}", priority=i)
    first = worker.claim(0, claim_no=7, ahead=2, threshold=(2, 0))
    assert [c.fence.call_id for c in first or ()] == ["c0", "c1"]
    assert worker.claim(0, claim_no=7, ahead=2, threshold=(9, 0)) == first


def test_a_worker_wakes_its_own_claimer(world: World) -> None:
    worker = world.worker()
    for _ in range(3):
        assert execute.run(world.db, worker.transitions.wake("e1")) == 1
    assert world.db.lrange(world.keys.bell("e1"), 0, -1) == [b"1"]
    assert world.db.ttl(world.keys.bell("e1")) > 0


def test_only_the_incarnation_that_registered_may_claim(world: World) -> None:
    world.worker()
    world.queue("c1")
    assert FakeWorker(world.settings, server=world.db).claim() is None
    assert FakeWorker(world.settings, "unknown", server=world.db).claim() is None
    assert world.waiting() == ["c1"]


def test_a_dead_engine_may_not_claim(world: World) -> None:
    worker = world.worker()
    world.queue("c1")
    world.lapse()
    world.run(world.transitions.reap())
    assert worker.claim() is None


def test_claim_ends_a_call_whose_deadline_passed(world: World) -> None:
    worker = world.worker()
    world.queue("c1", inbox="box")
    world.db.hset(world.keys.call("c1"), "deadline_ms", LONG_AGO)
    world.queue("c2")
    assert [c.fence.call_id for c in worker.claim() or ()] == ["c2"]
    assert world.record("c1")["error_code"] == "deadline_exceeded"
    assert world.events("box")
    assert world.engine().ints("queued_tokens") == (0,)


def test_claim_returns_the_time_left(world: World) -> None:
    """Not the deadline, because only Redis's clock may be compared with it."""
    worker = world.worker()
    seconds, micros = world.db.time()
    world.queue("c1", deadline_ms=seconds * 1000 + micros // 1000 + 60_000)
    world.queue("c2")
    left = {c.fence.call_id: c.left_ms for c in worker.claim() or ()}
    assert left["c2"] is None
    assert 50_000 < (left["c1"] or 0) <= 60_000


def test_a_flag_set_before_a_replayed_claim_is_handed_over(world: World) -> None:
    worker = world.worker()
    world.queue("c1")
    worker.claim(claim_no=1)
    world.cancel("c1")
    assert [c.cancelled for c in worker.claim(claim_no=1) or ()] == [True]


# -- reconcile


def test_a_worker_learns_how_its_calls_differ_from_those_of_redis(world: World) -> None:
    worker, other = world.worker("e1"), world.worker("e2")
    mine, ended, moved, again = (world.start(f"c{i}", worker) for i in range(4))
    worker.finish(ended)
    worker.release(moved, fault=False)
    world.assign("c2", "e2")
    theirs = other.take()
    worker.release(again, fault=False)
    world.assign("c3", "e1")
    new = worker.take()

    def reconcile(worker: FakeWorker, *calls: Claimed) -> Differences | None:
        return world.run(world.transitions.reconcile(worker.engine, worker.incarnation, [c.fence for c in calls]))

    assert reconcile(worker, mine, new) == reconcile(other, theirs) == ([], [])
    assert reconcile(worker, mine, ended, moved, again) == ([c.fence for c in (ended, moved, again)], [new.fence])
    assert reconcile(other) == ([], [theirs.fence])
    world.forget("c0")
    assert reconcile(worker, mine, new) == ([mine.fence], [])
    worker.incarnation = "another"
    assert reconcile(worker, mine) is None


# -- publish


def test_a_chunk_goes_to_the_log_and_to_the_inbox(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True, inbox="box")
    assert worker.publish(call, "a", "b") == ["ok", "ok"]
    log, events = world.log("c1"), world.events("box")
    assert [f for _, f in log] == [
        {"n": "0", "text": "a", "token_ids": "0"},
        {"n": "1", "text": "b", "token_ids": "1"},
    ]
    assert [e["eid"] for e in events] == [entry for entry, _ in log]
    assert [(e["call"], e["gen"], e["text"]) for e in events] == [("c1", call.fence.gen, t) for t in "ab"]
    assert world.record("c1")["events"] == "2"
    assert world.db.ttl(world.keys.inbox("box")) > 0


def test_an_event_has_only_the_chunk_and_its_replay_stays_in_the_log(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True, inbox="box")
    event = Event(call.fence, 0, "", (), '{"a":1}', "xyz")
    assert world.run(world.transitions.publish("e1", [event])) == ["ok"]
    assert world.log("c1")[0][1] == {"n": "0", "chunk": '{"a":1}', "replay": "xyz"}
    assert "replay" not in world.events("box")[0]


def test_without_an_inbox_the_log_is_enough(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True)
    assert worker.publish(call, "a") == ["ok"]
    assert len(world.log("c1")) == 1
    assert not world.db.keys(world.keys.prefix.replace("[", r"\[") + "inbox:*")


def test_a_repeated_publish_is_seen(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True, inbox="box")
    worker.publish(call, "a", "b")
    assert worker.publish(call, "a", "b", "c") == ["seen", "seen", "ok"]
    assert [f["text"] for _, f in world.log("c1")] == ["a", "b", "c"]
    assert len(world.events("box")) == 3


def test_a_publish_under_an_old_fence_changes_nothing(world: World) -> None:
    worker, other = world.worker("e1"), world.worker("e2")
    old = world.start("c1", worker, stream=True)
    worker.publish(old, "a")
    worker.release(old, fault=False)
    assert worker.publish(old, "late", first=1) == ["stale"], "while it waits"
    world.assign("c1", "e2")
    new = other.take()
    assert (new.events, new.fence.attempt) == (1, 2)
    assert worker.publish(old, "late", first=1) == ["stale"], "while it runs elsewhere"
    assert other.publish(new, "b") == ["ok"]
    other.finish(new)
    assert other.publish(new, "c", first=2) == ["stale"], "after its end"
    assert [f.get("text") for _, f in world.log("c1")] == ["a", "b", None]


def test_events_after_a_gap_are_not_written(world: World) -> None:
    """Redis lost an event that it had acknowledged. The worker must start again after the last one that is left."""
    worker = world.worker()
    call = world.start("c1", worker, stream=True, inbox="box")
    worker.publish(call, "a")
    assert worker.publish(call, "c", "d", first=2) == ["gap", "gap"]
    assert [f["text"] for _, f in world.log("c1")] == ["a"]
    assert world.record("c1").ints("events") == (1,)
    assert worker.publish(call, "b", first=1) == ["ok"]
