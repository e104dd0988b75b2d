"""What the scripts count and record for routers that estimate costs."""

from __future__ import annotations

import pytest

from rsm.broker.protocol.models import CallRecord
from rsm.broker.protocol.rules import NEW_CACHE, rank_of
from rsm.broker.protocol.snapshot import Ahead
from rsm.broker.protocol.transitions import EngineView, SessionView
from tests.support.world import World


def view(world: World, engine: str = "e1") -> EngineView:
    return next(e for e in world.run(world.transitions.snapshot()).engines if e.id == engine)


def session(world: World, name: str = "s") -> SessionView:
    return world.run(world.transitions.snapshot([name], fleet=False)).sessions[name]


def test_what_waits_is_counted_by_rank(world: World) -> None:
    worker = world.worker()
    world.submit("c1", prompt_tokens=100)
    world.assign("c1", reuse=30)
    world.queue("c2", prompt_tokens=7, priority=-1)
    first, second = rank_of(0, 0), rank_of(-1, 0)
    assert view(world).ahead == {first: Ahead(1, 70), second: Ahead(1, 7)}
    assert world.cancel("c2") == "cancelled"
    assert view(world).ahead == {first: Ahead(1, 70)}
    claimed = worker.take()
    assert (claimed.fence.call_id, claimed.reuse) == ("c1", 30)
    assert not world.db.exists(world.keys.work("e1"))


def test_an_engine_that_has_not_changed_keeps_its_view(world: World) -> None:
    world.worker("e1")
    world.worker("e2")
    before = {e.id: e for e in world.run(world.transitions.snapshot()).engines}
    session(world)  # a snapshot of sessions only forgets no engine
    world.queue("c1", engine="e2")
    after = {e.id: e for e in world.run(world.transitions.snapshot()).engines}
    assert after["e1"] is before["e1"]
    assert after["e2"] is not before["e2"]
    assert after["e2"].queued == 1


def test_a_queue_that_is_given_back_leaves_no_count(world: World) -> None:
    world.worker()
    world.queue("c1")
    world.run(world.transitions.drain("e1"))
    assert not world.db.exists(world.keys.work("e1"))


def test_an_engine_says_how_long_its_prompts_will_take(world: World) -> None:
    worker = world.worker()
    assert worker.beat(speed="0.01 0.01 0.001")
    world.submit("c1", prompt_tokens=1000)
    world.assign("c1", reuse=400)
    worker.take()
    assert view(world).prefill_s == pytest.approx(6, abs=0.5)
    assert view(world).speed is not None


def test_a_cache_ages_by_what_its_engine_computes(world: World) -> None:
    worker = world.worker()
    worker.finish(
        world.start("c1", worker, session="s"),
        prompt_tokens=100, cached_tokens=60, completion_tokens=5, resident_tokens=105,
    )  # fmt: skip
    seen = session(world)
    assert (view(world).computed, seen.used["e1"].computed) == (45, 45)
    assert (seen.completed, seen.completion_tokens) == (1, 5)
    assert 0 <= seen.used["e1"].idle_s < 60


def test_an_engine_whose_process_died_has_an_empty_cache(world: World) -> None:
    world.worker()
    world.lapse()
    world.worker()
    assert view(world).computed == NEW_CACHE


def test_a_record_has_the_costs(world: World) -> None:
    world.worker()
    world.submit("c1")
    world.assign("c1", costs="e1=120 e2=3400", reuse=4)
    found = CallRecord.from_hash("c1", world.db.hgetall(world.keys.call("c1")))
    assert (found.costs, found.reuse) == ({"e1": 0.12, "e2": 3.4}, 4)


def test_a_session_is_seen_with_its_programs_level(world: World) -> None:
    worker = world.worker()
    worker.finish(world.start("c1", worker, session="s"), service=5_000)
    assert (session(world).program, session(world).service, session(world).level) == ("s", 5_000, 2)
    assert world.run(world.transitions.snapshot(["s"], fleet=False)).engines == []


def test_the_priority_is_on_the_stream(world: World) -> None:
    world.submit("c1", priority=-5)
    world.submit("c2")
    entries = {f["id"]: f for _, f in world.stream()}
    assert (entries["c1"]["priority"], "priority" in entries["c2"]) == ("-5", False)
