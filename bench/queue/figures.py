"""The figures that have no peer: the router alone, cancellation, memory, CPU time, and round trips to Redis.

Each function makes one measurement on the server at `url`, in its own namespace.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import quantiles

import psutil
import redis

from bench.processes import ABORTS, RoundTrips, fleet, read_count
from bench.queue.ours import INSTANT, PROMPT, throughput
from rsm.broker import Client, Settings
from rsm.broker.connection import execute
from rsm.broker.connection.factory import connect
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.transitions import Transitions
from rsm.router.router import Router

MIB = 1 << 20
ROUTED = 20_000
ROUTED_ALONE = 2_000
CANCELS = 200


def _settings(url: str) -> Settings:
    return Settings(namespace=f"bench-{new_id()}", result_ttl_s=60).with_redis(url)


def router_alone(url: str) -> dict[str, float]:
    """Measures assignments per second in full batches, and a call's time in the router at low load (ms, p50 and p99).

    The registered engine never claims, so only the router and Redis do work. A call's time runs from when the router
    has read its entry until it is assigned.
    """
    settings = _settings(url)
    keys, server = Keys(settings.namespace), connect(settings)
    transitions = Transitions(keys, settings)
    router = Router(settings)
    router._prepare()
    _register_idle_engine(server, transitions)
    with Client(settings=settings) as client:
        _push(client, ROUTED)
        began = time.perf_counter()
        while router.place(router._read()):
            pass
        # The last read waits one tick for calls that never arrive.
        rate = ROUTED / (time.perf_counter() - began - settings.tick_ms / 1000)
        times = []
        for _ in range(ROUTED_ALONE):
            client.submit(PROMPT, max_tokens=1)
            entries = router._read()
            began = time.perf_counter()
            assert router.place(entries) == 1
            times.append((time.perf_counter() - began) * 1000)
    cuts = quantiles(times, n=100)
    server.delete(keys.queue("idle"))
    return {"assignments_per_s": rate, "call_p50_ms": cuts[49], "call_p99_ms": cuts[98]}


def _register_idle_engine(server: redis.Redis, transitions: Transitions) -> None:
    registered = execute.run(server, transitions.register("idle", "bench", {"model": "noop", "max_num_seqs": 256}))
    assert registered.ok
    assert execute.run(server, transitions.heartbeat("idle", "bench", "READY", {}))


def _push(client: Client, n: int) -> None:
    client.submit_many([client.prepare(PROMPT, session=f"s{i // 10}", max_tokens=1) for i in range(n)])


def cancellation(url: str) -> dict[str, float]:
    """Measures the time from a cancel to the abort in the worker, in ms: p50 and p99.

    The clock starts before the client sends the cancel, so the figure includes the client's trip to Redis. The worker
    stamps each abort with the machine's monotonic clock, which all processes share.
    """
    settings = _settings(url)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stamps = folder / "aborts"
        engine = {"max_num_seqs": CANCELS, "engine_args": {"step_s": 0.02}}
        with fleet(settings, folder, engine, {ABORTS: str(stamps)}), Client(settings=settings) as client:
            handles = [client.submit(PROMPT, max_tokens=100_000, id=f"c{i}") for i in range(CANCELS)]
            while any(h.record().state != "RUNNING" for h in handles):
                time.sleep(0.05)
            sent = {}
            for handle in handles:
                sent[handle.id] = time.monotonic()
                assert handle.cancel()
                handle.wait(30)
        aborted = {k: float(v) for k, v in (line.split() for line in stamps.read_text().splitlines())}
    cuts = quantiles([(aborted[call] - at) * 1000 for call, at in sent.items()], n=100)
    return {"cancel_p50_ms": cuts[49], "cancel_p99_ms": cuts[98]}


def memory(url: str) -> dict[str, float]:
    """Measures, in MiB, the router's RSS after 5,000 calls, and what a worker adds to the engine library."""
    settings = _settings(url)
    with (
        tempfile.TemporaryDirectory() as name,
        fleet(settings, Path(name), INSTANT) as pids,
        Client(settings=settings) as client,
    ):
        throughput(client, 5_000, 100)
        router = psutil.Process(pids["router"]).memory_info().rss / MIB
    return {"router_mib": router, **_worker_memory(url)}


def _worker_memory(url: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.queue.worker_memory"],
        env=os.environ | _settings(url).environment() | {"RSM_LOG_LEVEL": "WARNING"},
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def cpu_per_call(url: str, server_pid: int, calls: int, inflight: int) -> dict[str, float]:
    """Measures a call's CPU time in each process, in microseconds. Their sum limits the throughput of a machine."""
    settings = _settings(url)
    with (
        tempfile.TemporaryDirectory() as folder,
        fleet(settings, Path(folder), INSTANT) as pids,
        Client(settings=settings) as client,
    ):
        throughput(client, 1_000, inflight)
        processes = {"server": server_pid, **pids, "producer": os.getpid()}
        before = {name: _cpu_s(pid) for name, pid in processes.items()}
        throughput(client, calls, inflight)
        return {f"cpu_{name}": (_cpu_s(pid) - before[name]) / calls * 1e6 for name, pid in processes.items()}


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def trips_per_call(url: str, calls: int, inflight: int) -> dict[str, float]:
    """Measures each process's round trips per call, amortised over `inflight` calls. Idle timeouts count, too."""
    trips = RoundTrips()
    trips.install()
    settings = _settings(url)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with fleet(settings, folder, INSTANT), Client(settings=settings) as client:
            before = trips.count
            throughput(client, calls, inflight)
            producer = trips.count - before
        return {
            "trips_producer": producer / calls,
            "trips_router": read_count(folder / "router.json") / calls,
            "trips_worker": read_count(folder / "worker.json") / calls,
        }
