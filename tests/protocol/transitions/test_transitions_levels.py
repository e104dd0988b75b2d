"""Levels and starvation: a call's place in its engine's queue, what its program is charged. Each script alone."""

from __future__ import annotations

import itertools

import pytest

from rsm.broker.protocol.transitions import Claimed
from tests.support.fake_worker import FakeWorker
from tests.support.world import LONG_AGO, World, now_ms


def low(world: World, call_id: str, session: str = "old", priority: int = 0) -> None:
    """A waiting call of a program with much service."""
    if not world.session(session)["service"]:
        world.charge(session, 5_000)
    world.queue(call_id, session=session, priority=priority)
    assert world.record(call_id)["level"] == "2"


def starve(world: World, call_id: str) -> None:
    """Makes the call starve now."""
    assert world.starving()[call_id] > now_ms(world)
    world.db.zadd(world.keys.starving("e1"), {call_id: LONG_AGO})


def claimed(worker: FakeWorker, most: int = 10) -> list[str]:
    return [c.fence.call_id for c in worker.claim(most) or ()]


# -- when a call starves


def test_a_call_after_the_first_level_starves_when_its_program_has_waited_beta_times_as_long_as_it_ran(
    world: World,
) -> None:
    world.worker()
    world.charge("s", 5_000, waited_ms=6_000, ran_ms=2_000)
    world.queue("c1", session="s")
    submitted = world.record("c1").ints("submitted_ms")[0]
    assert world.starving() == {"c1": submitted + 8 * 2_000 - 6_000}
    assert world.record("c1").ints("starves_ms") == (submitted + 10_000,)


def test_in_the_first_level_no_call_can_starve(world: World) -> None:
    world.worker()
    world.charge("s", 999, waited_ms=60_000, ran_ms=1)
    world.queue("c1", session="s")
    assert world.starving() == {}
    assert world.stat("promoted") == 0


def test_with_beta_zero_no_call_starves(world: World) -> None:
    world.worker()
    world.charge("s", 5_000, waited_ms=60_000)
    world.transitions = world.with_settings(starvation_beta=0)
    world.queue("c1", session="s")
    assert (world.record("c1").ints("level", "promoted_ms"), world.starving()) == ((2, 0), {})


def test_a_call_that_starves_already_goes_to_the_first_level_at_once(world: World) -> None:
    worker = world.worker()
    low(world, "c1", "other")
    world.charge("s", 5_000, waited_ms=20_000, ran_ms=2_000)
    world.queue("c2", session="s")
    record = world.record("c2")
    assert (record["level"], record["promoted_ms"]) == ("", record["assigned_ms"])
    assert list(world.starving()) == ["c1"]
    assert world.stat("promoted") == 1
    assert claimed(worker, 1) == ["c2"]


def test_waiting_calls_that_starve_go_ahead_of_the_rest_of_their_class(world: World) -> None:
    worker = world.worker()
    low(world, "c1")
    low(world, "c2")
    low(world, "c3", priority=1)
    world.queue("young", session="young")
    world.queue("urgent", session="young", priority=-1)
    for call_id in ("c2", "c3"):
        starve(world, call_id)
    world.queue("younger", session="young")
    assert claimed(worker, 3) == ["urgent", "c2", "young"], "the user's class stays ahead of the level"
    assert list(world.starving()) == ["c1"]
    assert world.stat("promoted") == 2
    assert claimed(worker) == ["younger", "c1", "c3"]
    assert world.starving() == {}


def test_a_claim_that_is_repeated_promotes_no_call(world: World) -> None:
    worker = world.worker()
    low(world, "c1")
    low(world, "c2")
    first = worker.claim(1, claim_no=1)
    starve(world, "c2")
    assert worker.claim(1, claim_no=1) == first
    assert world.stat("promoted") == 0


def test_one_claim_promotes_so_many_the_longest_overdue_first(world: World) -> None:
    worker = world.worker()
    for i in range(70):
        low(world, f"c{i:02}")
        world.db.zadd(world.keys.starving("e1"), {f"c{i:02}": 1000 - i})
    assert claimed(worker, 1) == ["c06"], "of those that were promoted, the first that came"
    assert len(world.starving()) == 6
    assert claimed(worker, 1) == ["c00"]
    assert world.starving() == {}


def test_a_trace_of_a_call_that_moved_is_removed(world: World) -> None:
    worker = world.worker()
    other = world.worker("e2")
    low(world, "c1")
    world.db.zadd(world.keys.starving("e2"), {"c1": LONG_AGO, "nobody": LONG_AGO})
    assert other.claim() == []
    assert (world.starving("e2"), world.waiting("e2"), world.record("c1")["level"]) == ({}, [], "2")
    assert claimed(worker) == ["c1"]


# -- a call that leaves its queue can no longer starve there


def test_every_way_out_of_a_queue_is_a_way_out_of_the_starving(world: World) -> None:
    worker = world.worker()
    for call_id in ("ended", "late", "claimed", "drained"):
        low(world, call_id)
    assert len(world.starving()) == 4
    world.cancel("ended")
    assert len(world.starving()) == 3
    world.db.hset(world.keys.call("late"), "deadline_ms", LONG_AGO)
    world.db.zadd(world.keys.deadlines, {"late": LONG_AGO})
    world.run(world.transitions.expire())
    assert len(world.starving()) == 2
    assert claimed(worker, 1) == ["claimed"]
    assert list(world.starving()) == ["drained"]
    world.run(world.transitions.drain("e1"))
    assert world.starving() == {}
    assert world.record("drained")["starves_ms"] == ""
    assert not world.db.exists(world.keys.starving("e1"))


def test_a_late_call_found_by_a_claim_no_longer_starves(world: World) -> None:
    worker = world.worker()
    low(world, "late")
    world.db.hset(world.keys.call("late"), "deadline_ms", LONG_AGO)
    assert worker.claim() == []
    assert world.starving() == {}


def test_a_dead_engines_calls_no_longer_starve(world: World) -> None:
    worker = world.worker()
    low(world, "c1")
    world.run(world.transitions.reap(worker.engine, worker.incarnation))
    assert world.starving() == {}


def test_a_call_that_its_engine_takes_back_may_starve_again(world: World) -> None:
    worker = world.worker()
    low(world, "c1")
    due = world.starving()
    worker.take()
    assert world.starving() == {}
    world.lapse()
    world.worker()
    assert world.starving() == due
    assert world.waiting() == ["c1"]


# -- what is charged


def start(world: World, worker: FakeWorker, call_id: str, session: str = "s", waited: int = 0) -> Claimed:
    """A running call that waited for `waited` ms."""
    world.submit(call_id, session=session)
    world.db.hincrby(world.keys.call(call_id), "submitted_ms", -waited)
    world.assign(call_id)
    return worker.take()


def end(world: World, worker: FakeWorker, call: Claimed, ran: int = 0, service: int = 0) -> None:
    """Ends the call as if it had run for `ran` ms, without more wait."""
    for name in ("submitted_ms", "started_ms", "promoted_ms"):
        if world.db.hexists(world.keys.call(call.fence.call_id), name):
            world.db.hincrby(world.keys.call(call.fence.call_id), name, -ran)
    assert worker.finish(call, service=service) == "done"


def close_to(seen: int, expected: int) -> bool:
    """Except for the time that the test itself took."""
    return 0 <= seen - expected < 2_000


def test_service_waiting_and_running_add_up_over_calls_one_after_another(world: World) -> None:
    worker = world.worker()
    for i in range(3):
        end(world, worker, start(world, worker, f"c{i}", waited=10_000), ran=20_000, service=300)
    entry = world.session("s")
    assert entry["service"] == "900"
    assert close_to(entry.ints("waited_ms")[0], 30_000)
    assert close_to(entry.ints("ran_ms")[0], 60_000)


def test_of_parallel_calls_the_longest_counts_whichever_ends_first(world: World) -> None:
    for n, order in enumerate(itertools.permutations(range(3))):
        worker, session = world.worker(f"e{n}"), f"s{n}"
        world.charge(session, 100, 1_000_000, 2_000_000)
        calls = []
        for i in range(3):
            world.submit(f"{session}-{i}", session=session)
            world.db.hincrby(world.keys.call(f"{session}-{i}"), "submitted_ms", -i * 10_000)
            world.assign(f"{session}-{i}", f"e{n}")
            calls.append(worker.take())
        for i in order:
            end(world, worker, calls[i], ran=i * 20_000, service=i * 7)
        entry = world.session(session)
        assert entry["service"] == "114"
        assert close_to(entry.ints("waited_ms")[0], 1_020_000)
        assert close_to(entry.ints("ran_ms")[0], 2_040_000)


def test_a_worker_gets_the_totals_of_the_program(world: World) -> None:
    worker = world.worker()
    world.charge("s", 700, waited_ms=5_000, ran_ms=9_000)
    call = start(world, worker, "c1", waited=1_000)
    assert (call.program, call.inherited, call.ran_ms) == ("s", 700, 9_000)
    assert close_to(call.waited_ms, 6_000)


def test_a_promotion_pays_for_what_the_program_waited(world: World) -> None:
    """Otherwise a program that starved once would be promoted until it has run an eighth of its total wait."""
    worker = world.worker()
    world.charge("s", 5_000, waited_ms=100_000, ran_ms=10_000)
    call = start(world, worker, "c1")
    assert (call.level, call.waited_ms < 2_000, call.ran_ms) == (0, True, 0), (
        "the totals start at zero, in the engine too"
    )
    end(world, worker, call, ran=3_000, service=10)
    entry = world.session("s")
    assert close_to(entry.ints("paid_waited_ms")[0], 100_000)
    assert entry["paid_ran_ms"] == "10000"
    assert entry.ints("waited_ms")[0] >= 100_000, "the total is kept for the views"
    world.queue("c2", session="s")
    assert world.record("c2")["level"] == "2"
    submitted, due = world.record("c2").ints("submitted_ms", "starves_ms")
    assert 0 <= submitted + 8 * entry.ints("ran_ms")[0] - 8 * 10_000 - due < 2_000, "beta times its run time since"


def test_until_a_promoted_call_has_ended_its_siblings_are_promoted_too(world: World) -> None:
    """The threads of a program run together, so that none is a straggler (section 4.2.2)."""
    worker = world.worker()
    world.charge("s", 5_000, waited_ms=100_000, ran_ms=10_000)
    first = start(world, worker, "c1")
    assert start(world, worker, "c2").level == 0
    end(world, worker, first)
    world.queue("c3", session="s")
    assert world.record("c3")["level"] == "2"


def test_what_a_promoted_call_still_waits_counts_for_the_next_time(world: World) -> None:
    worker = world.worker()
    low(world, "c1", "s")
    starve(world, "c1")
    world.queue("urgent", session="other", priority=-1)
    assert claimed(worker, 1) == ["urgent"]
    assert world.record("c1")["promoted_ms"]
    world.db.hincrby(world.keys.call("c1"), "promoted_ms", -4_000)
    world.db.hincrby(world.keys.call("c1"), "submitted_ms", -34_000)
    call = worker.take()
    assert close_to(call.waited_ms, 4_000)
    worker.finish(call, service=1)
    assert close_to(world.session("s").ints("waited_ms")[0], 34_000)
    assert close_to(world.session("s").ints("paid_waited_ms")[0], 30_000)


def test_a_new_assignment_computes_the_level_again(world: World) -> None:
    worker = world.worker()
    world.charge("s", 5_000, waited_ms=100_000)
    call = start(world, worker, "c1")
    worker.release(call)
    world.db.hset(world.keys.session("s"), "paid_waited_ms", 100_000)
    world.assign("c1")
    assert world.record("c1").ints("level", "promoted_ms") == (2, 0)


@pytest.mark.parametrize("beta", [0.5, 2, 8])
def test_a_sequential_program_waits_at_most_beta_times_its_running_before_each_turn(world: World, beta: float) -> None:
    """If others of its class starve it again and again, it is promoted each time, and never without reason."""
    worker = world.worker()
    world.transitions = world.with_settings(starvation_beta=beta)
    world.charge("s", 5_000)
    run = 4_000
    for i in range(4):
        world.queue(f"c{i}", session="s")
        submitted, due = world.record(f"c{i}").ints("submitted_ms", "starves_ms")
        expected = beta * max(1_000, run if i else 0)
        assert expected - 2_000 * (beta + 1) < due - submitted <= expected + 2_000 * beta, i
        world.db.zadd(world.keys.starving("e1"), {f"c{i}": LONG_AGO})
        world.db.hincrby(world.keys.call(f"c{i}"), "submitted_ms", submitted - due)  # it has waited until then
        end(world, worker, worker.take(), ran=run, service=1)


def test_in_real_time_a_starving_call_passes_those_that_came_later_from_its_moment_on(world: World) -> None:
    worker = world.worker()
    world.transitions = world.with_settings(starvation_beta=0.2)
    low(world, "c1")
    due = world.record("c1").ints("starves_ms")[0]
    assert due == world.record("c1").ints("submitted_ms")[0] + 200
    began: dict[str, int] = {}
    while "c1" not in began:
        world.queue(f"young-{len(began)}")
        call = worker.take()
        began[call.fence.call_id] = world.record(call.fence.call_id).ints("started_ms")[0]
        worker.finish(call)
    assert began.pop("c1") >= due
    assert all(ms < due for ms in began.values()), "and not later"
