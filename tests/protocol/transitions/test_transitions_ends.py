"""How an attempt ends: with a result, or given back. Each script alone."""

from __future__ import annotations

import pytest

from rsm.broker import RequestState
from rsm.broker.protocol import codec
from rsm.broker.protocol.transitions import Finish
from tests.support.world import World

# -- finish


def test_an_end_after_a_gap_changes_nothing(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True)
    worker.publish(call, "a")
    before = world.record("c1")
    assert worker.finish(call, events=2) == "gap"
    assert (world.record("c1"), world.running()) == (before, ["c1"])
    assert worker.finish(call, state=RequestState.CANCELLED, events=2) == "done", "only COMPLETED needs all events"
    whole = world.start("c2", worker, stream=True)
    worker.publish(whole, "a")
    assert worker.finish(whole, events=1) == "done"


def test_finish_ends_a_call(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, session="s", stream=True, inbox="box")
    worker.publish(call, "a")
    assert worker.finish(call, "done", prompt_tokens=100, completion_tokens=7, cached_tokens=60) == "done"
    record = world.record("c1")
    assert record["state"] == "COMPLETED"
    assert (record["prompt_tokens"], record["completion_tokens"], record["cached_tokens"]) == ("100", "7", "60")
    assert not record["body"]
    assert world.result("c1")["text"] == "done"
    assert not world.running()
    assert world.engine().ints("running_tokens") == (0,)
    assert not world.open_calls("s")
    assert world.db.lrange(world.keys.session_recent("s"), 0, -1) == [b"c1"]
    assert world.stat("completed") == 1
    assert (world.stat("prompt_tokens"), world.stat("completion_tokens"), world.stat("cached_tokens")) == (100, 7, 60)


def test_the_end_is_reported_once_with_the_result(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, session="s", stream=True, inbox="box")
    worker.publish(call, "a")
    assert worker.finish(call) == "done"
    assert worker.finish(call, "other") == "again"
    end = world.events("box")[-1]
    assert len([n for n in world.events("box") if "state" in n]) == 1
    assert (end["call"], end["state"], end["n"], end["session"], end["engine"]) == ("c1", "COMPLETED", "1", "s", "e1")
    assert (end["attempt"], end["gen"]) == ("1", call.fence.gen)
    assert end["big"] in ("", "0")
    assert world.result("c1")["text"] == "done"
    last = world.log("c1")[-1][1]
    assert (last["n"], last["state"], last["error_code"], last["error"]) == ("1", "COMPLETED", "", "")


def test_a_big_result_stays_in_the_record(world: World) -> None:
    worker = world.worker()
    worker.finish(world.start("c1", worker, inbox="box"), "x" * 70_000)
    (end,) = world.events("box")
    assert (end["big"], end["result"]) == ("1", "")
    assert len(world.result("c1")["text"]) == 70_000


def test_all_that_a_finished_call_leaves_expires(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, session="s", stream=True, inbox="box", deadline_ms=1 << 50)
    worker.publish(call, "a")
    worker.finish(call, resident_tokens=5)
    k = world.keys
    for key in (k.call("c1"), k.events("c1"), k.inbox("box"), k.session("s"), k.session_recent("s"), k.affinity("s")):
        assert 0 < world.db.ttl(key) <= 3600, key
    assert not world.db.exists(k.deadlines, k.session_calls("s"), k.running("e1"), k.queue("e1"))


@pytest.mark.parametrize("state", [RequestState.COMPLETED, RequestState.FAILED])
def test_an_acknowledged_cancel_beats_the_finish(world: World, state: RequestState) -> None:
    worker = world.worker()
    call = world.start("c1", worker, inbox="box")
    assert world.cancel("c1", "no longer needed") == "cancelling"
    assert worker.finish(call, "almost", state, error_code="engine_error", error="Broken.") == "done"
    record = world.record("c1")
    assert (record["state"], record["error_code"], record["error"]) == ("CANCELLED", "", "no longer needed")
    assert world.result("c1")["text"] == "almost"
    assert world.events("box")[-1]["state"] == "CANCELLED"


def test_a_failed_call_keeps_its_body(world: World) -> None:
    worker = world.worker()
    assert worker.fail(world.start("c1", worker)) == "done"
    record = world.record("c1")
    assert (record["state"], record["error_code"], record["error"]) == ("FAILED", "engine_error", "The engine broke.")
    assert "body" in record


def test_a_finish_under_an_old_fence_changes_nothing(world: World) -> None:
    """Also from the same engine, which has the call again."""
    worker = world.worker()
    old = world.start("c1", worker)
    worker.release(old, fault=False)
    before = world.record("c1")
    assert worker.finish(old) == "stale"
    world.assign("c1")
    assert worker.finish(old) == "stale"
    new = worker.take()
    assert worker.finish(old) == "stale"
    assert before["state"] == "PENDING"
    assert world.running() == ["c1"]
    assert worker.finish(new) == "done"


def test_after_reassignment_the_old_engine_can_change_nothing(world: World) -> None:
    old_worker, new_worker = world.worker("e1"), world.worker("e2")
    old = world.start("c1", old_worker, stream=True, inbox="box")
    world.lapse("e1")
    world.run(world.transitions.reap())
    world.assign("c1", "e2")
    new = new_worker.take()
    before = (world.record("c1"), world.events("box"), world.log("c1"), world.session("c1"), world.engine("e1"))
    assert old_worker.publish(old, "late") == ["stale"]
    assert old_worker.finish(old) == "stale"
    assert old_worker.release(old, fault=True) == ["stale"]
    assert not old_worker.beat()
    forged = old_worker.finish(old, fence=new.fence)
    assert forged == "stale", "the right fence from the wrong engine is also stale"
    after = (world.record("c1"), world.events("box"), world.log("c1"), world.session("c1"), world.engine("e1"))
    assert after == before
    assert new_worker.finish(new) == "done"


def test_service_is_the_longest_path_not_the_sum(world: World) -> None:
    worker = world.worker()
    for call_id in ("a", "b"):
        world.queue(call_id, session="s")
    a, b = worker.take(), worker.take()
    worker.finish(a, prompt_tokens=100, cached_tokens=40, completion_tokens=20)  # 60 + 2 x 20
    assert world.session("s")["service"] == "100"
    worker.finish(b, prompt_tokens=30, completion_tokens=10)  # 50, parallel to a: the critical path stays
    assert world.session("s")["service"] == "100"
    worker.finish(world.start("c", worker, session="s"), prompt_tokens=10, completion_tokens=10)  # after both: 100 + 30
    assert world.session("s")["service"] == "130"
    assert world.record("c")["inherited"] == "100"


def test_service_is_the_sum_of_all_calls_with_rule_total(world: World) -> None:
    world.transitions = world.with_settings(service_rule="total")
    worker = world.worker()
    for call_id in ("a", "b"):
        world.queue(call_id, session="s")
    for call, service in zip([worker.take(), worker.take()], (100, 50), strict=True):
        end = worker.end_of(call, service=service)
        assert world.run(world.transitions.finish("e1", [end])) == ["done"]
        assert world.run(world.transitions.finish("e1", [end])) == ["again"], "a repeated end costs nothing"
    assert world.session("s")["service"] == "150"
    assert world.charge("s", 30) == 180


def test_finish_writes_where_the_cache_is(world: World) -> None:
    worker = world.worker()
    worker.finish(world.start("c1", worker, session="s"), resident_tokens=50)
    tokens, used, computed = codec.text(world.db.hget(world.keys.affinity("s"), "e1")).split(":")
    assert (tokens, int(used)) == ("50", int(world.record("c1")["finished_ms"]))
    assert computed == world.engine()["computed"]
    worker.finish(world.start("c2", worker, session="s"), resident_tokens=0)
    assert world.db.hget(world.keys.affinity("s"), "e1").startswith(b"50:"), "0 = the engine does not know"
    worker.finish(world.start("alone", worker), resident_tokens=50)
    assert not world.db.exists(world.keys.affinity("alone")), "a session of one call needs no affinity"


def test_finishes_of_a_batch_are_judged_one_by_one(world: World) -> None:
    worker = world.worker()
    for call_id in ("a", "b"):
        world.queue(call_id)
    a, b = worker.take(), worker.take()
    worker.release(b, fault=False)
    ends = [Finish(c.fence, RequestState.COMPLETED, "", "", b"\x80", 1, 1, 0, 0) for c in (a, b, a)]
    assert world.run(world.transitions.finish("e1", ends)) == ["done", "stale", "again"]


def test_the_engines_own_count_of_tokens_replaces_the_estimate(world: World) -> None:
    worker = world.worker()
    for call_id, tokens in (("c1", 12), ("c2", 0)):
        worker.finish(world.start(call_id, worker, inbox="box"), prompt_tokens=tokens)
        assert world.record(call_id).ints("prompt_tokens") == (tokens,)
        assert world.events("box")[-1].ints("prompt_tokens") == (tokens,)
    assert world.engine().ints("queued_tokens", "running_tokens") == (0, 0)


# -- release


def test_a_graceful_give_back_does_not_count(world: World) -> None:
    worker = world.worker()
    world.queue("c1", prompt_tokens=9)
    for n in range(1, 6):
        call = worker.take()
        assert call.fence.attempt == n
        assert worker.release(call, fault=False) == ["released"]
        assert (world.record("c1").ints("failures"), world.state("c1"), world.running()) == ((0,), "PENDING", [])
        entry, fields = world.entry_of("c1")
        assert fields == {"id": "c1", "gen": call.fence.gen, "session": "c1", "model": "", "prompt_tokens": "9"}
        assert entry != call.fence.gen
        assert world.assign("c1").code == "assigned"
    assert world.engine().ints("running_tokens") == (0,)
    assert world.stat("requeued") == 5


def test_faults_count_up_to_the_last_attempt(world: World) -> None:
    worker = world.worker()
    world.queue("c1", prompt="tell me", session="s", inbox="box", model="m")
    for _ in range(world.settings.max_attempts - 1):
        assert worker.release(worker.take(), fault=True) == ["released"]
        assert world.state("c1") == "PENDING"
        world.assign("c1")
    assert worker.release(worker.take(), fault=True, error="Out of memory.") == ["released"]
    record = world.record("c1")
    assert (record["state"], record["error_code"], record["error"]) == ("FAILED", "engine_error", "Out of memory.")
    assert record.ints("failures", "attempt") == (3, 3)
    (letter,) = world.dead()
    assert (letter["id"], letter["error_code"], letter["session"], letter["model"]) == ("c1", "engine_error", "s", "m")
    assert letter["attempts"] == "3"
    (_, raw) = world.db.xrange(world.keys.dead)[0]
    assert codec.decode(raw[b"body"]) == {"prompt": "tell me"}
    assert [n["state"] for n in world.events("box")] == ["FAILED"]
    assert not world.stream()


def test_a_raw_json_body_goes_into_its_dead_letter(world: World) -> None:
    worker = world.worker()
    world.accept(world.push("c1"), "c1")
    for _ in range(world.settings.max_attempts):
        world.assign("c1")
        worker.release(worker.take(), fault=True)
    assert world.dead()[0]["json"] == '{"prompt":"hi"}'


def test_release_under_an_old_fence_changes_nothing(world: World) -> None:
    worker = world.worker()
    old = world.start("c1", worker)
    assert worker.release(old, old, fault=True) == ["released", "stale"]
    world.assign("c1")
    assert worker.release(old, fault=True) == ["stale"]
    assert world.waiting() == ["c1"]


def test_a_flagged_call_given_back_is_cancelled(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, inbox="box")
    world.cancel("c1", "enough")
    assert worker.release(call, fault=False) == ["released"]
    assert (world.state("c1"), world.record("c1")["error"]) == ("CANCELLED", "enough")
    assert world.events("box")[0]["state"] == "CANCELLED"
    assert not world.stream()


def test_a_second_assignment_leaves_nothing_of_the_first(world: World) -> None:
    worker = world.worker()
    world.charge("s", 5_000)
    call = world.start("c1", worker, session="s")
    assert world.record("c1").ints("level", "inherited") == (2, 5000)
    worker.release(call, fault=False)
    world.db.delete(world.keys.session("s"))  # expired meanwhile
    world.assign("c1")
    assert world.record("c1").ints("level", "inherited") == (0, 0)
    assert worker.take().level == 0
