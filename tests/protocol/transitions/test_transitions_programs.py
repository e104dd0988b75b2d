"""Transitions of programs that run calls, or manage the process table, themselves. Each script alone."""

from __future__ import annotations

from rsm.broker import RequestState
from tests.support.world import World

# -- transition


def test_the_legal_steps(world: World) -> None:
    step = world.transitions.transition
    ends = (RequestState.COMPLETED, RequestState.CANCELLED, RequestState.FAILED)
    for end in ends:
        for started in (True, False):
            if end is RequestState.COMPLETED and not started:
                continue
            call_id = f"{end}-{started}"
            assert world.run(step(call_id, RequestState.PENDING, "s", "e1")) == (True, "")
            if started:
                assert world.run(step(call_id, RequestState.RUNNING)) == (True, "PENDING")
            assert world.run(step(call_id, end, reason="because")) == (True, "RUNNING" if started else "PENDING")
            assert (world.state(call_id), world.record(call_id)["error"]) == (end, "because")
            assert world.record(call_id)["engine"] == "e1"
            assert world.db.ttl(world.keys.call(call_id)) > 0
    assert not world.open_calls("s")


def test_the_illegal_steps(world: World) -> None:
    states = list(RequestState)
    paths = {
        RequestState.PENDING: [RequestState.PENDING],
        RequestState.RUNNING: [RequestState.PENDING, RequestState.RUNNING],
        RequestState.COMPLETED: [RequestState.PENDING, RequestState.RUNNING, RequestState.COMPLETED],
        RequestState.CANCELLED: [RequestState.PENDING, RequestState.CANCELLED],
        RequestState.FAILED: [RequestState.PENDING, RequestState.FAILED],
    }
    legal = {("PENDING", "RUNNING"), ("PENDING", "CANCELLED"), ("PENDING", "FAILED")}
    legal |= {("RUNNING", end) for end in ("COMPLETED", "CANCELLED", "FAILED")}
    for before, path in paths.items():
        for step in path:
            assert world.run(world.transitions.transition(before, step, "s", "e1"))[0]
        for after in states:
            if (before, after) not in legal:
                assert world.run(world.transitions.transition(before, after)) == (False, before)
        assert world.state(before) == before
    for after in states[1:]:
        assert world.run(world.transitions.transition("unknown", after)) == (False, "")
    world.run(world.transitions.cancel_session("s", "", "0"))


# -- session


def test_a_session_begins_once(world: World) -> None:
    assert [world.run(world.transitions.session("start", "s")) for _ in range(2)] == [1, 0]
    assert world.session("s")["service"] == "0"
    assert world.db.ttl(world.keys.session("s")) > 0


def test_a_session_ends_when_no_call_is_open(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, session="s")
    assert world.run(world.transitions.session("end", "s")) == 1
    worker.finish(call, resident_tokens=5)
    assert world.run(world.transitions.session("end", "s")) == 0
    assert not world.db.exists(world.keys.session("s"), world.keys.affinity("s"), world.keys.session_recent("s"))


def test_a_session_is_charged_along_its_longest_path(world: World) -> None:
    def charge(service: int, inherited: int | None = None) -> int:
        if inherited is not None:
            world.db.hset(world.keys.call("c1"), mapping={"assigned_ms": 1, "inherited": inherited})
        return world.charge("s", service, 5, 7, "none" if inherited is None else "c1")

    assert [charge(100), charge(50, 0), charge(20, 100), charge(30, 150)] == [100, 100, 120, 180]
    assert world.session("s").ints("waited_ms", "ran_ms", "completed") == (5, 7, 4)
    assert [charge(10), charge(10)] == [190, 200], "without a record, charges are sequential"
    assert world.session("s").ints("waited_ms", "ran_ms") == (15, 21)
    assert world.db.ttl(world.keys.session("s")) > 0
    world.forget("c1")


def test_a_charge_of_nothing_makes_an_entry(world: World) -> None:
    assert world.charge("s", 0) == 0
    assert world.session("s")["service"] == "0"
