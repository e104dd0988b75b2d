"""Hangs are ended: of an engine, an event loop, a start, a shutdown. Real processes, modelled engines."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import redis

from rsm.broker import Client, RequestState, Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.protocol.keys import Keys
from rsm.broker.views.monitor import Monitor
from rsm.router.__main__ import _LEAVE_S
from rsm.workers.environment import EXIT_ENGINE_DIED, EXIT_OK
from rsm.workers.runtime.watchdog import ProgressWatchdog
from rsm.workers.runtime.worker import _LOADING_S, _SHUTDOWN_S
from tests.support.fake_worker import routing
from tests.support.rsm_command import clean_env
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

_EXIT_TIMER = 1
_BAD = "a bad prompt"


@pytest.fixture
def impatient(settings: Settings) -> Settings:
    return settings.model_copy(update={"stall_s": 1.5})


@pytest.mark.parametrize(("fault", "status"), [("stall_on", EXIT_ENGINE_DIED), ("hang_on", _EXIT_TIMER)])
def test_a_hanging_worker_is_ended_and_its_calls_run_elsewhere(
    impatient: Settings, client: Client, start: Start, fault: str, status: int
) -> None:
    """Only the engine hangs, or the whole event loop while the lease's thread keeps renewing."""
    worker = start("e1", settings=impatient, **{fault: _BAD})
    with routing(impatient):
        calls = submit_streams(client, 3, 300)
        eventually(lambda: all_speak(client, list(calls.values())))
        bad = client.submit(_BAD, max_tokens=5)  # it does not stream
        assert worker.wait() == status
        assert ("made no progress" if fault == "stall_on" else "most recent call first") in worker.log()
        assert _BAD not in worker.log()
        start("e2", settings=impatient)
        assert bad.result(30).text == said(_BAD, 5)
        for prompt, handle in calls.items():
            record = handle.wait(30)
            assert (record.engine_id, record.attempt) == ("e2", 2)
            assert_undisturbed(client, handle.id, prompt, 300)


def test_an_engine_that_is_slow_or_idle_is_not_ended(
    impatient: Settings, client: Client, start: Start, monitor: Monitor
) -> None:
    """Its only call has a long prompt that is computed in slow chunks."""
    worker = start("e1", settings=impatient, step_s=0.7, max_num_batched_tokens=16)
    with routing(impatient):
        time.sleep(2 * impatient.stall_s)
        prompt = "word " * 80
        assert client.submit(prompt, max_tokens=1).result(30).attempts == 1
    assert worker.running


def test_a_stall_counts_only_time_in_which_this_process_ran(
    impatient: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("rsm.workers.runtime.watchdog.time.monotonic", lambda: now[0])

    def after(seconds: float, progress: int | None) -> bool:
        now[0] += seconds
        return watchdog.check(progress)

    watchdog = ProgressWatchdog(impatient)
    assert not after(1, 7)
    assert not after(60, 7), "the process was stopped: this is one long interval"
    assert after(1, 7)
    assert not after(1, 8)
    assert not after(1, 8)
    assert not after(1, None), "nothing to do"
    assert not after(1, 8)
    watchdog = ProgressWatchdog(impatient.model_copy(update={"stall_s": 0}))
    assert not any(after(10, 1) for _ in range(100)), "switched off"


def test_an_engine_that_does_not_start_is_ended(settings: Settings, start: Start) -> None:
    worker = start(settings=settings.model_copy(update={"start_s": 1.0}), ready=False, load_s=3600)
    assert worker.wait() == _EXIT_TIMER


def test_sigterm_ends_a_worker_whose_engine_is_loading(
    settings: Settings, start: Start, monitor: Monitor, elapsed: Callable[[], float]
) -> None:
    worker = start(ready=False, load_s=3600)
    eventually(lambda: state_of(monitor, "e1") == "STARTING")
    time.sleep(0.3)
    elapsed()
    worker.send(signal.SIGTERM)
    worker.wait()
    assert elapsed() < _LOADING_S + 3


def test_sigterm_ends_a_worker_whose_engine_hangs(
    settings: Settings, client: Client, start: Start, db: redis.Redis, keys: Keys, elapsed: Callable[[], float]
) -> None:
    hasty = settings.model_copy(update={"drain_grace_s": 0.5, "stall_s": 0})
    worker = start(settings=hasty, stall_on=_BAD)
    with routing(hasty):
        calls = [client.submit(_BAD, max_tokens=5), client.submit("good", stream=True, max_tokens=20)]
        eventually(lambda: all(client.record(c.id).state is RequestState.RUNNING for c in calls))
        elapsed()
        worker.send(signal.SIGTERM)
        assert worker.wait() == EXIT_OK
        assert elapsed() < hasty.drain_grace_s + _SHUTDOWN_S
        start("e2", settings=hasty)
        for call in calls:
            assert call.wait(30).attempt == 2
            assert int(db.hget(keys.call(call.id), "failures") or 0) == 0, "the hang does not count as their failure"


@pytest.fixture
def elapsed() -> Callable[[], float]:
    """Seconds since the last call."""
    last = [time.monotonic()]

    def lap() -> float:
        before, last[0] = last[0], time.monotonic()
        return last[0] - before

    return lap


# -- deadlines


def test_a_worker_enforces_a_deadline_without_any_router(settings: Settings, client: Client, start: Start) -> None:
    start()
    with routing(settings):
        call = client.submit("x", stream=True, max_tokens=5000, deadline_ms=client.deadline_in(1.5))
        plain = client.submit("y", max_tokens=5000, deadline_ms=client.deadline_in(1.5))
        eventually(lambda: chunks(client, call) and client.record(plain.id).state is RequestState.RUNNING)
    for handle in (call, plain):
        record = handle.wait(20)
        assert (record.state, record.error_code) == (RequestState.FAILED, "deadline_exceeded")
        assert record.result is not None
        assert record.result.text, "the partial text"


# -- routers


@pytest.mark.parametrize("away", ["gone", "hanging"])
def test_a_router_stops_in_time_while_redis_is_away(
    fragile: EmbeddedRedis, cut_off: Settings, elapsed: Callable[[], float], away: str
) -> None:
    env = clean_env() | cut_off.environment()
    with redis.Redis(unix_socket_path=str(fragile.socket)) as db:
        router = subprocess.Popen([sys.executable, "-P", "-m", "rsm.router"], env=env, stderr=subprocess.DEVNULL)
        try:
            eventually(lambda: db.exists(Keys(cut_off.namespace).routers))
            take_away(fragile, away)
            time.sleep(0.3)
            elapsed()
            router.send_signal(signal.SIGTERM)
            assert router.wait(30) == 0
            assert elapsed() < _LEAVE_S + 3
        finally:
            router.kill()
            router.wait()
            bring_back(fragile, away)
