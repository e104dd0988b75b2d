"""RQ after `kill -9`: the time from a worker's death until the second attempt starts, with a second worker waiting.

Two workers run. The one that takes the job is killed in the middle of it and restarted at once. Its work-horse is
killed, too, since it would otherwise continue as an orphan. RQ retries a lost job only if the job has a Retry, and
finds it when a worker's maintenance sees that its lease has expired.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

from redis import Redis
from rq import Queue, Retry, Worker

JOB = f"{Path(__file__).stem}.job"
JOB_S = 5.0
KILL_AFTER_S = 1.0
WORKERS = 2
WORKER_UP_S = 120
# By then both workers are up and have finished their start-up work.
SETTLE_S = 10
PROFILES: dict[str, tuple[dict[str, int], str]] = {
    "default": ({}, "Retry(max=3), otherwise default"),
    "tuned": (
        {"worker_ttl": 30, "maintenance_interval": 5, "job_monitoring_interval": 5},
        "Retry(max=3), worker-ttl 30 s, maintenance and job monitoring every 5 s",
    ),
}


def job(url: str, key: str) -> None:
    """Reports when and where it starts, and works for a while."""
    with Redis.from_url(url) as server:
        server.rpush(key, f"{os.getppid()} {time.monotonic()}")
    time.sleep(JOB_S)


def next_start(server: Any, key: str, limit_s: float) -> tuple[int, float] | None:
    """Returns the pid and the monotonic second of the next attempt; None if it does not start in time."""
    found = server.blpop(key, timeout=limit_s)
    if found is None:
        return None
    pid, at = found[1].split()
    return int(pid), float(at)


def measure(url: str, profile: str, limit_s: float) -> float | None:
    """Returns the seconds from the kill to the second attempt; None if it does not start in time."""
    name = f"recovery-{uuid.uuid4().hex}"
    key = f"{name}:starts"
    workers = [worker(url, name, profile) for _ in range(WORKERS)]
    with Redis.from_url(url, socket_timeout=None) as server:
        try:
            time.sleep(SETTLE_S)
            Queue(name, connection=server).enqueue(JOB, url, key, retry=Retry(max=3))
            first = next_start(server, key, WORKER_UP_S)
            time.sleep(KILL_AFTER_S)
            victim = next(w for w in workers if first is not None and w.pid == first[0])
            kill_tree(victim)
            killed = time.monotonic()
            workers.append(worker(url, name, profile))
            second = next_start(server, key, limit_s)
            return None if second is None else second[1] - killed
        finally:
            for process in workers:
                kill_tree(process)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kills a worker with kill -9, and its work-horse, which has its own process group."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    horses = path.read_text().split() if process.poll() is None else []
    for pid in (*map(int, horses), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def worker(url: str, queue: str, profile: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--redis", url, "--profile", profile, "--worker", queue]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def exit_with_parent() -> None:
    """Ends this process when standard input closes, even if the parent was killed."""
    os.read(0, 1)
    os._exit(0)


def work(url: str, queue: str, profile: str) -> None:
    threading.Thread(target=exit_with_parent, daemon=True).start()
    Worker([queue], connection=Redis.from_url(url), **PROFILES[profile][0]).work(logging_level="WARNING")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis", required=True, metavar="URL")
    parser.add_argument("--limit", type=float, default=180, help="Seconds to wait for the second attempt.")
    parser.add_argument("--profile", choices=PROFILES, default="default")
    parser.add_argument("--worker", metavar="QUEUE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.redis, args.worker, args.profile)
        return
    seconds = measure(args.redis, args.profile, args.limit)
    settings = PROFILES[args.profile][1]
    print(json.dumps({"name": "RQ", "version": version("rq"), "settings": settings, "seconds": seconds}))


if __name__ == "__main__":
    main()
