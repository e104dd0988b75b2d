"""RQ in the queue benchmark: one SimpleWorker (no fork per job), results read from RQ's own result streams.

RQ does not poll: `latest_result(timeout)` is a blocking XREAD on the job's result stream. The single worker runs jobs
in order, so waiting for the oldest job first costs no time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

from redis import Redis
from rq import Queue, SimpleWorker

PAYLOAD = "x" * 200
NOOP = f"{Path(__file__).stem}.noop"
ROUND_TRIPS = 300
WAIT_S = 30
NOTE = "SimpleWorker; results by blocking XREAD, no polling; enqueue_many, a fifth of the window at a time"


def noop(payload: str) -> None:
    """The job."""


def connect(url: str) -> Redis:
    # redis-py ends a read after 5 s by default, but a blocking read needs longer.
    return Redis.from_url(url, socket_timeout=WAIT_S + 5)


def finished(job: Any) -> None:
    """Waits until the producer has read the job's result."""
    result = job.latest_result(timeout=WAIT_S)
    if result is None or result.type is not result.Type.SUCCESSFUL:
        raise RuntimeError(f"job {job.id} did not finish: {result}")


def throughput(queue: Any, calls: int, inflight: int) -> float:
    """Returns calls per second with at most `inflight` in flight."""
    # A fifth of the window at a time is faster here than one by one or all at once.
    step = max(1, inflight // 5)
    waiting: deque[Any] = deque()
    sent = 0
    start = perf_counter()
    while sent < calls or waiting:
        if sent < calls and len(waiting) + step <= inflight:
            batch = [Queue.prepare_data(NOOP, (PAYLOAD,)) for _ in range(min(step, calls - sent))]
            waiting.extend(queue.enqueue_many(batch))
            sent += len(batch)
        else:
            finished(waiting.popleft())
    return calls / (perf_counter() - start)


def round_trip(queue: Any) -> float:
    """Returns the milliseconds of a single call."""
    start = perf_counter()
    finished(queue.enqueue(NOOP, PAYLOAD))
    return (perf_counter() - start) * 1000


def measure(url: str, calls: int, inflight: int) -> dict[str, object]:
    queue = Queue(f"bench-{uuid.uuid4().hex}", connection=connect(url))
    with worker_process(url, queue.name):
        throughput(queue, inflight, inflight)  # The first result also shows that the worker is up.
        calls_per_s = throughput(queue, calls, inflight)
        return record(calls_per_s, [round_trip(queue) for _ in range(ROUND_TRIPS)])


def record(calls_per_s: float, trips_ms: list[float]) -> dict[str, object]:
    cuts = quantiles(trips_ms, n=100, method="inclusive")
    return {
        "name": "RQ",
        "version": version("rq"),
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


def work(url: str, queue: str) -> None:
    threading.Thread(target=exit_with_parent, daemon=True).start()
    SimpleWorker([queue], connection=connect(url)).work(logging_level="WARNING")


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
        work(args.redis, args.worker)
    else:
        show(measure(args.redis, args.calls, args.inflight), as_json=args.json)


if __name__ == "__main__":
    main()
