"""Measures how long rsm-engine takes to recover, with its defaults: one function per kind of failure.

Every time runs from the kill until the next attempt (or the waiting call) starts, by Redis's clock.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from subprocess import Popen
from typing import IO, Any

from rsm.broker import Client, RequestState, Settings
from rsm.broker import child_process as child
from rsm.broker.errors import UnknownCall
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.models import CallRecord
from rsm.broker.views.monitor import Monitor
from rsm.engine.fleet import Fleet
from rsm.workers.config import EngineConfig
from rsm.workers.environment import CONFIG_VARIABLE

TOKEN_S = 0.01
# Length and number of the calls whose worker dies; each runs for some seconds.
LONG_TOKENS, LONG_CALLS = 600, 12
KILL_AFTER_S = 1.0
# Additional load of a busy run: short calls per second.
BUSY_CALLS_PER_S = 100
SHORT_TOKENS = 20
# How long calls are watched after a router's death.
WATCH_S = 5.0
PATIENCE_S = 60.0
_POLL_S = 0.01


@dataclass(slots=True)
class Bench:
    """What a scenario uses."""

    settings: Settings
    client: Client
    monitor: Monitor
    log: IO[bytes]

    def records(self, ids: list[str]) -> list[CallRecord]:
        return [self.client.record(i) for i in ids]

    def engine(self, engine_id: str) -> dict[str, Any]:
        try:
            return self.monitor.engine(engine_id)
        except UnknownCall:
            return {"state": "", "pid": 0, "incarnation": ""}


def sim(engine_id: str) -> EngineConfig:
    """Returns an engine whose calls give one token every TOKEN_S; nothing else takes time."""
    times = {"step_s": TOKEN_S, "prefill_token_s": 0, "decode_seq_s": 0, "context_token_s": 0}
    return EngineConfig(engine_id=engine_id, backend="sim", engine_args=times)


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a condition; RuntimeError if it is not met in time."""
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > give_up:
            raise RuntimeError(f"Timed out after {PATIENCE_S:g} s while waiting for {what}.")
        time.sleep(_POLL_S)


@contextmanager
def bench(url: str, log: IO[bytes]) -> Iterator[Bench]:
    settings = Settings(namespace=f"bench-{new_id()}", result_ttl_s=60).with_redis(url)
    with Client(settings=settings) as client:
        yield Bench(settings, client, Monitor(settings), log)


@contextmanager
def fleet(b: Bench, engines: int, routers: int = 1) -> Iterator[Fleet]:
    """Runs supervised routers and workers, as `rsm up` does."""
    made = Fleet(b.settings.model_copy(update={"drain_grace_s": 0}), routers=routers, output=b.log.fileno())
    made.start([sim(f"e{i}") for i in range(engines)])
    try:
        yield made
    finally:
        made.stop()


class Unsupervised:
    """A worker without a supervisor: its death is noticed only when its lease expires."""

    def __init__(self, b: Bench, engine_id: str) -> None:
        self._b, self._config = b, sim(engine_id)
        self.process = self._start()

    def _start(self) -> Popen[bytes]:
        given = {CONFIG_VARIABLE: self._config.model_dump_json(exclude={"api_key"})}
        env = os.environ | self._b.settings.environment() | given
        return child.spawn([sys.executable, "-P", "-m", "rsm.workers"], env, self._b.log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.process = self._start()


@contextmanager
def load(b: Bench, busy: bool) -> Iterator[None]:
    """Submits short calls at a steady rate from another thread, if the run is a busy one."""
    stop = threading.Event()

    def push() -> None:
        while not stop.wait(1 / BUSY_CALLS_PER_S):
            b.client.submit("busy", max_tokens=SHORT_TOKENS)

    thread = threading.Thread(target=push)
    if busy:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if busy:
            thread.join()


def long_calls(b: Bench) -> list[str]:
    """Pushes the calls that the failure will interrupt; returns once all of them run."""
    calls = [b.client.prepare(f"long {i}", max_tokens=LONG_TOKENS, stream=True) for i in range(LONG_CALLS)]
    ids = [handle.id for handle in b.client.submit_many(calls)]
    until(lambda: all(r.state is RequestState.RUNNING for r in b.records(ids)), "all long calls to run")
    time.sleep(KILL_AFTER_S)
    return ids


def second_attempts(b: Bench, victims: list[str], since_ms: int) -> float:
    """Returns the seconds from `since_ms` until the last of these calls runs again."""
    until(lambda: all(r.attempt > 1 and _started_ms(r) > since_ms for r in b.records(victims)), "second attempts")
    found = b.records(victims)
    assert all(r.state is not RequestState.FAILED for r in found), "a call failed"
    return (max(map(_started_ms, found)) - since_ms) / 1000


def _started_ms(record: CallRecord) -> int:
    return record.started_ms or 0


def victims_of(b: Bench, ids: list[str], engine_id: str) -> list[str]:
    found = [r.request_id for r in b.records(ids) if r.engine_id == engine_id and r.state is RequestState.RUNNING]
    assert found, f"no call runs on {engine_id}"
    return found


def supervised_worker(b: Bench, busy: bool) -> float:
    """Kills a worker of `rsm up` with kill -9, while another engine runs."""
    with fleet(b, engines=2) as processes, load(b, busy):
        victims = victims_of(b, long_calls(b), "e0")
        pid, killed = processes.workers["e0"].pid, b.monitor.now_ms()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        return second_attempts(b, victims, killed)


def unsupervised_worker(b: Bench, busy: bool) -> float:
    """Kills an unsupervised worker with kill -9 and does not restart it, while another engine runs."""
    with fleet(b, engines=1), worker(b, "e1") as unsupervised, load(b, busy):
        victims = victims_of(b, long_calls(b), "e1")
        killed = b.monitor.now_ms()
        unsupervised.kill()
        return second_attempts(b, victims, killed)


@contextmanager
def worker(b: Bench, engine_id: str) -> Iterator[Unsupervised]:
    made = Unsupervised(b, engine_id)
    try:
        until(lambda: b.engine(engine_id)["state"] == "READY", f"{engine_id} to be READY")
        yield made
    finally:
        made.kill()


def returning_worker(b: Bench, busy: bool) -> float:
    """Kills the only worker with kill -9 and restarts it: time from READY until all its calls run again."""
    with fleet(b, engines=0), worker(b, "e0") as unsupervised, load(b, busy):
        victims = victims_of(b, long_calls(b), "e0")
        before, killed = b.engine("e0")["incarnation"], b.monitor.now_ms()
        unsupervised.kill()
        unsupervised.restart()
        until(lambda: b.engine("e0")["incarnation"] != before and b.engine("e0")["state"] == "READY", "e0 to be back")
        ready = b.monitor.now_ms()
        return max(0.0, second_attempts(b, victims, killed) - (ready - killed) / 1000)


def dead_router(routers: int) -> Callable[[Bench, bool], float]:
    """Returns a scenario that kills a router with kill -9: the longest wait of a call pushed around the kill."""

    def scenario(b: Bench, busy: bool) -> float:
        with fleet(b, engines=2, routers=routers) as processes, load(b, busy):
            time.sleep(KILL_AFTER_S)
            pid = processes.routers[0].pid
            assert pid is not None
            ids = [b.client.submit("before", max_tokens=1).id]
            os.kill(pid, signal.SIGKILL)
            end = time.monotonic() + WATCH_S
            while time.monotonic() < end:
                ids.append(b.client.submit("after", max_tokens=1).id)
                time.sleep(1 / BUSY_CALLS_PER_S if busy else WATCH_S / 10)
            until(lambda: all(r.started_ms for r in b.records(ids)), "all calls to start")
            return max(_started_ms(r) - r.submitted_ms for r in b.records(ids)) / 1000

    return scenario


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of failure. `limit_s`: the longest acceptable recovery."""

    name: str
    limit_s: float
    run: Callable[[Bench, bool], float]


SCENARIOS = (
    Scenario("worker killed, supervised: its calls run elsewhere", 3, supervised_worker),
    Scenario("worker killed, unsupervised, its lease must expire: its calls run elsewhere", 3, unsupervised_worker),
    Scenario("worker restarted under its id: from READY until its own calls run", 1, returning_worker),
    Scenario("one of two routers killed: longest wait of a call to start", 3, dead_router(2)),
    Scenario("the only router killed, supervised: longest wait of a call to start", 3, dead_router(1)),
)


def measure(url: str, scenario: Scenario, busy: bool) -> float:
    """Runs a scenario once in its own namespace; returns its seconds. The processes log to a temporary file."""
    with tempfile.TemporaryFile() as log, bench(url, log) as b:
        return scenario.run(b, busy)
