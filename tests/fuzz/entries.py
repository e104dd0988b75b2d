"""Malformed entries through a real router on a real Redis, with good calls in between."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from rsm.broker import CallHandle, Client, RequestState, Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.views.monitor import Monitor
from tests.fuzz.decoders import CUT, DECODERS
from tests.fuzz.mutate import mutants
from tests.support.rsm_command import clean_env
from tests.support.sim_processes import WorkerProcess, sim, state_of
from tests.support.waiting import eventually

_AT_ONCE = 500
_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Passage:
    """The outcome of a run. `left`: entries that no router has placed. Sizes in MiB, of the router process."""

    entries: int
    good: int
    answered: int
    left: int
    pending: int
    failed: int
    dead_letters: int
    rss_early_mib: float
    rss_late_mib: float
    slowest_good_s: float
    seconds: float
    server: str

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def pass_through(entries: int, seed: int = 0) -> Passage:
    """Pushes this many malformed entries, and a good call after each `_AT_ONCE` of them."""
    with tempfile.TemporaryDirectory(prefix="rsm-fuzz-") as name, EmbeddedRedis(Path(name) / "r") as server:
        # Short TTLs, so that mutants that happen to be well-formed do not use up the limits for the good calls.
        settings = Settings(result_ttl_s=60, session_ttl_s=60).with_redis(server.url)
        env = clean_env() | settings.environment()
        with (Path(name) / "router.log").open("ab") as log:
            router = subprocess.Popen([sys.executable, "-P", "-m", "rsm.router"], env=env, stdout=log, stderr=log)
        worker = WorkerProcess(sim().model_copy(update={"engine_args": {"instant": True}}), settings, Path(name) / "w")
        try:
            return _push_all(settings, psutil.Process(router.pid), entries, seed)
        finally:
            worker.kill()
            router.kill()
            router.wait()


def _push_all(settings: Settings, router: psutil.Process, entries: int, seed: int) -> Passage:
    began = time.monotonic()
    monitor = Monitor(settings)
    eventually(lambda: state_of(monitor, "e1") == "READY", 60)
    intake = next(d for d in DECODERS if d.name == "router intake")
    stream = mutants(intake.seeds, random.Random(seed))
    sizes: list[int] = []
    good: list[CallHandle] = []
    slowest = 0.0
    with Client(settings=settings) as client:
        for at in range(0, entries, _AT_ONCE):
            _push(client, itertools.islice(stream, min(_AT_ONCE, entries - at)))
            good.append(client.submit(f"good {at}", max_tokens=4))
            sent = time.monotonic()
            good[-1].wait(_PATIENCE_S)
            slowest = max(slowest, time.monotonic() - sent)
            sizes.append(router.memory_info().rss)
        eventually(lambda: monitor.backlog() == 0, _PATIENCE_S)
        redis: Any = client.redis
        pending = redis.xpending(client.keys.calls, "router")["pending"]
        answered = sum(h.wait(0).state is RequestState.COMPLETED for h in good)
        info = redis.info("server")
    stats = monitor.stats()
    return Passage(
        entries=entries,
        good=len(good),
        answered=answered,
        left=monitor.backlog(),
        pending=pending,
        failed=stats["failed"],
        dead_letters=stats["dead_letters"],
        rss_early_mib=sizes[len(sizes) // 10] / 2**20,
        rss_late_mib=sizes[-1] / 2**20,
        slowest_good_s=slowest,
        seconds=time.monotonic() - began,
        server=f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}",
    )


def _push(client: Client, inputs: Any) -> None:
    pipe: Any = client.redis.pipeline(transaction=False)
    for data in inputs:
        # A stream entry may have a field twice. A name without a value gets an empty one.
        parts = data.split(CUT)
        pipe.execute_command("XADD", client.keys.calls, "*", *parts, *([b""] if len(parts) % 2 else []))
    pipe.execute()
