"""A soak: does anything grow beyond its retention?

    python -m bench.recovery.soak --minutes 60 [--share 0.5]     load at a share of the maximum, which is measured first
    python -m bench.recovery.soak --calls 1000000                so many calls, as fast as they go

One router, two `sim` workers, one producer, all real processes, and a private server whose result and session TTLs are
short, so that retention reaches its plateau early. The table says what each process holds (RSS) and Redis's
used_memory at the start, after warming up (two TTLs) and at the end of the load, with the slope of a line through the
samples in between (least squares), and what Redis holds once everything has expired. Written to bench/results/.
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

from bench.processes import part, wait_ready
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
    """`at_s` seconds since the load began; sizes in MiB."""

    at_s: float
    mib: dict[str, float]
    keys: int


@dataclass(frozen=True, slots=True)
class Soak:
    """What a run gave. `rate` and `maximum` in calls a second; `states`: calls by how they ended."""

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


# -- the producer, a process of its own


def produce(settings: Settings, rate: float, seconds: float, calls: int) -> dict[str, Any]:
    """Submits `rate` calls a second for so many seconds, or, with `calls`, so many as fast as they go; awaits all."""
    states: dict[str, int] = {}
    ended = threading.Condition()
    room = threading.Semaphore(INFLIGHT)

    def note(handle: CallHandle) -> None:
        state = str(handle.wait().state)
        with ended:
            states[state] = states.get(state, 0) + 1
            ended.notify()
        room.release()

    sent, run, began = 0, new_id(), time.perf_counter()
    with Client(settings=settings, on_overload="wait") as client:
        while (sent < calls) if calls else (time.perf_counter() - began < seconds):
            due = calls - sent if calls else int((time.perf_counter() - began) * rate) - sent
            many = _take(room, min(due, 32))
            if not many:
                time.sleep(_TICK_S)
                continue
            some = [_call(client, run, sent + i) for i in range(many)]
            for handle in client.submit_many(some):
                handle.add_done_callback(note)
            sent += many
        with ended:
            assert ended.wait_for(lambda: sum(states.values()) == sent, _WAIT_S), f"{sent} sent, ended: {states}"
    return {"calls": sent, "seconds": time.perf_counter() - began, "states": states}


def _take(room: threading.Semaphore, most: int) -> int:
    """How many more may be in flight, up to `most`; waits for one if none."""
    if most <= 0:
        return 0
    room.acquire()
    taken = 1
    while taken < most and room.acquire(blocking=False):
        taken += 1
    return taken


def _call(client: Client, run: str, number: int) -> Any:
    session = f"{run}-{number // CALLS_PER_SESSION}"
    return client.prepare(PROMPT, session=session, stream=number % CALLS_PER_SESSION == 0, max_tokens=4)


# -- the stage


@contextmanager
def stage(settings: Settings, folder: Path) -> Iterator[dict[str, int]]:
    """A router and two workers, ready for calls; their pids."""
    with ExitStack() as stack:
        pids = {"router": stack.enter_context(part("router", settings, folder / "router.json"))}
        for engine in ENGINES:
            config = {"engine_id": engine, "model": "noop", "backend": "sim", "max_num_seqs": 256}
            env = {"RSM_ENGINE": json.dumps({**config, "engine_args": {"instant": True}})}
            pids[engine] = stack.enter_context(part("worker", settings, folder / f"{engine}.json", env))
        wait_ready(settings, ENGINES)
        yield pids


class Scale:
    """Weighs all processes and the server."""

    def __init__(self, settings: Settings, pids: dict[str, int]) -> None:
        self._server: Any = connect(settings)
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._began = time.monotonic()

    def weigh(self) -> Sample:
        mib = {name: p.memory_info().rss / MIB for name, p in self._processes.items() if p.is_running()}
        mib["Redis used_memory"] = self._server.info("memory")["used_memory"] / MIB
        return Sample(time.monotonic() - self._began, mib, self._server.dbsize())

    def follow(self, producer: subprocess.Popen[str], every_s: float) -> tuple[list[Sample], dict[str, Any]]:
        """Samples until the producer has ended; what it says at its end."""
        self._processes["producer"] = psutil.Process(producer.pid)
        self._began, samples = time.monotonic(), []
        while True:
            try:
                said, _ = producer.communicate(timeout=every_s)
            except subprocess.TimeoutExpired:
                samples.append(self.weigh())
            else:
                del self._processes["producer"]
                assert producer.returncode == 0, "the producer failed"
                return samples, json.loads(said.splitlines()[-1])


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
            _, said = scale.follow(producer(settings, calls=MEASURED), args.every)
            maximum = said["calls"] / said["seconds"]
            _until_expired(settings, scale)
            before = scale.weigh()
            if args.calls:
                load = producer(settings, calls=args.calls)
            else:
                load = producer(settings, rate=args.share * maximum, seconds=args.minutes * 60)
            samples, said = scale.follow(load, args.every)
            _until_expired(settings, scale)
            about = _machine(settings)
            usage = Monitor(settings).usage()
            after = scale.weigh()
    warm_up = min(2 * max(args.result_ttl, args.session_ttl), 0.5 * said["seconds"])
    rate = said["calls"] / said["seconds"]
    return Soak(
        said["calls"], said["seconds"], rate, maximum, said["states"], warm_up, samples, before, after, usage, about
    )


def _until_expired(settings: Settings, scale: Scale) -> None:
    """Waits until retention is over: no more keys than those that last, or that a live part keeps."""
    until = time.monotonic() + 2 * max(settings.result_ttl_s, settings.session_ttl_s) + _WAIT_S
    server: Any = connect(settings)
    prefix = Keys(settings.namespace).prefix
    while any(server.scan_iter(match=f"{prefix}call:*", count=10_000)) or any(
        server.scan_iter(match=f"{prefix}session:*", count=10_000)
    ):
        assert time.monotonic() < until, f"keys stay: {scale.weigh()}"
        time.sleep(1)
    # The active expiry and the routers' timer have a last round to make.
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
    """MiB an hour, of a line through the samples behind the warm-up; None without enough of them."""
    points = [(s.at_s, s.mib[name]) for s in samples if s.at_s >= warm_up_s and name in s.mib]
    if len(points) < 3:
        return None
    return linear_regression(*zip(*points, strict=True)).slope * 3600


def page(run: Soak) -> str:
    warm = [s for s in run.samples if s.at_s >= run.warm_up_s]
    lines = [
        f"# Soak: {run.calls:,} calls in {run.seconds / 60:.1f} minutes",
        "",
        f"{run.rate:,.0f} calls a second; the maximum here was {run.maximum:,.0f}. Ends: {run.states}.",
        f"{run.machine['server']}, Python {run.machine['python']}, {run.machine['cores']} cores, "
        f"load average {run.machine['load_average']:.1f} at the end.",
        "",
        f"| MiB | before | warm ({run.warm_up_s:.0f} s) | end of load | slope an hour | after expiry |",
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
        f"Keys: {', '.join(keys)} (before, warm, end of load, after expiry). In use after: {run.usage_after}.",
    ]
    return "\n".join(lines) + "\n"


def _mib(sample: Sample, name: str) -> str:
    return f"{sample.mib[name]:.2f}" if name in sample.mib else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--calls", type=int, default=0, help="so many as fast as they go, instead of --minutes")
    parser.add_argument("--share", type=float, default=0.5, help="of the maximum")
    parser.add_argument("--result-ttl", type=int, default=60)
    parser.add_argument("--session-ttl", type=int, default=60)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples")
    parser.add_argument("--name", default="soak", help="of the files in bench/results")
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
