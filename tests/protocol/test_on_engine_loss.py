"""What a call requests for the loss of its engine: to continue, to restart, or to fail."""

from __future__ import annotations

from typing import Any

import pytest

from rsm.broker.protocol.events import read_event
from rsm.broker.protocol.models import Delta
from tests.support.world import World


def test_a_call_that_asked_to_fail_fails_when_its_engine_dies(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True, inbox="box", on_engine_loss="fail")
    worker.publish(call, "one", "two")
    world.die(worker)
    record = world.record("c1")
    assert (record["state"], record["error_code"]) == ("FAILED", "engine_lost")
    assert "died" in record["error"]
    assert [f["text"] for _, f in world.log("c1")[:-1]] == ["one", "two"], "its output can still be read"
    assert [n["state"] for n in world.events("box")] == ["", "", "FAILED"]
    assert not world.stream()
    assert not world.dead()


@pytest.mark.parametrize("fault", [True, False])
def test_an_error_or_a_release_is_no_engine_loss(world: World, fault: bool) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True, on_engine_loss="fail")
    worker.publish(call, "one")
    worker.release(call, fault=fault)
    assert world.state("c1") == "PENDING"
    world.assign("c1")
    again = worker.take()
    assert (again.events, again.begins, again.on_engine_loss) == (1, 0, "fail"), "it resumes after its last chunk"


@pytest.mark.parametrize("how", ["death", "error", "give-back"])
def test_a_call_that_asked_to_restart_starts_over(world: World, how: str) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True, inbox="box", on_engine_loss="restart")
    worker.publish(call, "one", "two")
    if how == "death":
        worker = world.die(worker)
    else:
        worker.release(call, fault=how == "error")
        world.assign("c1")
    again = worker.take()
    assert (again.events, again.begins, again.on_engine_loss) == (3, 3, "restart")
    assert worker.publish(again, "three") == ["ok"]
    worker.finish(again)
    logged = [(f["n"], f["text"], f["restart"]) for _, f in world.log("c1")[:-1]]
    assert logged == [("0", "one", ""), ("1", "two", ""), ("2", "", "1"), ("3", "three", "")]
    assert [(f["n"], f["text"], f["restart"]) for f in world.events("box")[:-1]] == logged
    eids = [f["eid"] for f in world.events("box")[:-1]]
    assert eids == [eid for eid, _ in world.log("c1")[:-1]]
    assert world.log("c1")[-1][1]["n"] == "4"
    raw: Any = world.db.xrange(world.keys.events("c1"))
    assert read_event("c1", raw[2][1], "9-9") == Delta(2, "9-9", restart=True)


def test_a_stream_without_new_chunks_is_not_restarted_again(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, stream=True, on_engine_loss="restart")
    worker.publish(call, "one")
    for _ in range(3):
        worker.release(call)
        world.assign("c1")
        call = worker.take()
        assert (call.events, call.begins) == (2, 2)
    assert len(world.log("c1")) == 2


def test_without_chunks_there_is_no_restart_event(world: World) -> None:
    worker = world.worker()
    world.start("c1", worker, on_engine_loss="restart")
    worker = world.die(worker)
    again = worker.take()
    assert (again.events, again.begins) == (0, 0)
    assert not world.log("c1")
