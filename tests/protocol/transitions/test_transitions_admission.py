"""Admission in Redis: which calls are throttled, and in which order they are admitted."""

from __future__ import annotations

import pytest

from rsm.broker.protocol.models import RequestState
from rsm.broker.protocol.rules import rank_of
from rsm.broker.protocol.snapshot import SessionView
from tests.support.admission_world import CAPACITY, HALF_S, Rooms
from tests.support.world import LONG_AGO, World


@pytest.fixture
def rooms(world: World) -> Rooms:
    return Rooms(world)


def session(rooms: Rooms, name: str) -> SessionView:
    return rooms.world.run(rooms.world.transitions.snapshot([name], fleet=False)).sessions[name]


# -- what is counted


def test_a_context_counts_while_its_call_is_an_engines_and_fades_then(rooms: Rooms) -> None:
    worker = rooms.engine()
    assert rooms.bring("c1", 600, session="s") == "assigned"
    assert (rooms.account(), rooms.shares("s")) == ((1, 600, 0), {"e1": (1, 600)})
    call = worker.take()
    worker.finish(call, resident_tokens=640)
    assert (rooms.account(), rooms.shares("s")) == ((0, 0, 640), {"e1": (0, 640)})
    rooms.think("e1", HALF_S)
    seen = session(rooms, "s").shares["e1"]
    assert seen.tokens == pytest.approx(320, abs=10)
    assert (seen.cached, seen.active) == (True, False)
    rooms.think("e1", 1.1 * HALF_S)
    assert not session(rooms, "s").shares["e1"].cached


def test_a_router_sees_what_is_spoken_for_by_tier(rooms: Rooms) -> None:
    rooms.engine()
    rooms.world.charge("old", 5_000)
    rooms.bring("c1", 100)
    rooms.bring("c2", 200, session="old")
    rooms.bring("c3", 300, priority=1)
    (engine,) = rooms.world.run(rooms.world.transitions.snapshot()).engines
    assert list(engine.spoken_for) == [100, 0, 200, *[0] * 12, 300]
    seen = session(rooms, "old").shares["e1"]
    assert (seen.tokens, seen.cached, seen.active, seen.tier) == (200, True, True, 2)
    rooms.use(admission=False)
    (engine,) = rooms.world.run(rooms.world.transitions.snapshot()).engines
    assert (list(engine.spoken_for), session(rooms, "old").shares) == ([], {})


def test_parallel_calls_of_a_session_share_what_is_not_new(rooms: Rooms) -> None:
    rooms.engine()
    rooms.bring("c1", 600, session="s")
    assert rooms.bring("c2", 650, session="s", new=50) == "assigned"
    assert rooms.account() == (2, 650, 0)


def test_a_call_without_a_session_leaves_nothing_behind(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 600, session="c1")
    worker.finish(worker.take(), resident_tokens=640)
    assert rooms.account() == (0, 0, 0)
    assert not rooms.world.db.exists(rooms.world.keys.residency("c1"))


def test_a_session_that_is_ended_frees_its_headroom(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 900, session="s")
    worker.finish(worker.take(), resident_tokens=900)
    assert rooms.bring("c2", 900) == "held"
    assert rooms.world.run(rooms.world.transitions.session("end", "s")) == 0
    assert rooms.account() == (0, 0, 0)
    assert rooms.admit() == ["c2"]


def test_what_a_session_has_lasts_while_its_calls_do(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 100, session="s")
    key = rooms.world.keys.residency("s")
    assert rooms.world.db.ttl(key) == -1
    worker.finish(worker.take(), resident_tokens=100)
    assert rooms.world.db.ttl(key) > 0


def test_nothing_is_written_where_programs_are_not_admitted(rooms: Rooms) -> None:
    rooms.use(admission=False)
    rooms.engine()
    for call_id in ("c1", "c2"):
        assert rooms.bring(call_id, 900) == "assigned"
    assert not rooms.world.record("c1")["context"]
    names = [key.decode() for key in rooms.world.db.scan_iter(match="*resid*")]
    assert [n for n in names if n.startswith(rooms.world.keys.prefix)] == []


# -- who waits


def test_a_call_without_headroom_is_throttled(rooms: Rooms) -> None:
    rooms.engine()
    assert rooms.bring("c1", 600) == "assigned"
    assert rooms.bring("c2", 401) == "held"
    record = rooms.world.record("c2")
    assert (record["state"], record["engine"], rooms.held(), rooms.on_stream()) == ("PENDING", "", ["c2"], [])
    assert "401 tokens" in record["why"]
    assert rooms.bring("c3", 399, priority=-1) == "assigned", "there is headroom, and it goes before the throttled call"
    assert rooms.world.stat("held") == 1


def test_a_router_may_throttle_a_call_itself(rooms: Rooms) -> None:
    rooms.engine()
    rooms.world.submit("c1")
    assert rooms.place("c1", 5, "", throttle=True, why="no headroom") == "held"
    assert rooms.world.record("c1")["why"] == "no headroom"
    assert rooms.admit() == ["c1"]
    assert rooms.place("c1", 5) == "assigned"


def test_two_routers_at_once_do_not_overfill(rooms: Rooms) -> None:
    """Each router saw an empty engine."""
    rooms.engine()
    world = rooms.world
    for n in range(4):
        world.submit(f"c{n}", session=f"s{n}")
    choices = [world.placement(f"c{n}", context=300, new=300) for n in range(4)]
    first, second = world.transitions.assign(choices[::2]), world.transitions.assign(choices[1::2])
    codes = [p.code for p in (*world.run(first), *world.run(second))]
    assert codes == ["assigned", "assigned", "assigned", "held"]
    assert rooms.account() == (3, 900, 0)


def test_an_entry_that_two_routers_have_read_is_throttled_or_placed_once(rooms: Rooms) -> None:
    rooms.engine()
    world = rooms.world
    world.submit("c1")
    throttled = world.transitions.assign([world.placement("c1", "", throttle=True, context=10)])
    place = world.transitions.assign([world.placement("c1", context=10, new=10)])
    assert [world.run(c)[0].code for c in (throttled, throttled, place, throttled, place)] == [
        "held", "held", "assigned", "stale", "stale",
    ]  # fmt: skip
    assert (rooms.held(), rooms.account()) == ([], (1, 10, 0))
    assert not world.record("c1")["starves_ms"]


def test_cached_sessions_do_not_wait_after_others(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 600, session="s")
    worker.finish(worker.take(), resident_tokens=600)
    rooms.bring("c2", 500)
    assert rooms.held() == ["c2"]
    assert rooms.bring("c3", 100) == "held", "there is headroom for it, but it came later"
    assert "throttled calls ahead of it" in rooms.world.record("c3")["why"]
    assert rooms.bring("c4", 700, session="s") == "assigned"
    assert rooms.account() == (1, 700, 0)


def test_contexts_of_worse_tiers_are_headroom(rooms: Rooms) -> None:
    rooms.engine()
    rooms.world.charge("old", 5_000)
    assert rooms.bring("c1", 900, session="old") == "assigned"
    assert rooms.bring("c2", 900) == "assigned", "the engine evicts the other context"
    assert rooms.bring("c3", 200, session="old") == "held", "and its next call must be admitted again"


def test_a_context_larger_than_the_cache_goes_where_nothing_runs(rooms: Rooms) -> None:
    worker = rooms.engine()
    assert rooms.bring("c1", 100) == "assigned"
    assert rooms.bring("c2", 5_000) == "held"
    worker.finish(worker.take(), resident_tokens=100)
    assert rooms.on_stream() == ["c2"]
    assert rooms.place("c2", 5_000) == "assigned"


def test_an_engine_that_reports_no_size_has_headroom(rooms: Rooms) -> None:
    rooms.engine(kv_tokens=0)
    assert [rooms.bring(f"c{n}", 10**6) for n in range(3)] == ["assigned"] * 3


def test_a_factor_makes_headroom(rooms: Rooms) -> None:
    rooms.engine()
    rooms.use(admission=True, admission_factor=2.0)
    assert [rooms.bring(f"c{n}", CAPACITY) for n in range(3)] == ["assigned", "assigned", "held"]


def test_a_throttled_call_binds_no_session(rooms: Rooms) -> None:
    rooms.engine()
    rooms.bring("c1", 900)
    rooms.world.submit("c2", session="s")
    assert rooms.place("c2", 900, bind=True) == "held"
    assert not rooms.world.session("s")["engine"]


# -- which calls are admitted


def test_an_end_admits_calls_that_fit_then(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 600, session="c1")
    rooms.bring("c2", 500)
    rooms.bring("c3", 500)
    rooms.bring("c4", 500)
    worker.finish(worker.take())
    assert (rooms.on_stream(), rooms.held()) == (["c2", "c3"], ["c4"])
    entry, fields = rooms.world.entry_of("c2")
    assert (entry != fields["gen"], fields["level"]) == (True, "0"), "a new entry, with the level at which it waited"
    assert [rooms.place(c, 500) for c in ("c2", "c3")] == ["assigned", "assigned"]
    assert rooms.account() == (2, 1000, 0)
    assert rooms.world.record("c2")["why"] == "a test says so"


def test_an_end_admits_no_call_that_its_engine_does_not_serve(rooms: Rooms) -> None:
    worker, other = rooms.engine(), rooms.engine("e2", "m2")
    rooms.bring("c1", 900, session="c1")
    rooms.bring("c2", 900, "e2", session="c2")
    rooms.bring("c3", 500, "e2", model="m2")
    worker.finish(worker.take())
    assert (rooms.on_stream(), rooms.held("m2"), rooms.admit()) == ([], ["c3"], [])
    other.finish(other.take())
    assert rooms.on_stream() == ["c3"]


def test_a_full_engine_does_not_throttle_calls_of_another_model(rooms: Rooms) -> None:
    rooms.engine()
    rooms.engine("e2", "m2")
    rooms.bring("c1", 900)
    assert [rooms.bring(f"h{n}", 900, model="m") for n in range(6)] == ["held"] * 6
    assert rooms.bring("c2", 500, "e2", model="m2") == "assigned"


def test_calls_that_name_no_model_and_calls_that_do_wait_in_one_order(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 1000, session="c1")
    rooms.bring("c2", 700, model="m")
    rooms.bring("c3", 700)
    rooms.bring("c4", 300, model="m")
    worker.finish(worker.take())
    assert (rooms.on_stream(), rooms.held(), rooms.held("m")) == (["c2", "c4"], ["c3"], [])


def test_class_then_level_then_arrival_decide(rooms: Rooms) -> None:
    rooms.engine()
    rooms.world.charge("old", 5_000)
    rooms.bring("c1", 1000, priority=-128)
    for call_id, name, priority in [
        ("last", "a", 1), ("old", "old", 0), ("new-1", "b", 0), ("new-2", "c", 0), ("first", "old", -1),
    ]:  # fmt: skip
        assert rooms.bring(call_id, 1000, session=name, priority=priority) == "held"
    assert rooms.held() == ["first", "new-1", "new-2", "old", "last"]


def test_a_few_may_go_ahead_of_one_that_fits_nowhere(rooms: Rooms) -> None:
    rooms.engine()
    rooms.bring("c1", 500)
    rooms.bring("large", 900)
    for n in range(5):
        rooms.bring(f"small{n}", 50)
    assert rooms.admit() == ["small0", "small1", "small2"]
    assert rooms.place("small0", 50) == "assigned", "although the large call is before it"
    assert rooms.held() == ["large", "small3", "small4"]


def test_all_wait_after_four_that_fit_nowhere(rooms: Rooms) -> None:
    rooms.engine()
    rooms.bring("c1", 500)
    for n in range(4):
        rooms.bring(f"large{n}", 900)
    rooms.bring("small", 50)
    assert rooms.admit() == []


def test_all_wait_after_one_that_starves(rooms: Rooms) -> None:
    """It is new, so it is in the first level. It has waited eight times its run time, which counts as a second."""
    worker = rooms.engine()
    rooms.bring("c1", 500, session="c1")
    rooms.bring("large", 900)
    rooms.bring("small", 50)
    rooms.age("large", 8_001)
    assert rooms.admit() == []
    worker.finish(worker.take())
    assert rooms.on_stream() == ["large", "small"]


def test_one_that_starves_is_admitted_before_better_levels(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.world.charge("old", 5_000)
    rooms.bring("c1", 1000, session="c1")
    for call_id, name in (("old", "old"), ("new", "a")):
        rooms.bring(call_id, 1000, session=name)
    assert rooms.held() == ["new", "old"]
    rooms.age("old", 9_000)
    worker.finish(worker.take())
    assert (rooms.on_stream(), rooms.held()) == (["old"], ["new"])
    assert rooms.world.entry_of("old")[1]["level"] == "0"
    assert rooms.place("old", 1000) == "assigned"
    record = rooms.world.record("old")
    assert (record["level"], bool(record["promoted_ms"])) == ("", True)
    assert float(rooms.world.db.zscore(rooms.world.keys.queue("e1"), "old")) < rank_of(0, 1) * 2.0**41


def test_an_admitted_call_that_finds_no_headroom_waits_at_its_old_place(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 900, session="c1")
    rooms.bring("c2", 900)
    rooms.bring("c3", 900)
    worker.finish(worker.take())
    assert rooms.bring("urgent", 900, priority=-1) == "assigned"
    assert rooms.place("c2", 900) == "held"
    assert rooms.held() == ["c2", "c3"]
    assert rooms.world.stat("held") == 2, "counted once each"
    assert not rooms.world.record("c2")["let_in"]


def test_a_tick_admits_calls_that_fit_elsewhere(rooms: Rooms) -> None:
    rooms.engine()
    rooms.bring("c1", 900)
    for n in range(8):
        rooms.bring(f"h{n}", 200)
    rooms.engine("e2")
    assert rooms.admit() == [f"h{n}" for n in range(5)]


def test_programs_that_think_gradually_make_headroom(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 800, session="s")
    worker.finish(worker.take(), resident_tokens=800)
    rooms.bring("c2", 600)
    assert rooms.admit() == []
    rooms.think("e1", 1.1 * HALF_S)
    assert rooms.admit() == ["c2"]


# -- other outcomes


def test_a_cancel_ends_a_throttled_call(rooms: Rooms) -> None:
    rooms.engine()
    rooms.bring("c1", 900)
    rooms.bring("c2", 900, session="s", inbox="box")
    rooms.bring("c3", 900, session="s")
    assert rooms.world.cancel("c2") == "cancelled"
    assert (rooms.world.state("c2"), rooms.held()) == ("CANCELLED", ["c3"])
    assert [n["state"] for n in rooms.world.events("box")] == ["CANCELLED"]
    assert rooms.world.cancel_session("s") == 1
    assert rooms.held() == []
    assert rooms.admit() == []
    assert not rooms.world.db.exists(rooms.world.keys.holding, rooms.world.keys.held_starving(""))


def test_a_cancelled_session_leaves_no_starving_call(rooms: Rooms) -> None:
    rooms.engine()
    rooms.world.charge("old", 5_000)
    rooms.bring("c1", 900)
    rooms.bring("c2", 900, session="old")
    assert rooms.world.db.zcard(rooms.world.keys.held_starving("")) == 1
    rooms.world.cancel("c2")
    assert not rooms.world.db.exists(rooms.world.keys.held_starving(""))


def test_a_deadline_ends_a_throttled_call(rooms: Rooms) -> None:
    rooms.engine()
    rooms.bring("c1", 900)
    rooms.bring("c2", 900, deadline_ms=1 << 50)
    rooms.world.db.zadd(rooms.world.keys.deadlines, {"c2": LONG_AGO})
    rooms.world.run(rooms.world.transitions.expire())
    assert (rooms.world.record("c2")["error_code"], rooms.held()) == ("deadline_exceeded", [])


def test_a_waiting_call_that_is_cancelled_frees_its_headroom(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 900, session="s")
    rooms.world.cancel("c1")
    assert (rooms.account(), rooms.shares("s")) == ((0, 0, 0), {})
    rooms.bring("c2", 900, session="s")
    rooms.world.db.hset(rooms.world.keys.call("c2"), "deadline_ms", LONG_AGO)
    assert worker.claim() == []
    assert rooms.account() == (0, 0, 0)


def test_a_call_that_is_given_back_frees_its_headroom(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 400, session="s")
    rooms.bring("c2", 500)
    worker.release(worker.take())
    assert (rooms.account(), rooms.shares("s")) == ((1, 500, 0), {})
    assert not rooms.world.record("c1")["context"]
    rooms.world.run(rooms.world.transitions.drain("e1"))
    assert rooms.account() == (0, 0, 0)


def test_a_dead_letter_frees_its_headroom(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.use(admission=True, max_attempts=1)
    rooms.bring("c1", 400)
    worker.transitions = rooms.world.transitions
    worker.release(worker.take(), fault=True)
    assert (rooms.world.state("c1"), rooms.account()) == ("FAILED", (0, 0, 0))


def test_a_call_that_fails_leaves_what_its_engine_says(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 400, session="s")
    worker.fail(worker.take())
    assert (rooms.account(), rooms.shares("s")) == ((0, 0, 0), {})
    rooms.bring("c2", 400, session="s")
    worker.finish(worker.take(), state=RequestState.CANCELLED, resident_tokens=300)
    assert (rooms.account(), rooms.shares("s")) == ((0, 0, 300), {"e1": (0, 300)})


def test_an_engine_that_died_takes_its_residents_with_it(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 300, session="s")
    worker.finish(worker.take(), resident_tokens=300)
    for call_id in ("c2", "c3"):
        rooms.bring(call_id, 300)
    worker.take()
    rooms.world.lapse()
    rooms.world.run(rooms.world.transitions.reap())
    assert not rooms.world.db.exists(rooms.world.keys.residents("e1"))
    rooms.engine()
    assert session(rooms, "s").shares["e1"].cached is False, "its cache is gone"
    assert [rooms.place(c, 300) for c in ("c2", "c3")] == ["assigned", "assigned"]
    assert rooms.bring("c4", 400, session="s") == "assigned"
    assert rooms.account() == (3, 1000, 0)


def test_an_engine_that_comes_back_has_its_calls_and_an_empty_cache(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 300, session="s")
    worker.finish(worker.take(), resident_tokens=300)
    for call_id in ("c2", "c3"):
        rooms.bring(call_id, 300, session=f"of-{call_id}")
    worker.take()
    rooms.world.lapse()
    heir = rooms.engine()
    assert rooms.account() == (2, 600, 0)
    assert not session(rooms, "s").shares["e1"].cached
    assert session(rooms, "of-c2").shares["e1"].active
    assert rooms.bring("c4", 401) == "held"
    for call in heir.claim() or ():
        heir.finish(call, resident_tokens=300)
    assert rooms.account()[:2] == (0, 0)


def test_a_process_that_lives_keeps_its_cache(rooms: Rooms) -> None:
    """Its lease expired while it hung."""
    worker = rooms.engine()
    rooms.bring("c1", 300, session="s")
    worker.finish(worker.take(), resident_tokens=300)
    before, worker.incarnation = worker.incarnation, "another"
    rooms.world.lapse()
    assert worker.register(survived=before).ok
    assert session(rooms, "s").shares["e1"].cached


def test_calls_of_a_model_that_no_engine_serves_are_no_longer_throttled(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 900)
    rooms.bring("c2", 900, model="m")
    rooms.bring("c3", 900)
    worker.beat("DRAINING")
    assert sorted(rooms.admit()) == ["c2", "c3"]
    assert rooms.place("c2", 0, "") == "parked"


def test_no_call_stays_throttled_when_admission_is_switched_off(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 900)
    for n in range(3):
        rooms.bring(f"h{n}", 900, model="m")
    rooms.use(admission=False)
    assert rooms.admit() == ["h0", "h1", "h2"]
    assert [rooms.place(f"h{n}", 0) for n in range(3)] == ["assigned"] * 3
    for call in worker.claim() or ():
        worker.finish(call)
    assert rooms.account()[:2] == (0, 0)
    assert not rooms.world.db.exists(rooms.world.keys.holding)


def test_a_record_that_was_deleted_by_hand_blocks_no_call(rooms: Rooms) -> None:
    rooms.engine()
    rooms.bring("c1", 900)
    rooms.bring("c2", 900)
    rooms.bring("c3", 900)
    for call_id in ("c1", "c2"):
        rooms.world.forget(call_id)
        rooms.world.db.zrem(rooms.world.keys.queue("e1"), call_id)
        rooms.world.db.srem(rooms.world.keys.session_calls(f"of-{call_id}"), call_id)
        rooms.world.db.delete(rooms.world.keys.residency(f"of-{call_id}"))
    assert rooms.admit() == ["c3"]
    assert rooms.place("c3", 900) == "assigned"


@pytest.mark.parametrize("admission", [True, False])
def test_throttled_records_that_were_deleted_by_hand_block_no_call(rooms: Rooms, admission: bool) -> None:
    world = rooms.world
    rooms.engine()
    world.charge("old", 5_000)
    rooms.bring("c1", 900)
    rooms.bring("c2", 900, session="old")
    rooms.age("c2", 60_000)
    world.forget("c2")
    world.db.srem(world.keys.session_calls("old"), "c2")
    assert rooms.bring("c3", 50, priority=-1) == "assigned"
    rooms.use(admission=admission)
    assert rooms.admit() == []
    assert not world.record("c2")
    assert not world.db.exists(world.keys.held(""), world.keys.holding)


@pytest.mark.parametrize(
    "junk", [b"", b"x", b"1 2", b"nan inf -1 99 e", b"1e400 1e400 1e400 1e400", b"\xff \xff \xff \xff"]
)
def test_junk_in_an_account_blocks_no_call(rooms: Rooms, junk: bytes) -> None:
    worker, world = rooms.engine(), rooms.world
    rooms.bring("c1", 600, session="s")
    rooms.bring("c2", 600)
    for field in ("at", "half", "factor", "calls", "epoch", "active", "thinking"):
        world.db.hset(world.keys.residents("e1"), field, junk)
    world.db.hset(world.keys.residency("s"), "e1", junk)
    world.run(world.transitions.snapshot(["s"]))
    worker.finish(worker.take(), resident_tokens=600)
    rooms.admit()
    rooms.bring("c3", 100, session="s")
    world.db.hset(world.keys.residency("s"), "e1", junk)
    world.run(world.transitions.session("end", "s"))
    world.cancel_session("s")
    world.db.delete(world.keys.residency("s"))


def test_an_engines_accounts_expire_with_it(rooms: Rooms) -> None:
    worker = rooms.engine()
    rooms.bring("c1", 300, session="s")
    worker.finish(worker.take(), resident_tokens=300)
    key = rooms.world.keys.residents("e1")
    assert rooms.world.db.ttl(key) == -1
    worker.beat("STOPPED")
    assert rooms.world.db.ttl(key) > 0
    rooms.engine()
    assert rooms.world.db.ttl(key) == -1
