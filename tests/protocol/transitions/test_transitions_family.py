"""Sub-agents: sessions with parents, charged and cancelled as one program. Each script alone."""

from __future__ import annotations

import pytest

from rsm.broker import InvalidRequest
from rsm.broker.views.monitor import Monitor
from tests.support.world import World


def child(world: World, session: str, parent: str) -> None:
    assert world.run(world.transitions.session("start", session, parent)) == 1


def chain(world: World, n: int, prefix: str = "s") -> None:
    """s1 is the parent of s2, that of s3, …"""
    world.run(world.transitions.session("start", f"{prefix}1"))
    for i in range(2, n + 1):
        child(world, f"{prefix}{i}", f"{prefix}{i - 1}")


# -- parents and children


def test_a_first_call_names_the_parent(world: World) -> None:
    world.submit("c1", session="sub", parent_session="main")
    assert world.session("sub")["parent"] == "main"
    assert world.session("main")["service"] == "0"
    assert world.children("main") == {"sub"}
    assert world.submit("c2", session="sub", parent_session="main").code == "new", "later calls may name it, too"
    assert world.submit("c3", session="sub").code == "new", "or not"
    for key in (world.keys.session("sub"), world.keys.session("main"), world.keys.session_children("main")):
        assert world.db.ttl(key) > 0


def test_a_bare_push_names_the_parent(world: World) -> None:
    entry = world.push("c1", session="sub", parent_session="main")
    assert world.accept(entry, "c1", session="sub", parent_session="main") == "new"
    assert world.session("sub")["parent"] == "main"


def test_a_session_may_be_started_with_its_parent(world: World) -> None:
    child(world, "sub", "main")
    assert world.session("sub")["parent"] == "main"
    assert world.run(world.transitions.session("start", "sub", "other")) == 0, "it exists"
    assert world.session("sub")["parent"] == "main"


REFUSED = [
    ("s1", "s1", "cannot be its own parent"),
    ("s1", "s2", "s1 is an ancestor of s2"),
    ("s1", "s3", "s1 is an ancestor of s3"),
    ("s3", "s1", "s3 already has another parent than s1"),
]


@pytest.mark.parametrize(("session", "parent", "why"), REFUSED)
def test_what_cannot_be_a_child_is_refused_and_nothing_has_changed(
    world: World, session: str, parent: str, why: str
) -> None:
    chain(world, 3)
    before = {s: world.session(s) for s in ("s1", "s2", "s3")}
    reply = world.submit("c1", session=session, parent_session=parent)
    assert (reply.code, reply.state, reply.ended) == ("invalid", None, False)
    assert why in reply.error
    assert not world.record("c1")
    assert not world.stream()
    assert {s: world.session(s) for s in before} == before


@pytest.mark.parametrize(("session", "parent", "why"), REFUSED)
def test_such_a_push_fails(world: World, session: str, parent: str, why: str) -> None:
    chain(world, 3)
    entry = world.push("c1", inbox="box")
    assert world.accept(entry, "c1", session=session, parent_session=parent, inbox="box") == "invalid"
    record = world.record("c1")
    assert (record["state"], record["error_code"]) == ("FAILED", "invalid_request")
    assert why in record["error"]
    assert [n["state"] for n in world.events("box")] == ["FAILED"]
    assert not world.stream()


def test_such_a_start_is_refused(world: World) -> None:
    child(world, "sub", "main")
    with pytest.raises(InvalidRequest, match="main is an ancestor of sub"):
        world.run(world.transitions.session("start", "main", "sub"))
    with pytest.raises(InvalidRequest, match="cannot be its own parent"):
        world.run(world.transitions.session("start", "x", "x"))
    assert not world.session("x")


def test_a_tree_has_a_greatest_depth(world: World) -> None:
    chain(world, 33)
    with pytest.raises(InvalidRequest, match="at most 32 deep"):
        child(world, "s34", "s33")


def test_the_deepest_session_is_of_the_program_of_its_root(world: World) -> None:
    """In the router's snapshot, in the scripts that assign and charge, and in the views."""
    worker = world.worker()
    world.charge("s1", 5_000)
    chain(world, 33)
    seen = world.run(world.transitions.snapshot(["s33"], fleet=False)).sessions["s33"]
    assert (seen.program, seen.service, seen.level) == ("s1", 5_000, 2)
    call = world.start("c1", worker, session="s33")
    assert (call.program, call.inherited, call.level) == ("s1", 5_000, 2)
    worker.finish(call, service=10)
    assert world.session("s1")["service"] == "5010"
    shown = Monitor(world.settings, world.db).session("s33")
    assert (shown["program"], shown["service"]) == ("s1", 5_010)


def test_the_retry_of_a_push_is_a_duplicate_whatever_it_says_of_parents(world: World) -> None:
    world.submit("c1", session="s")
    assert world.submit("c1", session="s", parent_session="s").code == "duplicate"


def test_a_session_that_is_full_gets_no_parent(world: World) -> None:
    world.transitions = world.with_settings(max_session_calls=1)
    world.submit("c1", session="sub")
    assert world.submit("c2", session="sub", parent_session="main").code == "overloaded"
    assert world.session("sub")["parent"] == ""


# -- accounts


def test_the_root_is_charged_for_its_descendants(world: World) -> None:
    worker = world.worker()
    chain(world, 3)
    for i, session in enumerate(("s3", "s1", "s2", "s3")):
        call = world.start(f"c{i}", worker, session=session)
        assert (call.session, call.program, call.inherited) == (session, "s1", 500 * i)
        worker.finish(call, service=500)
    assert [world.session(s).ints("service")[0] for s in ("s1", "s2", "s3")] == [2000, 0, 0]
    assert [world.session(s).ints("completed")[0] for s in ("s1", "s2", "s3")] == [1, 1, 2], "calls are counted apart"


def test_parallel_sub_agents_are_a_program_of_parallel_calls(world: World) -> None:
    worker = world.worker()
    calls = []
    for i in range(3):
        child(world, f"sub{i}", "main")
        calls.append(world.start(f"c{i}", worker, session=f"sub{i}"))
    for call, service in zip(calls, (5, 700, 30), strict=True):
        worker.finish(call, service=service)
    assert world.session("main")["service"] == "700"


def test_the_level_of_a_sub_agent_is_that_of_its_program(world: World) -> None:
    world.worker()
    world.charge("main", 5_000, waited_ms=1_000, ran_ms=2_000)
    child(world, "sub", "main")
    world.queue("c1", session="sub")
    record = world.record("c1")
    assert (record["program"], record["level"], record["inherited"]) == ("main", "2", "5000")
    assert record.ints("waited_ms", "ran_ms") == (1_000, 2_000)
    world.queue("c2", session="main")
    assert world.record("c2")["program"] == "", "its own session is not stored"


def test_what_a_session_has_used_before_it_got_a_parent_is_its_programs(world: World) -> None:
    worker = world.worker()
    world.charge("main", 300, waited_ms=10)
    world.charge("sub", 500, waited_ms=4, ran_ms=5)
    world.submit("c1", session="sub", parent_session="main")
    assert world.session("main").ints("service", "waited_ms", "ran_ms") == (500, 10, 5)
    world.assign("c1")
    assert worker.take().inherited == 500


def test_a_tree_may_get_a_new_root(world: World) -> None:
    worker = world.worker()
    child(world, "leaf", "middle")
    call = world.start("c1", worker, session="leaf")
    world.submit("c2", session="middle", parent_session="top")
    worker.finish(call, service=70)
    assert (world.session("top")["service"], world.session("middle")["service"]) == ("70", "0")


def test_a_whole_batch_is_charged_to_its_root(world: World) -> None:
    worker = world.worker()
    chain(world, 2)
    ids = [f"c{i}" for i in range(4)]
    for i, call_id in enumerate(ids):
        world.queue(call_id, session=f"s{1 + i % 2}")
    calls = worker.claim() or []
    ends = [worker.end_of(c, service=100 * (1 + i)) for i, c in enumerate(calls)]
    assert world.run(world.transitions.finish("e1", ends)) == ["done"] * 4
    assert world.session("s1")["service"] == "400"


def test_affinity_and_binding_stay_with_each_session(world: World) -> None:
    worker = world.worker()
    child(world, "sub", "main")
    world.submit("c1", session="sub")
    world.assign("c1", bind=True)
    worker.finish(worker.take(), resident_tokens=50)
    assert world.db.hget(world.keys.affinity("sub"), "e1").startswith(b"50:")
    assert not world.db.exists(world.keys.affinity("main"))
    assert (world.session("sub")["engine"], world.session("main")["engine"]) == ("e1", "")


def test_a_live_sub_agent_keeps_its_ancestors_alive(world: World) -> None:
    worker = world.worker()
    chain(world, 3)
    keys = [world.keys.session("s1"), world.keys.session("s2"), world.keys.session_children("s1")]

    def fade() -> None:
        for key in keys:
            world.db.pexpire(key, 60_000)

    fade()
    call = world.start("c1", worker, session="s3")
    assert min(world.db.ttl(key) for key in keys) > 60
    assert world.session("s1").ints("last_arrival_ms") == world.record("c1").ints("assigned_ms")
    fade()
    worker.finish(call)
    assert min(world.db.ttl(key) for key in keys) > 60
    assert world.session("s1")["last_completion_ms"] == world.record("c1")["finished_ms"]


def test_children_that_were_idle_for_long_are_forgotten(world: World) -> None:
    child(world, "old", "main")
    world.db.zadd(world.keys.session_children("main"), {"old": 1})
    child(world, "new", "main")
    assert world.children("main") == {"new"}


# -- the end of a tree


def test_a_cancel_reaches_the_whole_tree(world: World) -> None:
    worker = world.worker()
    chain(world, 3)
    child(world, "s2b", "s1")
    running = world.start("running", worker, session="s3")
    for call_id, session in (("a", "s1"), ("b", "s2"), ("c", "s2b"), ("d", "s3")):
        world.queue(call_id, session=session)
    world.queue("other", session="other")
    assert world.cancel_session("s1") == 5
    assert {world.state(c) for c in "abcd"} == {"CANCELLED"}
    assert worker.orders()[0]["id"] == "running"
    assert world.state("other") == "PENDING"
    worker.finish(running, "partial")
    assert world.state("running") == "CANCELLED"


def test_a_cancel_of_a_branch_leaves_the_rest(world: World) -> None:
    world.worker()
    chain(world, 3)
    for i in (1, 2, 3):
        world.queue(f"c{i}", session=f"s{i}")
    assert world.cancel_session("s2") == 2
    assert [world.state(f"c{i}") for i in (1, 2, 3)] == ["PENDING", "CANCELLED", "CANCELLED"]


def test_a_cancel_without_descendants_leaves_them(world: World) -> None:
    world.worker()
    chain(world, 2)
    for i in (1, 2):
        world.queue(f"c{i}", session=f"s{i}")
    assert world.cancel_session("s1", descendants=False) == 1
    assert [world.state(f"c{i}") for i in (1, 2)] == ["CANCELLED", "PENDING"]


@pytest.mark.parametrize("descendants", [True, False])
def test_calls_of_the_tree_that_no_router_has_read_yet_end_on_arrival(world: World, descendants: bool) -> None:
    """At that time, not even the session of the sub-agent is known."""
    world.worker()
    fields = {"session": "new", "parent_session": "main"}
    entry = world.push("c1", **fields)
    world.cancel_session("main", "enough", descendants)
    world.accept(entry, "c1", **fields)
    assert world.assign("c1").code == ("cancelled" if descendants else "assigned")
    assert world.record("c1")["error"] == ("enough" if descendants else "")
    world.queue("c2", session="new")


def test_a_session_ends_when_no_call_of_its_tree_is_open(world: World) -> None:
    worker = world.worker()
    chain(world, 2)
    call = world.start("c1", worker, session="s2")
    assert world.run(world.transitions.session("end", "s1")) == 1
    worker.finish(call)
    assert world.run(world.transitions.session("end", "s2")) == 0
    assert world.children("s1") == set()
    assert world.run(world.transitions.session("end", "s1")) == 0
    assert not world.session("s1")
