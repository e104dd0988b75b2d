"""SAQ in the queue benchmark: Redis queue, one worker process, concurrency 100.

SAQ does not poll here: `queue.listen` receives each job's end by pub/sub, then the job is read for its result. That is
faster than `queue.apply` and `queue.map`, which poll every 0.5 s by default. When they polled every 1 ms, a round trip
took 2.8 ms instead of 1.3 ms. `saq.Queue.from_url` rejects unix:// URLs; `RedisQueue.from_url` accepts them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
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

from saq import Status, Worker  # type: ignore[import-not-found]
from saq.job import TERMINAL_STATUSES  # type: ignore[import-not-found]
from saq.queue.redis import RedisQueue  # type: ignore[import-not-found]

PAYLOAD = "x" * 200
ROUND_TRIPS = 300
WORKER_CONCURRENCY = 100
WAIT_S = 30
SWEEP_LOCK_S = 3600
NOTE = "worker concurrency 100; results by pub/sub notice and one GET, no polling; no sweeps"


async def noop(ctx: dict[str, Any], *, payload: str) -> None:
    """The job."""


def connect(url: str, queue: str) -> Any:
    # The default of 20 concurrent operations would limit 100 calls in flight.
    return RedisQueue.from_url(url, name=queue, max_concurrent_ops=WORKER_CONCURRENCY)


class Producer:
    """Submits calls and receives their ends through one `queue.listen` for all of them.

    The listener knows all keys beforehand and lives for the whole run. A new subscription for each call could miss an
    end that comes before it.
    """

    def __init__(self, queue: Any, calls: int) -> None:
        loop = asyncio.get_running_loop()
        self._queue = queue
        self._ends: dict[str, asyncio.Future[None]] = {str(n): loop.create_future() for n in range(calls)}
        self._unused = iter(list(self._ends))
        self._open = calls

    async def listen(self) -> None:
        """Listens until every call has ended; TimeoutError if nothing ends for a while."""
        await self._queue.listen(list(self._ends), self._on_notice, timeout=WAIT_S)

    def _on_notice(self, key: str, status: Any) -> bool:
        if status in TERMINAL_STATUSES:
            self._ends[key].set_result(None)
            self._open -= 1
        return self._open == 0

    async def call(self) -> float:
        """Submits one call, reads its result, and returns the milliseconds."""
        key = next(self._unused)
        start = perf_counter()
        await self._queue.enqueue("noop", key=key, payload=PAYLOAD)
        await self._ends[key]
        job = await self._queue.job(key)
        if job is None or job.status != Status.COMPLETE:
            raise RuntimeError(f"job {key} did not finish: {job}")
        return (perf_counter() - start) * 1000

    async def throughput(self, calls: int, inflight: int) -> float:
        """Returns calls per second with `inflight` lanes, each with one call in flight at all times."""
        numbers = iter(range(calls))

        async def lane() -> None:
            for _ in numbers:
                await self.call()

        start = perf_counter()
        await asyncio.gather(*(lane() for _ in range(inflight)))
        return calls / (perf_counter() - start)


async def hold_sweep_lock(queue: Any) -> None:
    """Keeps the worker from sweeping, at its start and every 60 s, by holding the lock of the (empty) sweep.

    The sweep aborts any job that a worker has taken but not yet marked active, so calls would fail now and then.
    """
    await queue.sweep(lock=SWEEP_LOCK_S)


async def measure(url: str, calls: int, inflight: int) -> dict[str, object]:
    queue = connect(url, f"bench-{uuid.uuid4().hex}")
    producer = Producer(queue, inflight + calls + ROUND_TRIPS)
    try:
        await hold_sweep_lock(queue)
        with worker_process(url, queue.name):
            async with asyncio.TaskGroup() as group:
                group.create_task(producer.listen())
                # This polls, so it ends only when the worker is up. By then the listener has subscribed.
                await queue.apply("noop", timeout=WAIT_S, poll_interval=0.05, payload=PAYLOAD)
                await producer.throughput(inflight, inflight)
                calls_per_s = await producer.throughput(calls, inflight)
                trips_ms = [await producer.call() for _ in range(ROUND_TRIPS)]
        return record(calls_per_s, trips_ms)
    finally:
        await queue.disconnect()


def record(calls_per_s: float, trips_ms: list[float]) -> dict[str, object]:
    cuts = quantiles(trips_ms, n=100, method="inclusive")
    return {
        "name": "SAQ",
        "version": version("saq"),
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
    logging.basicConfig(level=logging.WARNING)
    await Worker(connect(url, queue), functions=[noop], concurrency=WORKER_CONCURRENCY).start()


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
    args = parse_args()
    if args.worker:
        asyncio.run(work(args.redis, args.worker))
    else:
        show(asyncio.run(measure(args.redis, args.calls, args.inflight)), as_json=args.json)


if __name__ == "__main__":
    main()
