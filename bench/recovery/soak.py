"""A soak test: checks that nothing grows beyond its retention.

    python -m bench.recovery.soak --minutes 60 [--share 0.5]     load at a share of the maximum, which is measured first
    python -m bench.recovery.soak --calls 1000000                this many calls, as fast as possible

One router, two `sim` workers and one producer run as real processes on a private server. Its result and session TTLs
are short, so that retention reaches its plateau early. The table, in bench/results/, shows the RSS of each process and
Redis's used_memory at the start, after the warm-up (two TTLs), at the end of the load, and once everything has expired.
The slope is that of a least-squares line through the samples between the warm-up and the end of the load.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

import psutil

from bench.processes import running, wait_ready
from bench.report.machine import machine, server_name
from bench.report.page import RESULTS
from rsm.broker import CallHandle, Client, Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.factory import connect
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.views.monitor import Monitor

MIB = 1 << 20
PROMPT = "x" * 200
CALLS_PER_SESSION = 10
INFLIGHT = 200
MEASURED = 20_000
ENGINES = ("e0", "e1")
_TICK_S = 0.02
_WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Sizes in MiB, at `at_s` seconds since the load began."""

    at_s: float
    mib: dict[str, float]
    keys: int


@dataclass(frozen=True, slots=True)
class Soak:
    """The result of a run. `rate` and `maximum` in calls per second; `states`: calls by terminal state."""

    calls: int
    seconds: float
    rate: float
    maximum: float
    states: dict[str, int]
    warm_up_s: float
    samples: list[Sample]
    before: Sample
    after: Sample
    usage_after: dict[str, dict[str, int]]
    machine: dict[str, Any]


# -- the producer, a separate process


def produce(settings: Settings, rate: float, seconds: float, calls: int) -> dict[str, Any]:
    """Submits `rate` calls per second for `seconds`, or `calls` calls as fast as possible; waits for all of them."""
    states: dict[str, int] = {}
    ended = threading.Condition()
    free = threading.Semaphore(INFLIGHT)

    def note(handle: CallHandle) -> None:
        state = str(handle.wait().state)
        with ended:
            states[state] = states.get(state, 0) + 1
            ended.notify()
        free.release()

    sent, run, began = 0, new_id(), time.perf_counter()
    with Client(settings=settings, on_overload="wait") as client:
        while (sent < calls) if calls else (time.perf_counter() - began < seconds):
            due = calls - sent if calls else int((time.perf_counter() - began) * rate) - sent
            count = _take(free, min(due, 32))
            if not count:
                time.sleep(_TICK_S)
                continue
            some = [_call(client, run, sent + i) for i in range(count)]
            for handle in client.submit_many(some):
                handle.add_done_callback(note)
            sent += count
        with ended:
            assert ended.wait_for(lambda: sum(states.values()) == sent, _WAIT_S), f"{sent} sent, ended: {states}"
    return {"calls": sent, "seconds": time.perf_counter() - began, "states": states}


def _take(free: threading.Semaphore, most: int) -> int:
    """Takes up to `most` free places in flight, and waits for at least one; returns their number."""
    if most <= 0:
        return 0
    free.acquire()
    taken = 1
    while taken < most and free.acquire(blocking=False):
        taken += 1
    return taken


def _call(client: Client, run: str, number: int) -> Any:
    session = f"{run}-{number // CALLS_PER_SESSION}"
    return client.prepare(PROMPT, session=session, stream=number % CALLS_PER_SESSION == 0, max_tokens=4)


# -- the other processes


@contextmanager
def stage(settings: Settings, folder: Path) -> Iterator[dict[str, int]]:
    """Runs a router and two workers; yields their pids once they are ready for calls."""
    with ExitStack() as stack:
        pids = {"router": stack.enter_context(running("router", settings, folder / "router.json"))}
        for engine in ENGINES:
            config = {"engine_id": engine, "model": "noop", "backend": "sim", "max_num_seqs": 256}
            env = {"RSM_ENGINE": json.dumps({**config, "engine_args": {"instant": True}})}
            pids[engine] = stack.enter_context(running("worker", settings, folder / f"{engine}.json", env))
        wait_ready(settings, ENGINES)
        yield pids


class Scale:
    """Measures the memory of all processes and the server."""

    def __init__(self, settings: Settings, pids: dict[str, int]) -> None:
        self._server: Any = connect(settings)
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._began = time.monotonic()

    def weigh(self) -> Sample:
        mib = {name: p.memory_info().rss / MIB for name, p in self._processes.items() if p.is_running()}
        mib["Redis used_memory"] = self._server.info("memory")["used_memory"] / MIB
        return Sample(time.monotonic() - self._began, mib, self._server.dbsize())

    def follow(self, producer: subprocess.Popen[str], every_s: float) -> tuple[list[Sample], dict[str, Any]]:
        """Takes samples until the producer has ended; returns them with its result."""
        self._processes["producer"] = psutil.Process(producer.pid)
        self._began, samples = time.monotonic(), []
        while True:
            try:
                output, _ = producer.communicate(timeout=every_s)
            except subprocess.TimeoutExpired:
                samples.append(self.weigh())
            else:
                del self._processes["producer"]
                assert producer.returncode == 0, "the producer failed"
                return samples, json.loads(output.splitlines()[-1])


def producer(settings: Settings, rate: float = 0, seconds: float = 0, calls: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.recovery.soak", "--produce", json.dumps([rate, seconds, calls])]
    env = os.environ | settings.environment() | {"RSM_LOG_LEVEL": "WARNING"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def soak(args: argparse.Namespace) -> Soak:
    ttl = {"result_ttl_s": args.result_ttl, "session_ttl_s": args.session_ttl}
    with tempfile.TemporaryDirectory(dir="/tmp") as name, EmbeddedRedis() as server:
        settings = Settings(namespace="soak", **ttl).with_redis(server.url)
        with stage(settings, Path(name)) as pids:
            scale = Scale(settings, pids)
            _, result = scale.follow(producer(settings, calls=MEASURED), args.every)
            maximum = result["calls"] / result["seconds"]
            _until_expired(settings, scale)
            before = scale.weigh()
            if args.calls:
                load = producer(settings, calls=args.calls)
            else:
                load = producer(settings, rate=args.share * maximum, seconds=args.minutes * 60)
            samples, result = scale.follow(load, args.every)
            _until_expired(settings, scale)
            about = _machine(settings)
            usage = Monitor(settings).usage()
            after = scale.weigh()
    warm_up = min(2 * max(args.result_ttl, args.session_ttl), 0.5 * result["seconds"])
    calls, seconds, states = result["calls"], result["seconds"], result["states"]
    return Soak(calls, seconds, calls / seconds, maximum, states, warm_up, samples, before, after, usage, about)


def _until_expired(settings: Settings, scale: Scale) -> None:
    """Waits until all calls and sessions have expired."""
    until = time.monotonic() + 2 * max(settings.result_ttl_s, settings.session_ttl_s) + _WAIT_S
    server: Any = connect(settings)
    prefix = Keys(settings.namespace).prefix
    while any(server.scan_iter(match=f"{prefix}call:*", count=10_000)) or any(
        server.scan_iter(match=f"{prefix}session:*", count=10_000)
    ):
        assert time.monotonic() < until, f"keys have not expired: {scale.weigh()}"
        time.sleep(1)
    # Leave time for a last round of Redis's active expiry and of the routers' timer.
    time.sleep(2)


def _machine(settings: Settings) -> dict[str, Any]:
    info: Any = connect(settings).info("server")
    return {
        **machine("soak", server_name(info)),
        "server": server_name(info),
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


# -- the page


def slope(samples: Sequence[Sample], name: str, warm_up_s: float) -> float | None:
    """Returns the slope, in MiB per hour, of a line through the samples after the warm-up; None if too few."""
    points = [(s.at_s, s.mib[name]) for s in samples if s.at_s >= warm_up_s and name in s.mib]
    if len(points) < 3:
        return None
    return linear_regression(*zip(*points, strict=True)).slope * 3600


def page(run: Soak) -> str:
    warm = [s for s in run.samples if s.at_s >= run.warm_up_s]
    lines = [
        f"# Soak: {run.calls:,} calls in {run.seconds / 60:.1f} minutes",
        "",
        f"{run.rate:,.0f} calls per second; the measured maximum was {run.maximum:,.0f}. "
        f"Terminal states: {run.states}.",
        f"{run.machine['server']}, Python {run.machine['python']}, {run.machine['cores']} cores, "
        f"load average {run.machine['load_average']:.1f} at the end.",
        "",
        f"| MiB | before | warm ({run.warm_up_s:.0f} s) | end of load | slope per hour | after expiry |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in run.samples[-1].mib:
        found = slope(run.samples, name, run.warm_up_s)
        cells = [
            _mib(run.before, name),
            _mib(warm[0], name) if warm else "",
            _mib(run.samples[-1], name),
            "" if found is None else f"{found:+.2f}",
            _mib(run.after, name),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    keys = [str(s.keys) for s in (run.before, *warm[:1], run.samples[-1], run.after)]
    lines += [
        "",
        f"Keys: {', '.join(keys)} (before, warm, end of load, after expiry). Usage after expiry: {run.usage_after}.",
    ]
    return "\n".join(lines) + "\n"


def _mib(sample: Sample, name: str) -> str:
    return f"{sample.mib[name]:.2f}" if name in sample.mib else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--calls", type=int, default=0, help="Calls, as fast as possible, instead of --minutes.")
    parser.add_argument("--share", type=float, default=0.5, help="Load, as a share of the maximum.")
    parser.add_argument("--result-ttl", type=int, default=60)
    parser.add_argument("--session-ttl", type=int, default=60)
    parser.add_argument("--every", type=float, default=5.0, help="Seconds between samples.")
    parser.add_argument("--name", default="soak", help="Name of the result files in bench/results.")
    parser.add_argument("--produce", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.produce:
        print(json.dumps(produce(Settings(), *json.loads(args.produce))))
        return
    run = soak(args)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(asdict(run), indent=1) + "\n")
    (RESULTS / f"{args.name}.md").write_text(page(run))
    print(page(run))


if __name__ == "__main__":
    main()
