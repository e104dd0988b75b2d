"""The data of finished calls, dead letters and inboxes is limited, by time and by bytes."""

from __future__ import annotations

import time
from typing import Any

from rsm.broker.connection.factory import connect
from rsm.broker.protocol import codec
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.transitions import RETAIN_ENTRIES, Retained, Transitions
from rsm.broker.settings import Settings
from rsm.broker.views.dead_letters import DeadLetters
from rsm.broker.views.monitor import Monitor
from tests.support.waiting import eventually
from tests.support.world import World

# The bytes that terminal.lua counts for a record.
RECORD = 768


def change(world: World, **settings: Any) -> None:
    world.settings = world.settings.model_copy(update=settings)
    world.transitions = Transitions(world.keys, world.settings)


def retained(world: World) -> int:
    return codec.number(world.db.hget(world.keys.usage, "retained_bytes"))


def finish(world: World, *ids: str, text: str = "done") -> None:
    worker = world.worker(new_id())
    for call_id in ids:
        assert worker.finish(world.start(call_id, worker, stream=True), text) == "done"


def left(world: World, *ids: str) -> list[str]:
    return [i for i in ids if world.db.exists(world.keys.call(i), world.keys.events(i))]


# -- by time


def test_the_index_goes_with_the_records(world: World) -> None:
    change(world, result_ttl_s=1)
    finish(world, "c1", "c2")
    assert world.run(world.transitions.retain()) == Retained(0, 0)
    assert retained(world) > 2 * RECORD
    eventually(lambda: not left(world, "c1", "c2"), 5)
    eventually(lambda: world.run(world.transitions.retain()).early == 0 and not retained(world), 5)
    assert world.db.xlen(world.keys.finished) == 0


def test_without_a_limit_bytes_do_not_matter(world: World) -> None:
    change(world, max_retained_bytes=0)
    finish(world, "c1")
    assert world.run(world.transitions.retain()) == Retained(0, 0)


# -- by bytes


def test_the_oldest_go_first_and_no_more_than_needed(world: World) -> None:
    ids = [f"c{i}" for i in range(5)]
    finish(world, *ids)
    change(world, max_retained_bytes=retained(world) // 5 * 2 + 1)
    assert world.run(world.transitions.retain()) == Retained(3, 3)
    assert left(world, *ids) == ["c3", "c4"]
    assert 0 < retained(world) <= world.settings.max_retained_bytes
    assert world.stat("retired") == 3
    assert world.run(world.transitions.retain()) == Retained(0, 0)


def test_one_run_is_limited(world: World) -> None:
    finish(world, *(f"c{i}" for i in range(RETAIN_ENTRIES + 3)))
    change(world, max_retained_bytes=1)
    assert [world.run(world.transitions.retain()).entries for _ in range(3)] == [RETAIN_ENTRIES, 3, 0]
    assert retained(world) == 0


def test_a_batch_is_one_entry_of_the_index(world: World) -> None:
    for i in range(70):
        world.submit(f"c{i}", session="s")
    assert world.cancel_session("s") == 70
    sizes = [len(codec.text(f[b"ids"]).split()) for _, f in world.db.xrange(world.keys.finished)]
    assert sizes == [64, 6]
    change(world, max_retained_bytes=1)
    assert world.run(world.transitions.retain()) == Retained(2, 70)


def test_a_call_that_uses_an_old_id_is_not_taken_for_the_old_one(world: World) -> None:
    finish(world, "c1", "c2")
    for call_id in ("c1", "c2"):
        world.forget(call_id)
    time.sleep(0.002)
    world.submit("c1")
    finish(world, "c2")
    change(world, max_retained_bytes=RECORD * 2)
    assert world.run(world.transitions.retain()).entries == 2
    assert (world.state("c1"), world.state("c2")) == ("PENDING", "COMPLETED")


def test_a_failed_body_counts_until_it_goes(world: World) -> None:
    worker = world.worker()
    call = world.start("c1", worker, prompt="x" * 5000)
    worker.fail(call)
    assert retained(world) > 5000 + RECORD
    finish(world, "c2", text="y" * 3000)
    assert retained(world) > 8000 + 2 * RECORD


def test_a_record_takes_what_is_counted_for_it(settings: Settings) -> None:
    """Compares the constant of terminal.lua with the server's memory usage for many finished calls."""
    with connect(settings) as db:
        measured = World(db, settings)
        calls = 500
        before = _memory(measured)
        worker = measured.worker()
        for i in range(calls):
            measured.queue(f"01234567-89ab-cdef-{i:06}", session=f"s{i // 10}", inbox="")
        for call in worker.claim(calls) or ():
            worker.finish(call, "")
        each = (_memory(measured) - before) / calls
        counted = retained(measured) / calls
    assert 0.6 * counted < each < 1.2 * counted, f"{each:.0f} bytes a call, {counted:.0f} counted"


def _memory(world: World) -> int:
    """The memory of all keys of the namespace, each with its share of the key table."""
    keys = [k for k in world.db.scan_iter(count=1000) if k.decode().startswith(world.keys.prefix)]
    return sum(world.db.memory_usage(key, samples=0) for key in keys)


# -- dead letters


def exhaust(world: World, call_id: str, size: int) -> None:
    """Makes a call use up its attempts."""
    change(world, max_attempts=1)
    worker = world.worker(new_id())
    worker.transitions = world.transitions
    worker.release(world.start(call_id, worker, prompt="x" * size), fault=True)
    assert world.state(call_id) == "FAILED"


def test_dead_letters_are_limited_in_bytes(world: World) -> None:
    change(world, max_dead_bytes=27_000)
    for i in range(8):
        exhaust(world, f"c{i}", 5000)
    assert [letter["id"] for letter in world.dead()] == ["c4", "c5", "c6", "c7"], "the oldest are gone"
    assert Monitor(world.settings, world.db).usage()["dead_bytes"]["used"] <= 27_000


def test_without_a_limit_dead_letters_stay(world: World) -> None:
    change(world, max_dead_bytes=0)
    for i in range(8):
        exhaust(world, f"c{i}", 5000)
    assert len(world.dead()) == 8


def test_the_limit_holds_when_letters_are_replayed_or_deleted(world: World) -> None:
    change(world, max_dead_bytes=27_000)
    for i in range(4):
        exhaust(world, f"c{i}", 5000)
    DeadLetters(world.settings, world.db).replay("c0")
    usage = Monitor(world.settings, world.db).usage()["dead_bytes"]["used"]
    assert 15_000 < usage < 20_000, "the replayed letter no longer counts"
    for entry, _ in world.db.xrange(world.keys.dead):
        world.db.xdel(world.keys.dead, entry)
    assert Monitor(world.settings, world.db).usage()["dead_bytes"]["used"] == 0
    for i in range(4, 12):
        exhaust(world, f"c{i}", 5000)
    assert [letter["id"] for letter in world.dead()] == ["c8", "c9", "c10", "c11"]


# -- inboxes


def test_an_unread_inbox_gets_no_more_large_results(world: World) -> None:
    worker = world.worker()
    for i in range(600):
        world.queue(f"c{i}", inbox="box")
    for call in worker.claim(600) or ():
        worker.finish(call, "y" * 2000)
    events = world.events("box")
    assert len(events) == 600
    assert [bool(e["result"]) for e in events] == [True] * 512 + [False] * 88
    assert {e["big"] for e in events[512:]} == {"1"}
    assert world.result("c599")["text"] == "y" * 2000, "it is in the record"
