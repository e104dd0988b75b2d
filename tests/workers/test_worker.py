"""The worker: real processes with a modelled engine, killed, stopped, frozen and cut off from Redis."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from rsm.broker import AsyncClient, CallCancelled, Client, RequestState, Settings
from rsm.broker.connection import execute
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.transitions import Claimed, Fence, Release, Transitions
from rsm.broker.views.monitor import Monitor
from rsm.workers.backends.base import Chunk, Job, Outcome
from rsm.workers.backends.sim.backend import SimBackend
from rsm.workers.backends.sim.engine import SimConfig, SimTimes
from rsm.workers.environment import EXIT_ENGINE_DIED, EXIT_ID_TAKEN, EXIT_OK
from rsm.workers.runtime.calls import Calls
from rsm.workers.runtime.publisher import Ended, Item
from rsm.workers.runtime.worker import _SHUTDOWN_S, Worker
from tests.support.fake_worker import FakeWorker, routing
from tests.support.sim_processes import (
    Start,
    all_speak,
    assert_undisturbed,
    bring_back,
    chunks,
    said,
    state_of,
    submit_streams,
    take_away,
)
from tests.support.waiting import eventually

# Steps of 10 ms.
_STEPS = SimConfig(times=SimTimes(step_s=0.01))
_CHAT = {"messages": [{"role": "user", "content": "hi"}]}
_SECRET = "the launch code is 0000"


# -- calls


def test_calls_run(settings: Settings, client: Client, start: Start) -> None:
    start()
    with routing(settings):
        plain = client.submit("hello", session="s1", max_tokens=5)
        streamed = client.submit("hello there", stream=True, max_tokens=40)
        chat = client.submit(_CHAT, kind="chat.completions", stream=True, max_tokens=3)
        result = plain.result(20)
        assert (result.text, result.engine_id, result.session_id) == (said("hello", 5), "e1", "s1")
        assert (result.completion_tokens, result.finish_reason, result.attempts) == (5, "length", 1)
        assert result.ttft is not None
        streamed.wait(20)
        assert_undisturbed(client, streamed.id, "hello there", 40)
        assert sum(len(p.chunks) for p in chat.stream()) == 4  # the role and three tokens
        assert chat.result().response is not None


def test_a_worker_that_loses_a_thread_ends(settings: Settings, client: Client, db: redis.Redis, start: Start) -> None:
    """A worker without that thread would look alive and do nothing."""
    worker = start()
    with routing(settings):
        call = client.submit("hello", stream=True, max_tokens=5000)
        eventually(lambda: call.record().state == RequestState.RUNNING)
        db.delete(client.keys.events(call.id))
        db.set(client.keys.events(call.id), "not a stream", ex=60)  # makes the publisher thread fail
        assert worker.wait() == EXIT_ENGINE_DIED
        assert "rsm-publish" in worker.log()
        db.delete(client.keys.events(call.id))
        eventually(lambda: call.record().state == RequestState.PENDING)
        call.cancel()


def test_a_body_that_cannot_be_read_fails_at_once(settings: Settings, client: Client, start: Start) -> None:
    broken = client.prepare("x")._replace(body=b"\xc1\xc1\xc1")
    refused = client.prepare("x", max_tokens=-1)
    start()
    with routing(settings):
        for handle in client.submit_many([broken, refused]):
            record = handle.wait(20)
            assert (record.state, record.error_code, record.attempt) == (RequestState.FAILED, "invalid_request", 1)
            assert record.error


def test_cancel_of_waiting_and_running_calls(
    settings: Settings, client: Client, start: Start, monitor: Monitor
) -> None:
    """One slot: the first call runs, two are claimed after it, the last waits in Redis."""
    start(max_num_seqs=1)
    with routing(settings):
        running = client.submit("a", stream=True, max_tokens=5000)
        eventually(lambda: chunks(client, running))
        claimed = [client.submit("b", max_tokens=5000) for _ in range(2)]
        eventually(lambda: monitor.engine("e1")["running"] == 3)
        queued = client.submit("c", max_tokens=5000)
        eventually(lambda: monitor.engine("e1")["queued"] == 1)

        assert queued.cancel("never mind")
        assert client.record(queued.id).state is RequestState.CANCELLED, "at once"
        for handle in (*claimed, running):
            assert handle.cancel("enough")
        for handle in claimed:
            record = handle.wait(20)
            assert (record.state, record.error) == (RequestState.CANCELLED, "enough")
        record = running.wait(20)
        assert record.state is RequestState.CANCELLED
        assert record.result is not None
        received: list[str] = []
        with pytest.raises(CallCancelled, match="enough"):
            received.extend(delta.text for delta in running.stream())
        assert record.result.text == "".join(received)
        assert said("a", 5000).startswith(record.result.text)
        assert record.result.text
        assert running.cancel(), "it may be repeated"
        assert client.submit("d", max_tokens=2).result(20).completion_tokens == 2, "the slot is free again"


class Untouched(SimBackend):
    """Fails the test if it has to run a call."""

    async def run(self, job: Job, emit: Callable[[Chunk], None]) -> Outcome:
        raise AssertionError("it must not run")


@pytest.mark.parametrize("overtaken", [False, True], ids=["flag in the claim", "cancel before the claim's reply"])
async def test_a_call_flagged_before_it_begins_never_runs(db: redis.Redis, keys: Keys, overtaken: bool) -> None:
    put: list[Item] = []
    left = asyncio.Event()
    calls = Calls(Untouched(), db, keys, put.append, left.set, lambda _: None)
    fence = Fence("c1", "1-0", 1)
    for i in range(3 if overtaken else 0):
        calls.cancel(Fence(f"c{i}", "1-0", 1))
    calls.start([Claimed(fence, "s1", "generate", False, "", 0, 0, 0, "", 1, "body", b"\x80", cancelled=not overtaken)])
    await asyncio.wait_for(left.wait(), 10)
    (end,) = put
    assert isinstance(end, Ended)
    assert (end.finish.fence, end.finish.state) == (fence, RequestState.CANCELLED)


@pytest.mark.parametrize("stop", ["cancel", "give back"])
async def test_a_call_stopped_while_its_log_is_read_never_runs(keys: Keys, stop: str) -> None:
    """A second attempt first reads what was published, before the engine has the call (found by `make chaos`)."""
    reading, read_on, left = threading.Event(), threading.Event(), asyncio.Event()

    def xrange(_: str) -> list[Any]:
        reading.set()
        read_on.wait(10)
        return []

    server: Any = SimpleNamespace(xrange=xrange)
    put: list[Item] = []
    calls = Calls(Untouched(), server, keys, put.append, left.set, lambda _: None)
    fence = Fence("c1", "1-0", 2)
    calls.start([Claimed(fence, "s1", "generate", True, "", 0, 0, 1, "", 1, "body", b"\x80")])
    assert await asyncio.to_thread(reading.wait, 10)
    if stop == "cancel":
        calls.cancel(fence)
    else:
        calls.give_back()
    read_on.set()
    await asyncio.wait_for(left.wait(), 10)
    (end,) = put
    if stop == "cancel":
        assert isinstance(end, Ended)
        assert end.finish.state == RequestState.CANCELLED
    else:
        assert isinstance(end, Release)
        assert end.fault == "", "no fault"


def test_the_deadline_of_a_running_call(settings: Settings, client: Client, start: Start) -> None:
    start()
    with routing(settings):
        handle = client.submit("x", stream=True, max_tokens=5000, deadline_ms=client.deadline_in(1))
        eventually(lambda: chunks(client, handle))
        record = handle.wait(20)
        assert (record.state, record.error_code) == (RequestState.FAILED, "deadline_exceeded")
        assert record.result is not None
        assert record.result.text, "the partial text"


# -- one id, one worker


def test_a_second_worker_with_the_same_id_is_refused(
    settings: Settings, client: Client, start: Start, monitor: Monitor
) -> None:
    first = start()
    second = start(ready=False)
    assert second.wait() == EXIT_ID_TAKEN
    assert f"Engine id e1 is taken by a live worker (pid {first.pid} on {socket.gethostname()})" in second.log()
    assert "Traceback" not in second.log()
    assert monitor.engine("e1")["pid"] == first.pid
    with routing(settings):
        assert client.submit("x", max_tokens=2).result(20).engine_id == "e1"


def test_a_restarted_worker_runs_its_own_calls_again(settings: Settings, client: Client, start: Start) -> None:
    first = start()
    with routing(settings):
        calls = submit_streams(client, 3, 120)
        eventually(lambda: all_speak(client, list(calls.values())))
    first.kill()  # no router runs that could move its calls
    start()
    for prompt, handle in calls.items():
        record = handle.wait(30)
        assert (record.engine_id, record.attempt) == ("e1", 2)
        assert_undisturbed(client, handle.id, prompt, 120)


def test_a_late_heartbeat_does_not_revert_the_state(settings: Settings, monitor: Monitor, db: redis.Redis) -> None:
    """The lease's thread may have sent one just before the worker reported a new state."""
    worker = FakeWorker(settings, server=db).up()
    assert worker.beat("STARTING", running=3)
    assert state_of(monitor, "e1") == "READY"
    assert worker.beat("DRAINING")
    assert worker.beat("READY")
    assert state_of(monitor, "e1") == "DRAINING"


def test_a_zombie_changes_nothing_and_serves_again(
    settings: Settings, client: Client, start: Start, monitor: Monitor, db: redis.Redis, transitions: Transitions
) -> None:
    """A worker hangs for longer than its lease; its calls run elsewhere in the meantime."""
    zombie = start("e1")
    start("e2")
    with routing(settings):
        calls = submit_streams(client, 8, 150)
        eventually(lambda: all_speak(client, list(calls.values())))
        theirs = [h.id for h in calls.values() if client.record(h.id).engine_id == "e1"]
        incarnation = monitor.engine("e1")["incarnation"]
        assert theirs
        zombie.send(signal.SIGSTOP)
        for handle in calls.values():
            handle.wait(30)
        before = [_everything(client, call_id) for call_id in theirs]
        zombie.send(signal.SIGCONT)
        eventually(lambda: state_of(monitor, "e1") == "READY" and monitor.engine("e1")["incarnation"] != incarnation)

        execute.run(db, transitions.drain("e2"))
        result = client.submit("again", max_tokens=50).result(20)
        assert (result.engine_id, result.text) == ("e1", said("again", 50))
        assert [_everything(client, call_id) for call_id in theirs] == before
        for prompt, handle in calls.items():
            record = client.record(handle.id)
            assert (record.engine_id, record.attempt) == ("e2", 2 if handle.id in theirs else 1)
            assert_undisturbed(client, handle.id, prompt, 150)
        assert "the lease was lost" in zombie.log()
        assert zombie.running
        solved = db.zscore(Keys(settings.namespace).solved, str(incarnation))
        assert solved is not None, "no process died, so its calls are not suspected"


def _everything(client: Client, call_id: str) -> tuple[Any, Any]:
    return client.redis.hgetall(client.keys.call(call_id)), client.redis.xrange(client.keys.events(call_id))


# -- drain and stop


def test_sigterm_lets_running_calls_finish_and_moves_the_others(
    settings: Settings, client: Client, start: Start, monitor: Monitor
) -> None:
    worker = start("e1", max_num_seqs=2)
    with routing(settings):
        calls = submit_streams(client, 8, 60)
        eventually(lambda: monitor.engine("e1")["running"] == 4)
        eventually(lambda: monitor.engine("e1")["queued"] == 4)
        worker.send(signal.SIGTERM)
        start("e2")
        for handle in calls.values():
            assert handle.wait(30).attempt == 1
        assert worker.wait() == EXIT_OK
        assert state_of(monitor, "e1") == "STOPPED"
        engines = [client.record(h.id).engine_id for h in calls.values()]
        assert (engines.count("e1"), engines.count("e2")) == (4, 4)
        for prompt, handle in calls.items():
            assert_undisturbed(client, handle.id, prompt, 60)


def test_a_call_longer_than_the_grace_period_is_released_without_a_failure(
    settings: Settings, client: Client, start: Start, db: redis.Redis, keys: Keys
) -> None:
    hasty = settings.model_copy(update={"drain_grace_s": 0.2, "max_attempts": 1})
    worker = start("e1", settings=hasty)
    with routing(hasty):
        calls = submit_streams(client, 3, 150)
        eventually(lambda: all_speak(client, list(calls.values())))
        worker.send(signal.SIGTERM)
        assert worker.wait() == EXIT_OK
        start("e2", settings=hasty)
        for prompt, handle in calls.items():
            record = handle.wait(30)
            assert (record.engine_id, record.attempt) == ("e2", 2)
            assert int(db.hget(keys.call(handle.id), "failures") or 0) == 0
            assert_undisturbed(client, handle.id, prompt, 150)


def test_a_drained_worker_stays_until_it_is_stopped(
    settings: Settings, client: Client, start: Start, monitor: Monitor, db: redis.Redis, transitions: Transitions
) -> None:
    worker = start("e1")
    with routing(settings):
        running = client.submit("x", stream=True, max_tokens=60)
        eventually(lambda: chunks(client, running))
        execute.run(db, transitions.drain("e1"))
        waiting = client.submit("y", max_tokens=2)
        assert running.result(20).engine_id == "e1"
        eventually(lambda: "drains" in worker.log())
        beat = monitor.engine("e1")["heartbeat_ms"]
        eventually(lambda: monitor.engine("e1")["heartbeat_ms"] > beat, what="it keeps its lease")
        assert (state_of(monitor, "e1"), worker.running, waiting.done) == ("DRAINING", True, False)
        execute.run(db, transitions.drain("e1", "stop"))
        assert worker.wait() == EXIT_OK
        start("e2")
        assert waiting.result(20).engine_id == "e2"


# -- a broken engine


async def test_the_calls_of_an_engine_that_dies_are_released(
    settings: Settings, db: Any, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    backend = SimBackend(_STEPS)
    serving = asyncio.create_task(Worker("e1", backend, settings).serve(handle_signals=False))
    with routing(settings):
        async with AsyncClient(settings=settings) as client:
            call = await client.submit("x", stream=True, max_tokens=100)
            stream = call.stream()
            received = [await anext(stream)]
            backend.kill("GPU on fire")
            assert await asyncio.wait_for(serving, 30) == EXIT_ENGINE_DIED
            # The router may have sent it back to the dead engine once; that does not count as a second death.
            record = await client.record(call.id)
            assert (record.state, record.failures, record.deaths) == (RequestState.PENDING, 0, 1)
            assert "engine e1 died (GPU on fire)" in caplog.text
            assert db.hget(keys.engine("e1"), "state") == b"STOPPED"

            other = Worker("e2", SimBackend(_STEPS), settings)
            serving = asyncio.create_task(other.serve(handle_signals=False))
            received += [delta async for delta in stream]
            assert "".join(d.text for d in received) == said("x", 100)
            assert [d.n for d in received] == list(range(len(received)))
            assert (await call).engine_id == "e2"
            other.request_stop()
            assert await asyncio.wait_for(serving, 30) == EXIT_OK


class Careless(SimBackend):
    """Raises an unexpected error that quotes the prompt."""

    async def run(self, job: Job, emit: Callable[[Chunk], None]) -> Outcome:
        raise RuntimeError(str(job.body))


async def test_an_unexpected_error_is_retried_then_dead_lettered_and_quotes_no_prompt(
    settings: Settings, db: Any, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    worker = Worker("e1", Careless(_STEPS), settings)
    serving = asyncio.create_task(worker.serve(handle_signals=False))
    with routing(settings):
        async with AsyncClient(settings=settings) as client:
            record = await (await client.submit(_SECRET)).wait(30)
    worker.request_stop()
    assert await asyncio.wait_for(serving, 30) == EXIT_OK
    assert (record.state, record.error_code) == (RequestState.FAILED, "engine_error")
    assert record.attempt == settings.max_attempts
    assert "RuntimeError" in record.error
    ((_, letter),) = db.xrange(keys.dead)
    assert (letter[b"id"].decode(), letter[b"error_code"]) == (record.request_id, b"engine_error")
    assert caplog.text.count("RuntimeError in the backend") == settings.max_attempts
    assert "launch code" not in caplog.text + record.error + repr(record)


# -- Redis goes away


def test_redis_killed_under_load_loses_nothing_and_no_engine(
    fragile: EmbeddedRedis, cut_off: Settings, start: Start
) -> None:
    worker = start(settings=cut_off)
    monitor = Monitor(cut_off)
    with routing(cut_off), Client(settings=cut_off) as client:
        calls = submit_streams(client, 30, 150)
        eventually(lambda: all_speak(client, list(calls.values())))
        incarnation = monitor.engine("e1")["incarnation"]
        fragile.kill()
        eventually(lambda: "Redis is not reachable" in worker.log())
        fragile.start()
        late = client.submit("after the restart", stream=True, max_tokens=20)
        for prompt, handle in (calls | {"after the restart": late}).items():
            assert handle.wait(40).attempt == 1
            assert_undisturbed(client, handle.id, prompt, 20 if handle is late else 150)
        eventually(lambda: monitor.stats()["unaccounted"] == 0)
        status = monitor.engine("e1")
        assert (status["pid"], status["incarnation"], status["state"]) == (worker.pid, incarnation, "READY")
        assert worker.running
    worker.send(signal.SIGTERM)
    assert worker.wait() == EXIT_OK


@pytest.mark.parametrize("away", ["gone", "hanging"])
def test_a_worker_stops_in_time_while_redis_is_away(
    fragile: EmbeddedRedis, cut_off: Settings, start: Start, away: str
) -> None:
    hasty = cut_off.model_copy(update={"drain_grace_s": 0.5})
    worker = start(settings=hasty)
    with Client(settings=hasty) as client:
        with routing(hasty):
            handle = client.submit("x", stream=True, max_tokens=150)
            eventually(lambda: chunks(client, handle))
        take_away(fragile, away)
        began = time.monotonic()
        worker.send(signal.SIGTERM)
        assert worker.wait() == EXIT_OK
        assert time.monotonic() - began < hasty.drain_grace_s + _SHUTDOWN_S
        assert "Traceback" not in worker.log()
        bring_back(fragile, away)
        start("e2", settings=hasty)
        with routing(hasty):
            record = handle.wait(40)  # the call moves when the lease of the first worker expires
            assert (record.engine_id, record.attempt) == ("e2", 2)
            assert_undisturbed(client, handle.id, "x", 150)


def test_a_worker_that_never_found_redis_can_be_stopped(settings: Settings, tmp_path: Path, start: Start) -> None:
    worker = start(settings=settings.with_redis(f"unix://{tmp_path}/nobody"), ready=False)
    eventually(lambda: "Redis is not reachable" in worker.log())
    worker.send(signal.SIGTERM)
    assert worker.wait() == EXIT_OK
    assert "Traceback" not in worker.log()
