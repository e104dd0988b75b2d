"""Runs routers and workers as real processes for benchmarks, and counts their round trips to Redis.

`python -m bench.processes router|worker` runs the ordinary program. When it ends, it writes its number of round trips
to the file named in BENCH_COUNTS. Each send on a connection counts as one round trip.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis.connection
from redis.asyncio.connection import AbstractConnection as AsyncConnection

from rsm.broker import Settings
from rsm.broker.views.monitor import Monitor

COUNTS = "BENCH_COUNTS"
ABORTS = "BENCH_ABORTS"
READY_S = 60.0


class RoundTrips:
    """Counts the round trips of this process to Redis: one send, or one packed pipeline, is one round trip."""

    def __init__(self) -> None:
        self.count = 0

    def install(self) -> None:
        sync: Any = redis.connection.AbstractConnection
        sync.send_packed_command = self._counted(sync.send_packed_command)
        asynchronous: Any = AsyncConnection
        asynchronous.send_packed_command = self._counted(asynchronous.send_packed_command)

    def _counted(self, send: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return send(*args, **kwargs)

        return counted


@contextmanager
def running(name: str, settings: Settings, counts: Path, env: dict[str, str] | None = None) -> Iterator[int]:
    """Runs a router or a worker as a process until the end of the block; yields its pid."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.processes", name],
        env=os.environ | settings.environment() | {COUNTS: str(counts), "RSM_LOG_LEVEL": "WARNING"} | (env or {}),
    )
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def fleet(
    settings: Settings, folder: Path, engine: dict[str, Any], env: dict[str, str] | None = None
) -> Iterator[dict[str, int]]:
    """Runs one router and one worker; yields their pids once they are ready for calls."""
    config = json.dumps({"engine_id": "e0", "model": "noop", "backend": "sim", **engine})
    with (
        running("router", settings, folder / "router.json") as router,
        running("worker", settings, folder / "worker.json", {"RSM_ENGINE": config} | (env or {})) as worker,
    ):
        wait_ready(settings, ["e0"])
        yield {"router": router, "worker": worker}


def wait_ready(settings: Settings, engines: Sequence[str]) -> None:
    until = time.monotonic() + READY_S
    while sum(e["state"] == "READY" for e in Monitor(settings).engines()) < len(engines):
        assert time.monotonic() < until, f"not all of {engines} were READY after {READY_S:g} s"
        time.sleep(0.02)


def read_count(path: Path) -> int:
    return int(json.loads(path.read_text())["round_trips"])


def stamp_aborts(path: Path) -> None:
    """Makes this worker write a line "CALL seconds" for each abort, on the machine's monotonic clock."""
    from rsm.workers.backends.sim.backend import SimBackend

    abort: Any = SimBackend.abort
    stamps = path.open("a", buffering=1)

    def stamped(self: Any, key: str) -> None:
        stamps.write(f"{key.partition('/')[0]} {time.monotonic()}\n")
        abort(self, key)

    SimBackend.abort = stamped  # type: ignore[method-assign]


def main() -> None:
    if ABORTS in os.environ and sys.argv[1] == "worker":
        stamp_aborts(Path(os.environ[ABORTS]))
    trips = RoundTrips()
    trips.install()
    try:
        runpy.run_module({"router": "rsm.router", "worker": "rsm.workers"}[sys.argv[1]], run_name="__main__")
    finally:
        Path(os.environ[COUNTS]).write_text(json.dumps({"round_trips": trips.count}))


if __name__ == "__main__":
    main()
