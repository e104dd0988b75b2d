"""taskiq with taskiq-redis in the queue benchmark: stream broker, Redis result backend, one worker process.

taskiq polls for results (EXISTS, then GET). The interval is 1 ms in both tests. In the throughput test anything from 0
to 40 ms gave the same figure within the noise, because the worker is the bottleneck. The worker runs
`run_receiver_task`, which is the receiver of `taskiq worker --workers 1` without the process manager, with 100 async
tasks at a time (the library's default).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from statistics import quantiles
from time import perf_counter
from typing import Any

from taskiq.api import run_receiver_task  # type: ignore[import-not-found]
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker  # type: ignore[import-not-found]

PAYLOAD = "x" * 200
ROUND_TRIPS = 300
WORKER_CONCURRENCY = 100
POLL_S = 0.001
WAIT_S = 30
RESULT_TTL_S = 600
NOTE = "stream broker (acknowledges but never deletes); worker concurrency 100; results polled every 1 ms"


async def noop(payload: str) -> None:
    """The job."""


def build(url: str, queue: str) -> tuple[Any, Any]:
    """Returns the broker and its one task."""
    backend = RedisAsyncResultBackend(url, result_ex_time=RESULT_TTL_S)
    broker = RedisStreamBroker(url, queue_name=queue).with_result_backend(backend)
    return broker, broker.task(task_name="noop")(noop)


async def call(task: Any) -> float:
    """Submits one call, reads its result, and returns the milliseconds."""
    start = perf_counter()
    handle = await task.kiq(PAYLOAD)
    result = await handle.wait_result(check_interval=POLL_S, timeout=WAIT_S)
    result.raise_for_error()
    return (perf_counter() - start) * 1000


async def throughput(task: Any, calls: int, inflight: int) -> float:
    """Returns calls per second with `inflight` lanes, each with one call in flight at all times."""
    numbers = iter(range(calls))

    async def lane() -> None:
        for _ in numbers:
            await call(task)

    start = perf_counter()
    await asyncio.gather(*(lane() for _ in range(inflight)))
    return calls / (perf_counter() - start)


async def measure(url: str, calls: int, inflight: int) -> dict[str, object]:
    queue = f"bench-{uuid.uuid4().hex}"
    broker, task = build(url, queue)
    # This creates the consumer group at "$". A call sent before it exists would be skipped.
    await broker.startup()
    try:
        with worker_process(url, queue):
            await throughput(task, inflight, inflight)  # The first result also shows that the worker is up.
            calls_per_s = await throughput(task, calls, inflight)
            return record(calls_per_s, [await call(task) for _ in range(ROUND_TRIPS)])
    finally:
        await broker.shutdown()


def record(calls_per_s: float, trips_ms: list[float]) -> dict[str, object]:
    cuts = quantiles(trips_ms, n=100, method="inclusive")
    return {
        "name": "taskiq",
        "version": f"{version('taskiq')} + taskiq-redis {version('taskiq-redis')}",
        "redis_py": version("redis"),
        "calls_per_s": round(calls_per_s, 1),
        "rtt_p50_ms": round(cuts[49], 3),
        "rtt_p99_ms": round(cuts[98], 3),
        "note": NOTE,
    }


@contextmanager
def worker_process(url: str, queue: str) -> Iterator[None]:
    """Runs this file as the worker; leaving the block closes its standard input, which ends it."""
    command = [sys.executable, __file__, "--redis", url, "--worker", queue]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr):
        yield


def exit_with_parent() -> None:
    """Ends this process when standard input closes, even if the producer was killed."""
    os.read(0, 1)
    os._exit(0)


async def work(url: str, queue: str) -> None:
    threading.Thread(target=exit_with_parent, daemon=True).start()
    broker, _ = build(url, queue)
    await run_receiver_task(broker, run_startup=True, max_async_tasks=WORKER_CONCURRENCY)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis", required=True, metavar="URL", help="URL (unix:// or redis://) of a spare server.")
    parser.add_argument("--calls", type=int, default=1000, help="Calls in the throughput test.")
    parser.add_argument("--inflight", type=int, default=100, help="Calls in flight in the throughput test.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object as the last line.")
    parser.add_argument("--worker", metavar="QUEUE", help=argparse.SUPPRESS)
    return parser.parse_args()


def show(result: dict[str, object], *, as_json: bool) -> None:
    print(json.dumps(result) if as_json else "\n".join(f"{key}: {value}" for key, value in result.items()))


def main() -> None:
    # End at once: cancelled waits for results sometimes swallow the cancellation and continue for WAIT_S.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    args = parse_args()
    if args.worker:
        asyncio.run(work(args.redis, args.worker))
    else:
        show(asyncio.run(measure(args.redis, args.calls, args.inflight)), as_json=args.json)


if __name__ == "__main__":
    main()
