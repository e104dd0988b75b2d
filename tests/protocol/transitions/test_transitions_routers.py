"""What routers do: accept, reject, assign, park, expire. Each script alone."""

from __future__ import annotations

import pytest

from rsm.broker.protocol import codec
from rsm.broker.protocol.keys import ROUTER_GROUP
from rsm.broker.protocol.transitions import Placed, Transitions
from tests.support.world import LONG_AGO, World, now_ms

# -- accept


def test_accept_moves_the_body_into_the_record(world: World) -> None:
    entry = world.push("c1", stream="1")
    assert world.accept(entry, "c1", stream=True, inbox="box", prompt_tokens=3, on_engine_loss="fail") == "new"
    record = world.record("c1")
    assert (record["stream"], record["inbox"], record["on_engine_loss"]) == ("1", "box", "fail")
    assert (record["json"], record["gen"], record["state"]) == ('{"prompt":"hi"}', entry, "PENDING")
    assert not record["body"]
    assert world.stream(), "the entry stays until the call is assigned"
    assert world.assign("c1").code == "unplaced"
    world.worker()
    assert world.assign("c1").code == "assigned"
    assert not world.stream()


def test_an_entry_accepted_twice_is_one_call(world: World) -> None:
    entry = world.push("c1")
    assert [world.accept(entry, "c1") for _ in range(2)] == ["new", "duplicate"]
    assert world.stream()
    assert world.stat("submitted") == 1


def test_the_same_raw_push_twice_is_one_call(world: World) -> None:
    first, second = world.push("c1"), world.push("c1")
    raw = [world.raw_call(first, "c1"), world.raw_call(second, "c1")]
    assert world.run(world.transitions.accept(raw)) == ["new", "duplicate"]
    assert [e for e, _ in world.stream()] == [first]


def test_an_entry_that_another_router_took_is_gone(world: World) -> None:
    assert world.accept("5-1", "c1") == "gone"
    assert not world.record("c1")


def test_a_raw_push_under_a_foreign_id_is_a_dead_letter(world: World) -> None:
    world.submit("c1", "mine")
    before = world.record("c1")
    entry = world.push("c1", session="s2")
    assert world.accept(entry, "c1", session="s2", inbox="box") == "conflict"
    assert world.record("c1") == before
    assert [f["ref"] for _, f in world.stream()] == ["1"]
    (letter,) = world.dead()
    assert (letter["id"], letter["error_code"], letter["session"]) == ("c1", "conflict", "s2")
    (event,) = world.events("box")
    assert (event["call"], event["state"], event["error_code"], event["gen"]) == ("c1", "FAILED", "conflict", entry)


# -- reject


def test_a_refused_entry_becomes_a_failed_record(world: World) -> None:
    entry = world.push("c1")
    assert world.reject(entry, "c1", inbox="box") == "failed"
    record = world.record("c1")
    assert (record["state"], record["error_code"], record["error"]) == ("FAILED", "invalid_request", "It is wrong.")
    assert world.events("box")[0]["error_code"] == "invalid_request"
    assert not world.stream()
    assert not world.open_calls("c1")
    assert world.db.ttl(world.keys.call("c1")) > 0


@pytest.mark.parametrize("call_id", ["", "taken"])
def test_a_refused_entry_without_a_free_id_becomes_a_dead_letter(world: World, call_id: str) -> None:
    world.submit("taken")
    before = world.record("taken")
    entry = world.push("x")
    assert world.reject(entry, call_id, inbox="box") == "buried"
    assert world.record("taken") == before
    assert [f["id"] for _, f in world.stream()] == ["taken"]
    (letter,) = world.dead()
    assert (letter["id"], letter["entry"], letter["error"]) == (call_id, entry, "It is wrong.")
    assert world.events("box")[0]["state"] == "FAILED"


def test_an_accepted_call_can_be_refused(world: World) -> None:
    entry = world.push("c1")
    world.accept(entry, "c1")
    assert world.reject(entry, "c1") == "failed"
    assert world.state("c1") == "FAILED"
    assert not world.dead()


def test_a_refusal_does_not_end_a_call_twice(world: World) -> None:
    """The call was cancelled while its entry was on the stream, and then no engine served its model."""
    world.submit("c1", inbox="box")
    entry, _ = world.entry_of("c1")
    world.cancel("c1")
    assert world.reject(entry, "c1", gen=entry, inbox="box") == "stale"
    assert world.state("c1") == "CANCELLED"
    assert [n["state"] for n in world.events("box")] == ["CANCELLED"]
    assert not world.dead()
    assert not world.stream()


def test_an_entry_is_refused_once_and_the_stream_continues(world: World) -> None:
    entry = world.push("bad")
    world.submit("good")
    assert [world.reject(entry, "bad") for _ in range(2)] == ["failed", "gone"]
    world.worker()
    assert world.assign("good").code == "assigned"


# -- assign


def test_assign_puts_the_call_into_the_queue(world: World) -> None:
    worker = world.worker()
    world.submit("c1")
    assert world.assign("c1", hit=False) == Placed("assigned", "e1")
    assert world.waiting() == ["c1"]
    assert not world.stream()
    record = world.record("c1")
    assert (record["engine"], record.ints("level", "inherited")) == ("e1", (0, 0))
    assert record["why"] == "a test says so"
    assert world.engine().ints("queued_tokens", "served") == (10, 1)
    assert world.stat("affinity_misses") == 1
    assert world.db.llen(world.keys.bell(worker.engine)) == 1


def test_one_wake_up_is_enough(world: World) -> None:
    world.worker()
    for i in range(3):
        world.queue(f"c{i}")
    assert world.db.llen(world.keys.bell("e1")) == 1


def test_assign_counts_hits(world: World) -> None:
    world.worker()
    for i, hit in enumerate((True, True, False, None)):
        world.submit(f"c{i}")
        world.assign(f"c{i}", hit=hit)
    assert (world.stat("affinity_hits"), world.stat("affinity_misses")) == (2, 1)


def test_queue_order_is_class_then_level_then_arrival(world: World) -> None:
    world.worker()
    world.charge("old", 5_000_000)
    world.charge("middle", 2_000)
    before = now_ms(world) - 3000
    for call_id, session, priority in [
        ("lowest", "new", 127), ("late-class", "new", 1), ("old-urgent", "old", -1), ("old-1", "old", 0),
        ("middle-1", "middle", 0), ("new-1", "new", 0), ("new-2", "new", 0), ("first", "old", -128),
    ]:  # fmt: skip
        world.submit(call_id, session=session, priority=priority)
        arrival = {"old-1": before, "new-1": before + 1000, "new-2": before + 2000}.get(call_id)
        if arrival:
            world.db.hset(world.keys.call(call_id), "submitted_ms", arrival)
        world.assign(call_id)
    assert world.waiting() == [
        "first", "old-urgent", "new-1", "new-2", "middle-1", "old-1", "late-class", "lowest",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("service", "level"),
    [(0, 0), (999, 0), (1000, 1), (3_999, 1), (4_000, 2), (255_999, 4), (999_999, 5), (1_000_000, 6), (10**12, 6)],
)
def test_the_level_is_the_bin_of_the_sessions_service(world: World, service: int, level: int) -> None:
    world.worker()
    if service:
        world.charge("s", service)
    world.queue("c1", session="s")
    assert world.record("c1").ints("level", "inherited") == (level, service)


def test_scores_are_exact_at_both_ends(world: World) -> None:
    """8 + 4 + 41 bits fill a double, so one millisecond must count even in the last class and level."""
    world.worker()
    world.charge("s", 10**9)
    for call_id, arrival in (("b", 2_000_000_000_001), ("a", 2_000_000_000_002), ("c", 2_000_000_000_000)):
        world.submit(call_id, session="s", priority=127)
        world.db.hset(world.keys.call(call_id), "submitted_ms", arrival)
        world.assign(call_id)
    assert world.waiting() == ["c", "b", "a"]


def test_two_routers_bind_a_session_to_one_engine(world: World) -> None:
    world.worker("e1")
    world.worker("e2")
    for call_id in ("c1", "c2"):
        world.submit(call_id, session="s")
    assert world.assign("c1", "e1", bind=True, seen="") == Placed("assigned", "e1")
    assert world.assign("c2", "e2", bind=True, seen="") == Placed("assigned", "e1")
    assert world.waiting("e1") == ["c1", "c2"]
    assert "another router" in world.record("c2")["why"]
    assert "another router" not in world.record("c1")["why"]


def test_a_router_that_saw_the_binding_may_change_it(world: World) -> None:
    world.worker("e1")
    world.worker("e2")
    for call_id in ("c1", "c2"):
        world.submit(call_id, session="s")
    world.assign("c1", "e1", bind=True)
    assert world.assign("c2", "e2", bind=True, seen="e1").engine == "e2"
    assert world.session("s")["engine"] == "e2"


def test_a_binding_to_an_engine_that_takes_no_calls_is_void(world: World) -> None:
    world.worker("e1")
    world.worker("e2")
    for call_id in ("c1", "c2"):
        world.submit(call_id, session="s")
    world.assign("c1", "e1", bind=True)
    world.run(world.transitions.drain("e1"))
    assert world.assign("c2", "e2", bind=True, seen="").engine == "e2"


def test_no_binding_unless_requested(world: World) -> None:
    world.worker()
    world.queue("c1", session="s")
    assert "engine" not in world.session("s")


def test_a_call_without_an_engine_is_parked(world: World) -> None:
    world.submit("c1", model="m")
    assert world.assign("c1", "") == Placed("parked", "")
    assert world.db.zrange(world.keys.parked("m"), 0, -1) == [b"c1"]
    assert not world.stream()
    assert world.state("c1") == "PENDING"


def test_a_call_that_another_router_parked_and_one_placed_is_no_longer_parked(world: World) -> None:
    world.worker()
    for call_id in ("placed", "late"):
        world.submit(call_id, model="m", deadline_ms=1 << 50)
        in_hand = world.placement(call_id)
        assert world.assign(call_id, "").code == "parked"
        if call_id == "late":
            world.db.hset(world.keys.call(call_id), "deadline_ms", LONG_AGO)
        (placed,) = world.run(world.transitions.assign([in_hand]))
        assert placed.code == ("expired" if call_id == "late" else "assigned")
        assert not world.db.zcard(world.keys.parked("m"))


@pytest.mark.parametrize("state", ["STARTING", "DRAINING", "DEAD", "none"])
def test_an_engine_that_takes_no_calls_gets_none(world: World, state: str) -> None:
    if state != "none":
        world.worker()
        world.db.hset(world.keys.engine("e1"), "state", state)
    world.submit("c1")
    assert world.assign("c1") == Placed("unplaced", "e1")
    assert world.stream(), "the entry stays, to be placed again"
    assert world.record("c1")["engine"] == ""


def test_an_entry_without_a_record_is_missing(world: World) -> None:
    world.worker()
    world.db.xadd(world.keys.calls, {"id": "c1", "ref": "1"})
    assert world.assign("c1") == Placed("missing", "")
    assert world.stream()


def test_a_re_delivered_entry_is_stale(world: World) -> None:
    world.worker("e1")
    world.worker("e2")
    world.submit("c1")
    placement = world.placement("c1", "e1")
    again = placement._replace(engine="e2")
    assert world.run(world.transitions.assign([placement, again])) == [Placed("assigned", "e1"), Placed("stale", "e1")]
    assert (world.waiting("e1"), world.waiting("e2")) == (["c1"], [])
    assert world.engine("e2").ints("queued_tokens") == (0,)


def test_an_entry_of_an_older_call_with_the_same_id_is_stale(world: World) -> None:
    world.worker()
    world.submit("c1")
    old = world.placement("c1")
    world.forget("c1")
    world.submit("c1")
    assert world.run(world.transitions.assign([old])) == [Placed("stale", "")]
    assert not world.waiting()
    assert world.assign("c1").code == "assigned"


def test_a_passed_deadline_ends_the_call_on_arrival(world: World) -> None:
    world.worker()
    world.submit("c1", deadline_ms=LONG_AGO, inbox="box")
    assert world.assign("c1").code == "expired"
    assert world.record("c1")["error_code"] == "deadline_exceeded"
    assert world.events("box")[0]["error_code"] == "deadline_exceeded"
    assert not world.db.zcard(world.keys.deadlines)
    assert not world.stream()


def test_a_batch_is_assigned_call_by_call(world: World) -> None:
    world.worker()
    for call_id in ("a", "b", "c"):
        world.submit(call_id)
    world.cancel("b")
    placements = [world.placement("a"), world.placement("b"), world.placement("c", "e9")]
    assert [p.code for p in world.run(world.transitions.assign(placements))] == ["assigned", "stale", "unplaced"]


# -- unpark


def test_parked_calls_go_back_oldest_first(world: World) -> None:
    small = Transitions(world.keys, world.settings.model_copy(update={"batch": 2}))
    for i in range(3):
        world.submit(f"c{i}", model="m")
        world.db.hset(world.keys.call(f"c{i}"), "submitted_ms", 100 - i)
        world.assign(f"c{i}", "")
    world.submit("other", model="m2")
    world.assign("other", "")
    assert [world.run(small.unpark("m")) for _ in range(3)] == [2, 1, 0]
    assert [f["id"] for _, f in world.stream()] == ["c2", "c1", "c0"]
    assert world.db.zcard(world.keys.parked("m2")) == 1
    world.worker()
    assert world.assign("c0").code == "assigned"


def test_calls_that_named_no_model_are_parked_apart(world: World) -> None:
    world.submit("c1")
    world.assign("c1", "")
    assert world.run(world.transitions.unpark("m")) == 0
    assert world.run(world.transitions.unpark("")) == 1


# -- expire


def test_a_waiting_call_expires(world: World) -> None:
    worker = world.worker()
    world.queue("queued", deadline_ms=1 << 50, inbox="box")
    world.submit("parked", deadline_ms=1 << 50)
    world.assign("parked", "")
    world.submit("pushed", deadline_ms=LONG_AGO)
    world.queue("later", deadline_ms=1 << 50)
    world.db.zadd(world.keys.deadlines, {"queued": LONG_AGO, "parked": LONG_AGO})
    assert world.run(world.transitions.expire()) == 3
    for call_id in ("queued", "parked", "pushed"):
        assert (world.state(call_id), world.record(call_id)["error_code"]) == ("FAILED", "deadline_exceeded")
    assert world.events("box")[0]["error_code"] == "deadline_exceeded"
    assert [c.fence.call_id for c in worker.claim() or ()] == ["later"]
    assert world.run(world.transitions.expire()) == 0


def test_a_running_call_that_expires_is_aborted(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, deadline_ms=1 << 50)
    world.db.zadd(world.keys.deadlines, {"c1": LONG_AGO})
    assert world.run(world.transitions.expire()) == 1
    assert worker.orders() == [{"op": "cancel", "id": "c1", "gen": call.fence.gen, "attempt": "1"}]
    assert worker.finish(call, "almost") == "done"
    record = world.record("c1")
    assert (record["state"], record["error_code"]) == ("FAILED", "deadline_exceeded")
    assert world.result("c1")["text"] == "almost"


def test_expire_works_in_rounds(world: World) -> None:
    small = Transitions(world.keys, world.settings.model_copy(update={"batch": 2}))
    for i in range(3):
        world.submit(f"c{i}", deadline_ms=LONG_AGO)
    assert [world.run(small.expire()) for _ in range(2)] == [2, 1]


# -- leave


def test_a_consumer_leaves_unless_entries_are_pending_for_it(world: World) -> None:
    def consumers() -> list[str]:
        return [codec.text(c["name"]) for c in world.db.xinfo_consumers(world.keys.calls, ROUTER_GROUP)]

    world.submit("c1")
    world.db.xreadgroup(ROUTER_GROUP, "busy", {world.keys.calls: ">"})
    world.db.xgroup_createconsumer(world.keys.calls, ROUTER_GROUP, "idle")
    assert [world.run(world.transitions.leave(name)) for name in ("busy", "idle", "unknown")] == [False, True, True]
    assert consumers() == ["busy"]
    world.worker()
    world.assign("c1")
    assert world.run(world.transitions.leave("busy"))
    assert consumers() == []


# -- snapshot


def test_a_snapshot_shows_loads_and_caches(world: World) -> None:
    worker = world.worker("e1")
    world.worker("e2", "m2")
    world.start("c1", worker, session="s")
    world.queue("c2")
    world.submit("c3", session="s")
    world.assign("c3", bind=True)
    world.db.hset(world.keys.affinity("s"), mapping={"e1": "70:5", "e2": "8:6"})
    seen = world.run(world.transitions.snapshot(["s", "unknown"]))
    e1, e2 = sorted(seen.engines, key=lambda e: e.id)
    assert (e1.queued, e1.running, e1.queued_tokens, e1.running_tokens, e1.load_tokens) == (2, 1, 20, 10, 30)
    assert (e1.served, e2.served, e2.model, e2.load_tokens) == (3, 0, "m2", 0)
    assert (seen.sessions["s"].bound, seen.sessions["s"].resident) == ("e1", {"e1": 70, "e2": 8})
    assert (seen.sessions["unknown"].bound, seen.sessions["unknown"].resident) == ("", {})
    world.db.delete(world.keys.affinity("s"))
