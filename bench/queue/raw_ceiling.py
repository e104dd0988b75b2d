"""The ceiling of the queue benchmark: bare redis-py and streams, without leases or retries.

One producer process and one consumer process. The producer sends calls in XADD pipelines and reads results by
blocking XREAD. The consumer takes up to 100 calls by XREADGROUP and answers them in one pipeline of result XADDs, one
XACK and one XDEL. Nothing polls.
"""

from __future__ import annotations

import argparse
import json
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

from redis import Redis
from redis.utils import HIREDIS_AVAILABLE

PAYLOAD = b"x" * 200
GROUP = "consumers"
BATCH = 100
ROUND_TRIPS = 300
WAIT_S = 30
RESULTS_KEPT = 1000


def connect(url: str) -> Any:
    # RESP2 keeps the shape of stream replies the same across redis-py versions.
    # redis-py ends a read after 5 s by default, but a blocking read needs longer.
    return Redis.from_url(url, protocol=2, socket_timeout=WAIT_S + 5)


def entries(reply: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Returns the entries of a reply to a read of one stream."""
    return reply[0][1] if reply else []


class Producer:
    """Submits calls and reads their results."""

    def __init__(self, redis: Any, stream: str) -> None:
        self._redis = redis
        self._calls, self._results = stream, f"{stream}:results"
        self._seen: bytes | str = "0-0"

    def open(self) -> None:
        self._redis.xgroup_create(self._calls, GROUP, id="0", mkstream=True)

    def close(self) -> None:
        self._redis.delete(self._calls, self._results)
        self._redis.close()

    def submit(self, count: int) -> None:
        pipe = self._redis.pipeline(transaction=False)
        for _ in range(count):
            pipe.xadd(self._calls, {b"payload": PAYLOAD})
        pipe.execute()

    def collect(self) -> int:
        """Waits for results and returns their number."""
        found = entries(self._redis.xread({self._results: self._seen}, count=BATCH, block=WAIT_S * 1000))
        if not found:
            raise TimeoutError(f"no result in {WAIT_S} s")
        self._seen = found[-1][0]
        return len(found)

    def throughput(self, calls: int, inflight: int) -> float:
        """Returns calls per second with `inflight` in flight: every result read allows a new call."""
        start = perf_counter()
        sent = min(calls, inflight)
        self.submit(sent)
        done = 0
        while done < calls:
            got = self.collect()
            done += got
            more = min(got, calls - sent)
            if more:
                self.submit(more)
                sent += more
        return calls / (perf_counter() - start)

    def round_trip(self) -> float:
        """Returns the milliseconds of a single call."""
        start = perf_counter()
        self.submit(1)
        self.collect()
        return (perf_counter() - start) * 1000


def work(url: str, stream: str) -> None:
    """Answers calls until the process is ended."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    redis = connect(url)
    while True:
        taken = entries(redis.xreadgroup(GROUP, "consumer", {stream: ">"}, count=BATCH, block=WAIT_S * 1000))
        if taken:
            answer(redis, stream, [call_id for call_id, _ in taken])


def answer(redis: Any, stream: str, ids: list[bytes]) -> None:
    pipe = redis.pipeline(transaction=False)
    for call_id in ids:
        pipe.xadd(f"{stream}:results", {b"id": call_id}, maxlen=RESULTS_KEPT)
    pipe.xack(stream, GROUP, *ids)
    pipe.xdel(stream, *ids)
    pipe.execute()


def measure(url: str, calls: int, inflight: int) -> dict[str, object]:
    stream = f"bench-{uuid.uuid4().hex}"
    producer = Producer(connect(url), stream)
    producer.open()
    try:
        with worker_process(url, stream):
            producer.throughput(inflight, inflight)  # The first result also shows that the consumer is up.
            calls_per_s = producer.throughput(calls, inflight)
            return record(calls_per_s, [producer.round_trip() for _ in range(ROUND_TRIPS)])
    finally:
        producer.close()


def record(calls_per_s: float, trips_ms: list[float]) -> dict[str, object]:
    cuts = quantiles(trips_ms, n=100, method="inclusive")
    parser = f"hiredis {version('hiredis')}" if HIREDIS_AVAILABLE else "no hiredis"
    return {
        "name": "raw streams",
        "version": version("redis"),
        "redis_py": version("redis"),
        "calls_per_s": round(calls_per_s, 1),
        "rtt_p50_ms": round(cuts[49], 3),
        "rtt_p99_ms": round(cuts[98], 3),
        "note": f"ceiling: no lease, no retry, results unchecked; pipelines, batches up to {BATCH}; {parser}",
    }


@contextmanager
def worker_process(url: str, stream: str) -> Iterator[None]:
    """Runs this file as the consumer; leaving the block closes its standard input, which ends it."""
    command = [sys.executable, __file__, "--redis", url, "--worker", stream]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr):
        yield


def exit_with_parent() -> None:
    """Ends this process when standard input closes, even if the producer was killed."""
    os.read(0, 1)
    os._exit(0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis", required=True, metavar="URL", help="URL (unix:// or redis://) of a spare server.")
    parser.add_argument("--calls", type=int, default=10000, help="Calls in the throughput test.")
    parser.add_argument("--inflight", type=int, default=100, help="Calls in flight in the throughput test.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object as the last line.")
    parser.add_argument("--worker", metavar="STREAM", help=argparse.SUPPRESS)
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
