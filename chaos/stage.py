"""The stage: Redis, two routers, workers and producers as real processes, each behind a line of its own.

Each process is kept running by the project's own supervisor, and started again by the stage, as an operator would,
where a supervisor rightly leaves it alone (after an orderly end).
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
from chaos.producers.process import KINDS, heeds_signals
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
# Fast timers, so that many deaths fit into a run; every other setting is the default, save for these:
# attempts and deaths, for a call that was really killed often enough to be given up would look like a lost one;
# the inbox, for a trimmed one could not be counted.
_SETTINGS = {
    "lease_ms": 1500,
    "heartbeat_ms": 200,
    "tick_ms": 100,
    "drain_grace_s": 1.0,
    "max_attempts": 1000,
    "max_deaths": 1000,
    "inbox_max": 1_000_000,
}
# Even seeds also have all that serves programs, and caches so small that calls are held.
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
class Part:
    """One process of the stage, whichever incarnation runs."""

    name: str
    line: Proxy
    make: Callable[[], Supervised]
    supervised: Supervised

    @property
    def pid(self) -> int | None:
        return self.supervised.pid


class Stage:
    """Brings all up and down.

    Args:
        vllm: how many workers run real vLLM with the tiny model.
    """

    def __init__(self, seed: int, vllm: int = 0) -> None:
        self.seed = seed
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))  # short: a socket's path has 107 bytes at most
        self.server = EmbeddedRedis(self.folder / "redis")
        chosen: dict[str, Any] = _SETTINGS if seed % 2 else _SETTINGS | _PROGRAMS
        self.settings = Settings(namespace=f"chaos{new_id()}", redis_url=None, **chosen)
        self.settings = self.settings.with_redis(self.server.url)
        self.ledgers = [self.folder / f"ledger-{place}" for place in range(len(KINDS))]
        self.routers: list[Part] = []
        self.workers: list[Part] = []
        self.producers: list[Part] = []
        self._vllm = vllm
        self._lines: Lines | None = None
        self._logs: list[int] = []

    # -- up and down

    def start(self) -> None:
        """Redis, routers and workers; returns once all engines are READY."""
        self.start_redis()
        self._lines = Lines(self.server.socket)
        self.routers = [self._router(i) for i in range(ROUTERS)]
        self.workers = [self._worker(config) for config in self._engines()]
        until = time.monotonic() + _READY_S
        while not self.all_ready():
            if time.monotonic() > until:
                raise TimeoutError(f"not all engines were READY after {_READY_S:g} s; see {self.folder}")
            time.sleep(0.1)

    def start_producers(self, pool: Pool | None) -> None:
        """One process of each kind. `pool`: prompts for the engines that are not modelled."""
        more = [] if pool is None else ["--pool", json.dumps(asdict(pool))]
        self.producers = [self._producer(place, kind, more) for place, kind in enumerate(KINDS)]

    def producing(self) -> bool:
        """Every producer is up, and would leave in order."""
        files = [heeds_signals(path) for path in self.ledgers]
        return all(f.exists() and f.read_text() == str(p.pid) for f, p in zip(files, self.producers, strict=True))

    def stop_producers(self, timeout_s: float) -> bool:
        """No new calls; True if all that were under way ended within the time."""
        for part in self.producers:
            part.supervised.request_stop()
        until = time.monotonic() + timeout_s
        while any(part.supervised.running for part in self.producers):
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    def stop(self) -> None:
        """Ends all processes, also those that a fault has stopped."""
        self._heal()
        for parts in (self.producers, self.workers, self.routers):
            for part in parts:
                part.supervised.request_stop()
            for part in parts:
                part.supervised.stop()
        if self._lines is not None:
            self._lines.close()
        self.server.stop()
        for log in self._logs:
            os.close(log)

    def _heal(self) -> None:
        parts = (*self.producers, *self.workers, *self.routers)
        for pid in (self.server.pid, *(part.pid for part in parts)):
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        for part in parts:
            self.do(part.line.flow)

    def clean_up(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def tend(self) -> None:
        """Starts again what has left in order, or was refused its id: what an operator does."""
        for part in (*self.routers, *self.workers):
            if not part.supervised.running:
                part.supervised = part.make()
                part.supervised.start()

    def all_ready(self) -> bool:
        """Every engine takes calls."""
        monitor = Monitor(self.settings)
        try:
            states = {e["engine_id"]: e["state"] for e in monitor.engines()}
        except redis.RedisError:
            return False
        return all(states.get(part.name) == EngineState.READY for part in self.workers)

    # -- Redis

    def start_redis(self) -> None:
        """`always`: what was acknowledged survives kill -9, which `everysec` does not promise."""
        for tries_left in reversed(range(_REDIS_STARTS)):
            try:
                self.server.start()
                break
            except BrokerUnavailable:  # a busy machine may take longer to load the AOF than one start waits for it
                if not tries_left:
                    raise
        self.configure("appendfsync", "always")

    def configure(self, name: str, value: str) -> None:
        """One setting of the server."""
        with self.connection() as server:
            server.config_set(name, value)

    @contextlib.contextmanager
    def connection(self) -> Iterator[redis.Redis]:
        """Straight to the server, past all proxies."""
        server = connect(self.settings)
        try:
            yield server
        finally:
            server.close()

    def fill_disk(self) -> None:
        """The server's files may grow no more: its writes to the AOF come up short, as on a full disk."""
        self.configure("auto-aof-rewrite-percentage", "0")  # a new AOF would have room again
        self.configure("appendfsync", "everysec")  # with `always` the server ends itself on a full disk
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
        """Changes a line."""
        assert self._lines is not None
        self._lines.do(action)

    # -- parts

    def _router(self, number: int) -> Part:
        command = [sys.executable, "-P", "-m", "rsm.router"]
        return self._part(f"r{number}", lambda s, o: Supervised(f"router {number}", command, s.environment(), output=o))

    def _worker(self, config: EngineConfig) -> Part:
        return self._part(config.engine_id, lambda s, o: worker_process(config, s, output=o))

    def _producer(self, place: int, kind: str, more: list[str]) -> Part:
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
        return self._part(name, lambda s, o: Supervised(name, [*command, *more], s.environment(), output=o))

    def _part(self, name: str, make: Callable[[Settings, int], Supervised]) -> Part:
        assert self._lines is not None
        line = self._lines.open(name)
        settings = self.settings.with_redis(line.url)
        log = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._logs.append(log)
        part = Part(name, line, lambda: make(settings, log), make(settings, log))
        part.supervised.start()
        return part

    def _engines(self) -> Sequence[EngineConfig]:
        times = {"step_s": _STEP_S, "prefill_token_s": 0, "decode_seq_s": 0, "context_token_s": 0}
        sims = [
            EngineConfig(engine_id=f"w{i}", backend="sim", model=SIM_MODEL, max_num_seqs=8, engine_args=times)
            for i in range(SIM_WORKERS)
        ]
        return [*sims, *(EngineConfig(engine_id=f"v{i}", max_num_seqs=8) for i in range(self._vllm))]
