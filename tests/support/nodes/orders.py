"""The orders to a node, as RQ stores them."""

from __future__ import annotations

from typing import Any

from rsm.broker import Settings
from rsm.workers.supervision.node import queue_name
from tests.support.nodes.process import NAME


def jobs_of(settings: Settings, db: Any, name: str = NAME) -> dict[str, dict[bytes, bytes]]:
    """RQ's records of all orders to a node, by id."""
    found = {key.decode().removeprefix("rq:job:"): db.hgetall(key) for key in db.scan_iter("rq:job:*", _type="hash")}
    queue = queue_name(settings, name).encode()
    return {job_id: job for job_id, job in found.items() if job.get(b"origin") == queue}


def queued(settings: Settings, db: Any, name: str = NAME) -> list[str]:
    """The orders that wait for a node, or that it is about to begin."""
    key = f"rq:queue:{queue_name(settings, name)}"
    return [job.decode() for key in (key, f"{key}:intermediate") for job in db.lrange(key, 0, -1)]
