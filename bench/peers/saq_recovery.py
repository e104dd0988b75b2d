"""SAQ after `kill -9`: the time from a worker's death until the second attempt starts, with a second worker waiting.

Two workers run. The one that takes the job is killed in the middle of it and restarted at once. SAQ retries a lost job
only if `retries` is above its default of 1. It finds the job in a sweep, after the job's `timeout` (10 s by default) or
`heartbeat` (off by default) has passed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from importlib.metadata import version
from typing import Any

from saq import Worker  # type: ignore[import-not-found]
from saq.queue.redis import RedisQueue  # type: ignore[import-not-found]

JOB_S = 5.0
KILL_AFTER_S = 1.0
BEAT_S = 0.5
WORKER_UP_S = 120
# By then both workers are up and have finished their start-up work.
SETTLE_S = 10
WORKERS = 2
# Job options, and how often the workers sweep, in seconds.
PROFILES: dict[str, tuple[dict[str, int], int, str]] = {
    "default": ({"retries": 3}, 60, "retries=3, otherwise default (timeout 10 s, sweep every 60 s)"),
    "tuned": ({"retries": 3, "heartbeat": 2}, 1, "retries=3, heartbeat=2 s written by the job, sweep every 1 s"),
}


def connect(url: str, queue: str) -> Any:
    return RedisQueue.from_url(url, name=queue)


async def job(ctx: dict[str, Any]) -> None:
    """Reports when and where it starts, and works for a while; its updates are heartbeats."""
    queue = ctx["job"].queue
    await queue.redis.rpush(f"{queue.name}:starts", f"{os.getpid()} {time.monotonic()}")
    until = time.monotonic() + JOB_S
    while time.monotonic() < until:
        await ctx["job"].update()
        await asyncio.sleep(BEAT_S)


async def next_start(queue: Any, limit_s: float) -> tuple[int, float] | None:
    """Returns the pid and the monotonic second of the next attempt; None if it does not start in time."""
    found = await queue.redis.blpop(f"{queue.name}:starts", timeout=limit_s)
    if found is None:
        return None
    pid, at = found[1].split()
    return int(pid), float(at)


async def measure(url: str, profile: str, limit_s: float) -> float | None:
    """Returns the seconds from the kill to the second attempt; None if it does not start in time."""
    queue = connect(url, f"recovery-{uuid.uuid4().hex}")
    options, _, _ = PROFILES[profile]
    workers = [worker(url, queue.name, profile) for _ in range(WORKERS)]
    try:
        await asyncio.sleep(SETTLE_S)
        await queue.enqueue("job", **options)
        first = await next_start(queue, WORKER_UP_S)
        await asyncio.sleep(KILL_AFTER_S)
        victim = next(w for w in workers if first is not None and w.pid == first[0])
        victim.kill()
        killed = time.monotonic()
        victim.wait()
        workers.append(worker(url, queue.name, profile))
        second = await next_start(queue, limit_s)
        return None if second is None else second[1] - killed
    finally:
        for process in workers:
            process.kill()
            process.wait()
        await queue.disconnect()


def worker(url: str, queue: str, profile: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--redis", url, "--profile", profile, "--worker", queue]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def exit_with_parent() -> None:
    """Ends this process when standard input closes, even if the parent was killed."""
    os.read(0, 1)
    os._exit(0)


async def work(url: str, name: str, profile: str) -> None:
    threading.Thread(target=exit_with_parent, daemon=True).start()
    _, sweep_s, _ = PROFILES[profile]
    queue = connect(url, name)
    await Worker(queue, functions=[job], concurrency=1, timers={"sweep": sweep_s}).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis", required=True, metavar="URL")
    parser.add_argument("--limit", type=float, default=180, help="Seconds to wait for the second attempt.")
    parser.add_argument("--profile", choices=PROFILES, default="default")
    parser.add_argument("--worker", metavar="QUEUE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        asyncio.run(work(args.redis, args.worker, args.profile))
        return
    seconds = asyncio.run(measure(args.redis, args.profile, args.limit))
    settings = PROFILES[args.profile][2]
    print(json.dumps({"name": "SAQ", "version": version("saq"), "settings": settings, "seconds": seconds}))


if __name__ == "__main__":
    main()
