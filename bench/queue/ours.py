"""rsm-engine in the queue benchmark: no-op calls through one router and one `sim` worker.

`python -m bench.queue.ours --redis URL --calls N --inflight 100 --json` prints one JSON object as its last line, like
the peers: calls per second with N calls in flight, and round trips at low load.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

from bench.processes import fleet
from rsm.broker import CallHandle, Client, Settings
from rsm.broker.protocol.ids import new_id

PROMPT = "x" * 200
WARM_UP = 500
LOW_LOAD = 300
# Several calls per program, so that sessions, affinity and the process table are used as agents use them.
CALLS_PER_SESSION = 10
INSTANT = {"max_num_seqs": 256, "engine_args": {"instant": True}}


def throughput(client: Client, calls: int, inflight: int) -> float:
    """Returns calls per second, from submit to result, with at most `inflight` at a time."""
    waiting: list[CallHandle] = []
    sent, began = 0, perf_counter()
    while sent < calls or waiting:
        free = min(inflight - len(waiting), calls - sent)
        if free:
            some = [
                client.prepare(PROMPT, session=f"s{(sent + i) // CALLS_PER_SESSION}", max_tokens=1) for i in range(free)
            ]
            waiting += client.submit_many(some)
            sent += free
        waiting[0].result(30)
        waiting = [handle for handle in waiting if not handle.done or _read(handle)]
    return calls / (perf_counter() - began)


def _read(handle: CallHandle) -> bool:
    """Reads the result as a caller would; always False, so that the handle is dropped from the list."""
    assert handle.result().completion_tokens == 1
    return False


def round_trips(client: Client, n: int) -> list[float]:
    """Returns the milliseconds from submit to result of each call, one call at a time."""
    times = []
    for _ in range(n):
        began = perf_counter()
        client.submit(PROMPT, max_tokens=1).result(30)
        times.append((perf_counter() - began) * 1000)
    return times


def measure(url: str, calls: int, inflight: int) -> dict[str, Any]:
    settings = Settings(namespace=f"bench-{new_id()}", result_ttl_s=60).with_redis(url)
    with (
        tempfile.TemporaryDirectory() as name,
        fleet(settings, Path(name), INSTANT),
        Client(settings=settings) as client,
    ):
        throughput(client, WARM_UP, inflight)
        low = quantiles(round_trips(client, LOW_LOAD), n=100)
        rate = throughput(client, calls, inflight)
    return {
        "name": "rsm-engine",
        "version": version("rsm-engine"),
        "redis_py": version("redis"),
        "calls_per_s": rate,
        "rtt_p50_ms": low[49],
        "rtt_p99_ms": low[98],
        "note": "one router, one sim worker; results through one inbox, no polling; process table and affinity kept",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis", default=os.environ.get("RSM_REDIS_URL"), required="RSM_REDIS_URL" not in os.environ)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--inflight", type=int, default=100)
    parser.add_argument("--json", action="store_true", help="Accepted for symmetry; the output is always JSON.")
    args = parser.parse_args()
    print(json.dumps(measure(args.redis, args.calls, args.inflight)))


if __name__ == "__main__":
    main()
