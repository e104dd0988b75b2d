"""The stage: Redis, two routers, workers and producers as real processes, each with its own line to Redis.

The project's own supervisor keeps each process running. After an orderly exit a supervisor does not restart a process;
then the stage does, like an operator.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import redis

from chaos.producers.calls import SIM_MODEL, Pool
from chaos.producers.process import KINDS, ready_file
from chaos.proxy import Lines, Proxy
from rsm.broker import BrokerUnavailable, Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.factory import connect
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.models import EngineState
from rsm.broker.views.monitor import Monitor
from rsm.workers.config import EngineConfig
from rsm.workers.supervision.launch import worker_process
from rsm.workers.supervision.supervisor import Supervised

ROUTERS = 2
SIM_WORKERS = 3
# Fast timers allow many deaths in a run. The limits on attempts and deaths are high, because a call that was really
# killed that often would look like a lost one. The inbox limit is high, because ends in a trimmed inbox cannot be
# counted. All other settings have their defaults.
_SETTINGS = {
    "lease_ms": 1500,
    "heartbeat_ms": 200,
    "tick_ms": 100,
    "drain_grace_s": 1.0,
    "max_attempts": 1000,
    "max_deaths": 1000,
    "inbox_max": 1_000_000,
}
# Even seeds also use all program scheduling, with caches so small that calls are throttled.
_PROGRAMS = {
    "policy": "cost",
    "engine_scheduler": "plas",
    "service_unit": "time",
    "service_rule": "total",
    "admission": True,
    "admission_factor": 0.0003,
    "admission_half_life_s": 0.5,
}
_STEP_S = 0.02
_LEAVE_S = 5.0
_READY_S = 180.0
_REDIS_STARTS = 4


@dataclass(slots=True)
class ManagedProcess:
    """One process of the stage, across restarts."""

    name: str
    line: Proxy
    make: Callable[[], Supervised]
    supervised: Supervised

    @property
    def pid(self) -> int | None:
        return self.supervised.pid


class Stage:
    """Starts and stops all processes.

    Args:
        vllm: number of workers with real vLLM and the tiny model.
    """

    def __init__(self, seed: int, vllm: int = 0) -> None:
        self.seed = seed
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))  # short, because a socket's path has at most 107 bytes
        self.server = EmbeddedRedis(self.folder / "redis")
        chosen: dict[str, Any] = _SETTINGS if seed % 2 else _SETTINGS | _PROGRAMS
        self.settings = Settings(namespace=f"chaos{new_id()}", redis_url=None, **chosen)
        self.settings = self.settings.with_redis(self.server.url)
        self.ledgers = [self.folder / f"ledger-{place}" for place in range(len(KINDS))]
        self.routers: list[ManagedProcess] = []
        self.workers: list[ManagedProcess] = []
        self.producers: list[ManagedProcess] = []
        self._vllm = vllm
        self._lines: Lines | None = None
        self._logs: list[int] = []

    # -- start and stop

    def start(self) -> None:
        """Starts Redis, routers and workers; returns once all engines are READY."""
        self.start_redis()
        self._lines = Lines(self.server.socket)
        self.routers = [self._router(i) for i in range(ROUTERS)]
        self.workers = [self._worker(config) for config in self._engines()]
        until = time.monotonic() + _READY_S
        while not self.all_ready():
            if time.monotonic() > until:
                raise TimeoutError(f"Not all engines were READY after {_READY_S:g} s. See the logs in {self.folder}.")
            time.sleep(0.1)

    def start_producers(self, pool: Pool | None) -> None:
        """Starts one producer of each kind. `pool`: prompts for the real engines."""
        more = [] if pool is None else ["--pool", json.dumps(asdict(pool))]
        self.producers = [self._producer(place, kind, more) for place, kind in enumerate(KINDS)]

    def producers_ready(self) -> bool:
        """Tells whether every producer runs and handles signals."""
        files = [ready_file(path) for path in self.ledgers]
        return all(f.exists() and f.read_text() == str(p.pid) for f, p in zip(files, self.producers, strict=True))

    def stop_producers(self, timeout_s: float) -> bool:
        """Stops new calls; returns whether all calls in progress ended within the time."""
        for producer in self.producers:
            producer.supervised.request_stop()
        until = time.monotonic() + timeout_s
        while any(producer.supervised.running for producer in self.producers):
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    def stop(self) -> None:
        """Ends all processes, including those that a fault has stopped."""
        self._heal()
        for group in (self.producers, self.workers, self.routers):
            for process in group:
                process.supervised.request_stop()
            for process in group:
                process.supervised.stop()
        if self._lines is not None:
            self._lines.close()
        self.server.stop()
        for log in self._logs:
            os.close(log)

    def _heal(self) -> None:
        processes = (*self.producers, *self.workers, *self.routers)
        for pid in (self.server.pid, *(process.pid for process in processes)):
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        for process in processes:
            self.do(process.line.restore)

    def clean_up(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def restart_exited(self) -> None:
        """Restarts, like an operator, the processes that stopped in order or whose id was refused."""
        for process in (*self.routers, *self.workers):
            if not process.supervised.running:
                process.supervised = process.make()
                process.supervised.start()

    def all_ready(self) -> bool:
        """Tells whether every engine accepts calls."""
        monitor = Monitor(self.settings)
        try:
            states = {e["engine_id"]: e["state"] for e in monitor.engines()}
        except redis.RedisError:
            return False
        return all(states.get(worker.name) == EngineState.READY for worker in self.workers)

    # -- Redis

    def start_redis(self) -> None:
        """Starts Redis with `appendfsync always`: acknowledged writes survive kill -9, unlike with `everysec`."""
        for tries_left in reversed(range(_REDIS_STARTS)):
            try:
                self.server.start()
                break
            except BrokerUnavailable:  # on a busy machine loading the AOF may take longer than one start waits
                if not tries_left:
                    raise
        self.configure("appendfsync", "always")

    def configure(self, name: str, value: str) -> None:
        """Sets one setting of the server."""
        with self.connection() as server:
            server.config_set(name, value)

    @contextlib.contextmanager
    def connection(self) -> Iterator[redis.Redis]:
        """Connects directly to the server, without a proxy."""
        server = connect(self.settings)
        try:
            yield server
        finally:
            server.close()

    def fill_disk(self) -> None:
        """Stops the growth of the server's files, so that its writes to the AOF fail as on a full disk."""
        self.configure("auto-aof-rewrite-percentage", "0")  # a rewritten AOF could grow again
        self.configure("appendfsync", "everysec")  # with `always` the server exits on a full disk
        self._limit(max(p.stat().st_size for p in self.server.folder.rglob("*.incr.aof")))

    def empty_disk(self) -> None:
        self._limit(resource.RLIM_INFINITY)
        self._await_writes()
        self.configure("appendfsync", "always")
        self.configure("auto-aof-rewrite-percentage", "100")

    def _limit(self, size: int) -> None:
        assert self.server.pid is not None
        resource.prlimit(self.server.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def _await_writes(self) -> None:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with self.connection() as server, contextlib.suppress(redis.RedisError):
                info: dict[str, object] = server.info("persistence")
                if info.get("aof_last_write_status") == "ok":
                    return
            time.sleep(0.1)

    # -- lines

    def do(self, action: Callable[[], object]) -> None:
        """Runs an action on a line."""
        assert self._lines is not None
        self._lines.do(action)

    # -- processes

    def _router(self, number: int) -> ManagedProcess:
        name, command = f"router {number}", [sys.executable, "-P", "-m", "rsm.router"]
        return self._start(f"r{number}", lambda s, o: Supervised(name, command, s.environment(), output=o))

    def _worker(self, config: EngineConfig) -> ManagedProcess:
        return self._start(config.engine_id, lambda s, o: worker_process(config, s, output=o))

    def _producer(self, place: int, kind: str, more: list[str]) -> ManagedProcess:
        command = [
            sys.executable,
            "-m",
            "chaos.producers.process",
            kind,
            str(place),
            str(self.seed),
            str(self.ledgers[place]),
        ]
        name = f"p{place}"
        return self._start(name, lambda s, o: Supervised(name, [*command, *more], s.environment(), output=o))

    def _start(self, name: str, make: Callable[[Settings, int], Supervised]) -> ManagedProcess:
        assert self._lines is not None
        line = self._lines.open(name)
        settings = self.settings.with_redis(line.url)
        log = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._logs.append(log)
        process = ManagedProcess(name, line, lambda: make(settings, log), make(settings, log))
        process.supervised.start()
        return process

    def _engines(self) -> Sequence[EngineConfig]:
        times = {"step_s": _STEP_S, "prefill_token_s": 0, "decode_seq_s": 0, "context_token_s": 0}
        sims = [
            EngineConfig(engine_id=f"w{i}", backend="sim", model=SIM_MODEL, max_num_seqs=8, engine_args=times)
            for i in range(SIM_WORKERS)
        ]
        return [*sims, *(EngineConfig(engine_id=f"v{i}", max_num_seqs=8) for i in range(self._vllm))]
