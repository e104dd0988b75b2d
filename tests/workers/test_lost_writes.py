"""Redis comes back without its last writes: calls that it lost run again, calls of other engines do not."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from rsm.broker import CallHandle, Client, Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.transitions import Claimed, Fence, Release, Transitions
from rsm.broker.views.monitor import Monitor
from rsm.workers.backends.sim.backend import SimBackend
from rsm.workers.backends.sim.engine import SimConfig, SimTimes
from rsm.workers.runtime.calls import Calls
from rsm.workers.runtime.publisher import Ended, Item
from rsm.workers.runtime.reconciler import Reconciler
from tests.support.fake_worker import FakeWorker, routing
from tests.support.sim_processes import Start, all_speak, assert_undisturbed, chunks, said, submit_streams
from tests.support.waiting import eventually


class Snapshot:
    """A snapshot of some keys that can be restored."""

    def __init__(self, db: Any, *keys: str) -> None:
        self._db = db
        with db.pipeline(transaction=True) as pipe:
            for key in keys:
                pipe.dump(key)
            self._dumps = dict(zip(keys, pipe.execute(), strict=True))

    def restore(self) -> None:
        with self._db.pipeline(transaction=True) as pipe:
            for key, dump in self._dumps.items():
                pipe.delete(key)
                if dump is not None:
                    pipe.restore(key, 0, dump)
            pipe.execute()


def test_a_call_whose_end_was_lost_runs_again(
    settings: Settings, client: Client, start: Start, db: redis.Redis, keys: Keys, monitor: Monitor
) -> None:
    worker = start()
    with routing(settings):
        call = client.submit("x", stream=True, max_tokens=60)
        eventually(lambda: chunks(client, call))
        then = Snapshot(db, keys.call(call.id), keys.events(call.id), keys.running("e1"))
        assert call.wait(20).attempt == 1
        then.restore()
        eventually(lambda: client.record(call.id).attempt == 2, what=worker.log())
        eventually(lambda: client.record(call.id).state == "COMPLETED")
        assert_undisturbed(client, call.id, "x", 60)
        assert "released 1 calls without an end" in worker.log()
        assert int(db.hget(keys.call(call.id), "failures") or 0) == 0


def test_a_call_that_redis_gave_to_another_engine_is_dropped(
    settings: Settings, client: Client, start: Start, db: redis.Redis, keys: Keys, monitor: Monitor
) -> None:
    """It does not stream, so no publish shows the difference."""
    worker = start("e1", max_num_seqs=1)
    with routing(settings):
        call = client.submit("x", max_tokens=1_000_000)
        eventually(lambda: monitor.engine("e1")["running"] == 1)
        db.hset(keys.call(call.id), mapping={"engine": "e2"})
        db.zrem(keys.running("e1"), call.id)
        assert client.submit("y", max_tokens=2).result(20).text == said("y", 2), "its slot is free again"
        assert "dropped 1 calls of other engines" in worker.log()
        db.delete(keys.call(call.id))


def test_a_lost_claim_comes_again_and_the_call_is_not_run_twice(
    settings: Settings, client: Client, start: Start, db: redis.Redis, keys: Keys
) -> None:
    """It comes under the same fence, more often than there are slots."""
    start("e1", max_num_seqs=1)
    with routing(settings):
        call = client.submit("x", stream=True, max_tokens=150)
        eventually(lambda: chunks(client, call))
        for _ in range(6):
            with db.pipeline(transaction=True) as pipe:
                pipe.hset(keys.call(call.id), "state", "PENDING")
                pipe.zrem(keys.running("e1"), call.id)
                pipe.zadd(keys.queue("e1"), {call.id: 1})
                pipe.lpush(keys.bell("e1"), "1")
                pipe.expire(keys.bell("e1"), 60)
                pipe.execute()
            eventually(lambda: client.record(call.id).state == "RUNNING")
        call.wait(30)
        assert_undisturbed(client, call.id, "x", 150)
        for i in range(4):
            assert client.submit(f"y{i}", max_tokens=2).result(20).text == said(f"y{i}", 2)


def _tokens(client: Client, call: CallHandle) -> int:
    """The number of published tokens of a streamed call."""
    log: Any = client.redis.xrange(client.keys.events(call.id))
    return sum(len(fields.get(b"token_ids", b"").split()) for _, fields in log)


@pytest.mark.parametrize("end", ["in the middle", "at the end"])
def test_lost_events_are_published_again_and_leave_no_gap(
    settings: Settings, client: Client, start: Start, db: redis.Redis, keys: Keys, end: str
) -> None:
    start("e1")
    with routing(settings):
        call = client.submit("x", stream=True, max_tokens=80)
        eventually(lambda: chunks(client, call) > 2)
        then = Snapshot(db, keys.call(call.id), keys.events(call.id))
        # Tokens, not chunks: on a busy machine several tokens share one.
        eventually(lambda: _tokens(client, call) > (6 if end == "in the middle" else 70))
        then.restore()
        record = call.wait(30)
        assert (record.attempt, record.engine_id) == (2, "e1")
        assert_undisturbed(client, call.id, "x", 80)


@pytest.mark.timeout(120)
def test_redis_loses_its_last_writes(fragile: EmbeddedRedis, settings: Settings, start: Start, tmp_path: Path) -> None:
    """Its append-only file ends early, as after a crash under `everysec`, or on a replica that lagged."""
    there = settings.with_redis(fragile.url)
    workers = [start(engine, settings=there, max_num_seqs=16) for engine in ("e1", "e2")]
    with routing(there), Client(settings=there) as client:
        short, long = (submit_streams(client, 24, n) for n in (40, 200))
        calls = [(p, h, n) for n, some in ((40, short), (200, long)) for p, h in some.items()]
        eventually(lambda: sum(chunks(client, h) > 0 for _, h, _ in calls) >= 20)
        shutil.copytree(fragile.folder / "appendonlydir", tmp_path / "then")
        eventually(lambda: all(h.done for h in short.values()) and all_speak(client, list(long.values())))
        fragile.kill()
        shutil.rmtree(fragile.folder / "appendonlydir")
        shutil.copytree(tmp_path / "then", fragile.folder / "appendonlydir")
        fragile.start()
        eventually(lambda: all(client.record(h.id).state == "COMPLETED" for _, h, _ in calls), 60)
        for prompt, handle, tokens in calls:
            assert int(client.redis.hget(client.keys.call(handle.id), "failures") or 0) == 0
            assert_undisturbed(client, handle.id, prompt, tokens)
        monitor = Monitor(there)
        eventually(lambda: monitor.stats()["unaccounted"] == 0)
        eventually(lambda: sum(e["running"] + e["running_tokens"] for e in monitor.engines()) == 0)
    assert all(w.running for w in workers)


def _claimed(events: int = 0) -> Claimed:
    return Claimed(Fence("c1", "1-0", 1), "s1", "generate", True, "", 0, 0, events, "", 1, "json", b'{"prompt":"x"}')


@pytest.mark.parametrize("dropped", [False, True])
async def test_the_same_fence_twice(db: redis.Redis, keys: Keys, dropped: bool) -> None:
    """A running copy continues. While a copy is being dropped, a second one is not accepted: their fences are equal."""
    put: list[Item] = []
    left: list[int] = []
    speaks = asyncio.Event()

    def take(item: Item) -> None:
        put.append(item)
        speaks.set()

    backend = SimBackend(SimConfig(times=SimTimes(step_s=0.01)))
    await backend.start()
    calls = Calls(backend, db, keys, take, lambda: left.append(1), lambda _: None)
    calls.start([_claimed()])
    await asyncio.wait_for(speaks.wait(), 10)
    if dropped:
        calls.drop([_claimed().fence])
    calls.start([_claimed()])
    assert left == [1]
    await calls.settle(10)
    assert left == [1, 1]
    last = put[-1]
    if dropped:
        assert isinstance(last, Release)
        assert not last.fault
    else:
        assert isinstance(last, Ended)
    await backend.stop(0)


async def test_a_call_that_ends_while_redis_is_asked_is_no_difference(
    settings: Settings, transitions: Transitions, db: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    worker = FakeWorker(settings, server=db)
    worker.register()
    ended = _claimed().fence
    owned, dropped = [[ended], [], []], list[Fence]()
    calls: Any = SimpleNamespace(owned=lambda: owned.pop(0), drop=dropped.extend)
    publisher: Any = SimpleNamespace(leaving=list)
    await Reconciler("e1", db, transitions, calls, publisher).reconcile(worker.incarnation, lambda: worker.incarnation)
    assert (dropped, caplog.text) == ([], "")
