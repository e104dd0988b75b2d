"""taskiq with taskiq-redis after `kill -9`: the time from a worker's death until the second attempt starts.

Two workers run. The one that takes the job is killed in the middle of it and restarted at once. The stream broker
claims the messages of a dead worker after they have been idle for `idle_timeout` (10 min by default). Workers do not
renew it, so it must be longer than the longest job. The broker looks for idle messages only after a read that returned
new ones.
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

from redis.asyncio import Redis
from taskiq.api import run_receiver_task  # type: ignore[import-not-found]
from taskiq_redis import RedisStreamBroker  # type: ignore[import-not-found]

JOB_S = 5.0
KILL_AFTER_S = 1.0
IDLE_MS = 2 * int(JOB_S * 1000)
LOCK_S = 1.0  # by default the lock never expires, so a worker that dies with it would hold it forever
TRAFFIC_S = 1.0
WORKER_UP_S = 120
# By then both workers are up and have finished their start-up work.
SETTLE_S = 10
WORKERS = 2
# Whether other messages arrive, and the description of the profile.
PROFILES = {
    "default": (False, f"idle_timeout={IDLE_MS / 1000:g} s (twice the job), no other messages"),
    "tuned": (True, f"idle_timeout={IDLE_MS / 1000:g} s (twice the job), another message every {TRAFFIC_S:g} s"),
}


def build(url: str, queue: str) -> tuple[Any, Any, Any]:
    """Returns the broker, the job and a task that does nothing."""
    broker = RedisStreamBroker(url, queue_name=queue, idle_timeout=IDLE_MS, unacknowledged_lock_timeout=LOCK_S)

    async def job() -> None:
        async with Redis.from_url(url) as server:
            await server.rpush(f"{queue}:starts", f"{os.getpid()} {time.monotonic()}")
        await asyncio.sleep(JOB_S)

    async def noop() -> None:
        """Traffic."""

    return broker, broker.task(task_name="job")(job), broker.task(task_name="noop")(noop)


async def next_start(server: Any, queue: str, limit_s: float) -> tuple[int, float] | None:
    """Returns the pid and the monotonic second of the next attempt; None if it does not start in time."""
    found = await server.blpop(f"{queue}:starts", timeout=limit_s)
    if found is None:
        return None
    pid, at = found[1].split()
    return int(pid), float(at)


async def traffic(noop: Any) -> None:
    while True:
        await noop.kiq()
        await asyncio.sleep(TRAFFIC_S)


async def measure(url: str, profile: str, limit_s: float) -> float | None:
    """Returns the seconds from the kill to the second attempt; None if it does not start in time."""
    queue = f"recovery-{uuid.uuid4().hex}"
    broker, job, noop = build(url, queue)
    await broker.startup()  # creates the group at "$"; a call sent before it exists would be skipped
    workers = [worker(url, queue) for _ in range(WORKERS)]
    async with Redis.from_url(url, socket_timeout=None) as server:
        try:
            await asyncio.sleep(SETTLE_S)
            await job.kiq()
            first = await next_start(server, queue, WORKER_UP_S)
            await asyncio.sleep(KILL_AFTER_S)
            victim = next(w for w in workers if first is not None and w.pid == first[0])
            victim.kill()
            killed = time.monotonic()
            victim.wait()
            workers.append(worker(url, queue))
            others = asyncio.create_task(traffic(noop)) if PROFILES[profile][0] else None
            try:
                second = await next_start(server, queue, limit_s)
                return None if second is None else second[1] - killed
            finally:
                if others is not None:
                    others.cancel()
        finally:
            for process in workers:
                process.kill()
                process.wait()
            await broker.shutdown()


def worker(url: str, queue: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--redis", url, "--worker", queue]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def exit_with_parent() -> None:
    """Ends this process when standard input closes, even if the parent was killed."""
    os.read(0, 1)
    os._exit(0)


async def work(url: str, queue: str) -> None:
    threading.Thread(target=exit_with_parent, daemon=True).start()
    await run_receiver_task(build(url, queue)[0], run_startup=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis", required=True, metavar="URL")
    parser.add_argument("--limit", type=float, default=180, help="Seconds to wait for the second attempt.")
    parser.add_argument("--profile", choices=PROFILES, default="default")
    parser.add_argument("--worker", metavar="QUEUE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        asyncio.run(work(args.redis, args.worker))
        return
    seconds = asyncio.run(measure(args.redis, args.profile, args.limit))
    versions = f"{version('taskiq')} + taskiq-redis {version('taskiq-redis')}"
    settings = PROFILES[args.profile][1]
    print(json.dumps({"name": "taskiq", "version": versions, "settings": settings, "seconds": seconds}))


if __name__ == "__main__":
    main()
