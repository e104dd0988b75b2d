"""The life of an engine: registration, lease, death, drain. Each script alone."""

from __future__ import annotations

import pytest

from rsm.broker.protocol.transitions import Transitions
from tests.support.fake_worker import FakeWorker
from tests.support.world import LONG_AGO, World, now_ms

# -- register


def test_register_writes_what_the_worker_says(world: World) -> None:
    worker = FakeWorker(world.settings, server=world.db, max_num_seqs=3)
    assert worker.register() == (True, "0-0", 0, "", "")
    engine = world.engine()
    assert (engine["state"], engine["model"], engine["max_num_seqs"]) == ("STARTING", "m", "3")
    assert engine["incarnation"] == worker.incarnation
    (view,) = world.run(world.transitions.snapshot()).engines
    assert (view.id, view.state, view.model, view.max_num_seqs) == ("e1", "STARTING", "m", 3)


def test_an_engine_that_starts_again_keeps_its_model_until_it_says_another(world: World) -> None:
    FakeWorker(world.settings, server=world.db).register()
    world.lapse()
    assert FakeWorker(world.settings, server=world.db, model="").register().ok
    assert world.run(world.transitions.snapshot()).engines[0].model == "m", "calls of its model must wait, not fail"
    world.lapse()
    assert FakeWorker(world.settings, server=world.db, model="other").register().ok
    assert world.run(world.transitions.snapshot()).engines[0].model == "other"


def test_an_engine_id_is_taken_while_its_lease_holds(world: World) -> None:
    first, second = world.worker(), FakeWorker(world.settings, server=world.db)
    reply = second.register()
    assert (reply.ok, reply.node, reply.pid) == (False, "here", "1")
    assert reply.heartbeat_ms == world.db.zscore(world.keys.engines, "e1")
    assert world.engine()["incarnation"] == first.incarnation
    assert first.register().ok, "its owner may register again"
    world.lapse()
    assert second.register().ok
    assert not first.beat()


def test_an_engine_id_is_free_once_its_worker_stopped(world: World) -> None:
    world.worker().beat("STOPPED")
    assert world.db.ttl(world.keys.engine("e1")) > 0
    assert FakeWorker(world.settings, server=world.db).register().ok
    assert world.db.ttl(world.keys.engine("e1")) == -1


def test_a_worker_that_comes_back_takes_its_calls_back(world: World) -> None:
    dead = world.worker()
    old = world.start("a-ran", dead)
    cancelled = world.start("cancelled", dead)
    world.queue("b-queued")
    world.cancel("cancelled", "enough")
    world.lapse()
    heir = world.worker()
    assert world.waiting() == ["a-ran", "b-queued"], "each keeps the place of its arrival"
    assert (world.state("cancelled"), world.record("cancelled")["error"]) == ("CANCELLED", "enough")
    assert world.record("a-ran").ints("attempt", "failures") == (2, 0)
    assert world.record("a-ran")["deaths"] == dead.incarnation
    assert world.engine().ints("queued_tokens", "running_tokens") == (20, 0)
    assert not world.stream(), "the router need not place it again"
    calls = heir.claim() or ()
    assert [c.fence.call_id for c in calls] == ["a-ran", "b-queued"]
    assert dead.finish(old) == "stale"
    assert dead.finish(cancelled) == "again"
    assert [heir.finish(c) for c in calls] == ["done", "done"]


def test_a_worker_that_keeps_dying_with_a_call_loses_it(world: World) -> None:
    worker = world.worker()
    world.queue("c1", inbox="box")
    for _ in range(world.settings.max_deaths):
        worker.take()
        world.lapse()
        worker = world.worker()
    record = world.record("c1")
    assert (record["state"], record["error_code"]) == ("FAILED", "attempts_exhausted")
    assert world.dead()[0]["error_code"] == "attempts_exhausted"
    assert worker.claim() == []


def test_a_new_worker_gets_no_old_commands(world: World) -> None:
    worker = world.worker()
    world.start("c1", worker)
    world.cancel("c1")
    world.lapse()
    heir = world.worker()
    assert heir.orders() == []
    world.start("c2", heir)
    world.cancel("c2")
    assert [o["id"] for o in heir.orders()] == ["c2"]


def test_a_new_worker_counts_its_claims_from_one(world: World) -> None:
    worker = world.worker()
    world.start("c1", worker)
    assert worker.claims == 1
    world.lapse()
    heir = world.worker()
    assert [c.fence.attempt for c in heir.claim(claim_no=1) or ()] == [2]


# -- heartbeat


def test_a_heartbeat_renews_the_lease_and_reports_the_load(world: World) -> None:
    worker = world.worker()
    world.lapse()
    assert worker.beat(tokens_per_s=12.5)
    assert world.db.zscore(world.keys.engines, "e1") > LONG_AGO
    (view,) = world.run(world.transitions.snapshot()).engines
    assert (view.state, view.tokens_per_s) == ("READY", 12.5)
    assert world.run(world.transitions.reap()) == (0, [])


def test_a_heartbeat_after_the_reaper_is_fenced(world: World) -> None:
    worker = world.worker()
    world.lapse()
    world.run(world.transitions.reap())
    assert not worker.beat()
    assert world.engine()["state"] == "DEAD"
    assert worker.up().beat(), "it can register again"


def test_a_heartbeat_of_a_stranger_is_fenced(world: World) -> None:
    world.worker()
    assert not FakeWorker(world.settings, server=world.db).beat()
    assert not FakeWorker(world.settings, "unknown", server=world.db).beat()
    assert not world.engine("unknown")


def test_a_drain_holds_until_the_worker_has_seen_it(world: World) -> None:
    worker = world.worker()
    world.run(world.transitions.drain("e1"))
    assert worker.beat("READY")
    assert world.engine()["state"] == "DRAINING"
    worker.beat("STOPPED")
    assert world.engine()["state"] == "STOPPED"
    assert not worker.beat("READY")


# -- reap


def test_a_held_lease_is_left_alone(world: World) -> None:
    world.start("c1", world.worker())
    assert world.run(world.transitions.reap()) == (0, [])
    assert world.running() == ["c1"]


def test_a_dead_engines_calls_go_back_to_the_router(world: World) -> None:
    worker = world.worker()
    call = world.start("running", worker, model="m", session="s", prompt_tokens=5000)
    world.queue("queued", prompt_tokens=7)
    world.lapse()
    assert world.run(world.transitions.reap()) == (2, ["e1"])
    assert (world.running(), world.waiting(), world.engine()["state"]) == ([], [], "DEAD")
    assert world.engine().ints("queued_tokens", "running_tokens") == (0, 0)
    assert [f["id"] for _, f in world.stream()] == ["running", "queued"]
    assert world.entry_of("running")[1] == {
        "id": "running", "gen": call.fence.gen, "session": "s", "model": "m", "prompt_tokens": "5000",
    }  # fmt: skip
    assert world.entry_of("queued")[1]["prompt_tokens"] == "7", "it has the same weight as the first time"
    assert world.record("running").ints("attempt", "failures") == (2, 0)
    assert world.record("running")["deaths"] == worker.incarnation
    assert (world.record("queued")["attempt"], world.record("queued")["deaths"]) == ("1", "")
    assert world.run(world.transitions.reap()) == (0, []), "a death is reported once"
    assert 0 < world.db.ttl(world.keys.engine("e1")) <= 3600


def test_reap_moves_a_limited_number_in_each_round(world: World) -> None:
    settings = world.settings.model_copy(update={"batch": 2})
    small = Transitions(world.keys, settings)
    worker = world.worker()
    for i in range(3):
        world.queue(f"r{i}")
    worker.claim()
    for i in range(2):
        world.queue(f"q{i}")
    world.lapse()
    assert [world.run(small.reap()) for _ in range(4)] == [(2, ["e1"]), (2, []), (1, []), (0, [])]
    assert sorted(f["id"] for _, f in world.stream()) == ["q0", "q1", "r0", "r1", "r2"]
    assert world.engine().ints("queued_tokens") == (0,)


def test_reap_shares_its_limit_among_engines(world: World) -> None:
    small = Transitions(world.keys, world.settings.model_copy(update={"batch": 2}))
    for e in ("e1", "e2"):
        world.worker(e)
        for i in range(2):
            world.queue(f"{e}-{i}", e)
        world.lapse(e)
    reaped = [world.run(small.reap()) for _ in range(3)]
    assert [r.moved for r in reaped] == [2, 2, 0]
    assert sorted(e for r in reaped for e in r.engines) == ["e1", "e2"]
    assert len(world.stream()) == 4


def test_a_call_that_dies_with_every_engine_fails(world: World) -> None:
    world.submit("c1", inbox="box")
    for i in range(world.settings.max_deaths):
        worker = world.worker(f"e{i}")
        assert world.assign("c1", f"e{i}").code == "assigned"
        worker.take()
        world.lapse(f"e{i}")
        world.run(world.transitions.reap())
    record = world.record("c1")
    assert (record["state"], record["error_code"], record["attempt"]) == ("FAILED", "attempts_exhausted", "3")
    assert "3 engine processes" in record["error"]
    (letter,) = world.dead()
    assert (letter["error_code"], letter["attempts"]) == ("attempts_exhausted", "3")
    assert world.events("box")[0]["error_code"] == "attempts_exhausted"


@pytest.mark.parametrize(("flag", "state"), [("user", "CANCELLED"), ("deadline", "FAILED")])
def test_a_flagged_call_of_a_dead_engine_ends(world: World, flag: str, state: str) -> None:
    world.start("c1", world.worker(), inbox="box", deadline_ms=1 << 50)
    if flag == "user":
        world.cancel("c1", "enough")
    else:
        world.db.zadd(world.keys.deadlines, {"c1": LONG_AGO})
        world.run(world.transitions.expire())
    world.lapse()
    assert world.run(world.transitions.reap()) == (1, ["e1"])
    assert world.state("c1") == state
    assert world.events("box")[0]["state"] == state
    assert not world.stream()


def test_a_supervisor_may_report_the_death_of_one_incarnation(world: World) -> None:
    worker = world.worker()
    world.queue("c1")
    assert world.run(world.transitions.reap("e1", "another")) == (0, [])
    assert world.run(world.transitions.reap("unknown", "x")) == (0, [])
    assert world.run(world.transitions.reap("e1", worker.incarnation)) == (1, ["e1"])
    assert world.engine()["state"] == "DEAD"


def test_an_engine_dead_for_long_is_no_longer_listed(world: World) -> None:
    world.worker()
    world.lapse()
    world.run(world.transitions.reap())
    assert world.db.zscore(world.keys.engines, "e1") is None
    assert world.db.ttl(world.keys.engine("e1")) > 0


def test_an_engine_newly_dead_stays_listed(world: World) -> None:
    world.worker()
    world.db.zadd(world.keys.engines, {"e1": now_ms(world) - 60_000})
    world.run(world.transitions.reap())
    assert [e.state for e in world.run(world.transitions.snapshot()).engines] == ["DEAD"]


def test_a_stopped_engine_is_not_dead(world: World) -> None:
    world.worker().beat("STOPPED")
    world.lapse()
    assert world.run(world.transitions.reap()) == (0, [])
    assert world.engine()["state"] == "STOPPED"


def test_an_engine_whose_hash_has_expired_is_forgotten_and_not_reported(world: World) -> None:
    worker = world.worker()
    world.start("c1", worker)
    worker.beat("STOPPED")
    world.db.zadd(world.keys.engines, {"e1": now_ms(world) - world.settings.lease_ms - 1})
    world.db.delete(world.keys.engine("e1"))
    assert world.run(world.transitions.reap()) == (1, []), "its remaining calls go to other engines"
    assert world.db.zscore(world.keys.engines, "e1") is None
    assert not world.db.exists(world.keys.engine("e1"))


# -- drain


def test_a_drained_engine_keeps_what_runs_and_gives_back_what_waits(world: World) -> None:
    small = Transitions(world.keys, world.settings.model_copy(update={"batch": 2}))
    worker = world.worker()
    call = world.start("running", worker)
    for i in range(3):
        world.queue(f"q{i}")
    assert [world.run(small.drain("e1")) for _ in range(3)] == [2, 1, 0]
    assert worker.orders() == [{"op": "drain"}]
    assert (world.engine()["state"], world.engine().ints("queued_tokens")) == ("DRAINING", (0,))
    assert [f["id"] for _, f in world.stream()] == ["q0", "q1", "q2"]
    assert world.record("q0")["attempt"] == "1"
    assert worker.finish(call) == "done"


def test_stop_is_sent_also_while_draining(world: World) -> None:
    worker = world.worker()
    world.run(world.transitions.drain("e1"))
    assert world.run(world.transitions.drain("e1", "stop")) == 0
    assert worker.orders() == [{"op": "drain"}, {"op": "stop"}]


def test_a_worker_that_drains_itself_drains_no_successor(world: World) -> None:
    """A worker that hung until another one took its id, or a command that was delayed."""
    old = world.worker()
    world.lapse()
    successor = world.worker()
    assert world.run(world.transitions.drain("e1", incarnation=old.incarnation)) == -1
    assert (world.engine()["state"], successor.orders()) == ("READY", [])
    assert world.run(world.transitions.drain("e1", incarnation=successor.incarnation)) == 0
    assert world.engine()["state"] == "DRAINING"


def test_a_command_is_sent_once_however_many_rounds_it_takes(world: World) -> None:
    worker = world.worker()
    for i in range(3):
        world.queue(f"q{i}")
    small = Transitions(world.keys, world.settings.model_copy(update={"batch": 2}))
    assert [world.run(small.drain("e1", "stop")) for _ in range(3)] == [2, 1, 0]
    assert worker.orders() == [{"op": "stop"}]
    worker.beat("STOPPED")
    worker.up()
    world.run(world.transitions.drain("e1", "stop"))
    assert worker.orders() == [{"op": "stop"}], "it has come back since"


@pytest.mark.parametrize("state", ["none", "STOPPED", "DEAD"])
def test_there_is_no_engine_to_drain(world: World, state: str) -> None:
    if state != "none":
        world.worker()
        world.db.hset(world.keys.engine("e1"), "state", state)
    assert world.run(world.transitions.drain("e1")) == -1
    assert not world.db.exists(world.keys.control("e1"))
