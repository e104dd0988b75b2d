"""What may never be left behind: keys that no expiry takes away, and processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import redis

# Keys that may stay without an expiry: they hold no call for ever, or vanish when empty.
LASTING = re.compile(
    r"(calls|dead|stats|usage|usage:sessions|finished|engines|deadlines|(parked|held|starving):.*|holding"
    r"|engine:[^:]+(:queue|:work|:starving|:residents|:running)?"  # an engine's hash lasts while it is registered
    r"|session:[^:]+:calls)"
)
_SCAN = 1000


def leaked_keys(server: redis.Redis, prefix: str) -> list[str]:
    """Keys under `prefix`, named without it, that will stay for ever though they are no lasting ones."""
    names = [name for name in _without_expiry(server, prefix) if not LASTING.fullmatch(name)]
    names = [name for name in names if not _is_open_call(server, prefix + name)]
    return [name for name in names if not _is_at_work(server, prefix, name)]


def _without_expiry(server: redis.Redis, prefix: str) -> Iterator[str]:
    pattern = prefix.replace("[", r"\[") + "*"
    for key in server.scan_iter(match=pattern, count=_SCAN):
        if server.ttl(key) == -1:
            yield key.decode().removeprefix(prefix)


def _is_open_call(server: redis.Redis, key: str) -> bool:
    """A call that is not finished must not expire, nor its log."""
    return server.hget(key.removesuffix(":events"), "state") in (b"PENDING", b"RUNNING") if ":call:" in key else False


def _is_at_work(server: redis.Redis, prefix: str, name: str) -> bool:
    """What a session has of caches lasts while it has unfinished calls."""
    kind, _, session = name.partition(":")
    return kind == "residency" and server.exists(f"{prefix}session:{session}:calls") == 1


def processes_of(namespace: str, folder: Path | None = None, url: str | None = None) -> list[psutil.Process]:
    """Living processes of one namespace, with `url` of that on one server, and with `folder` the server in it.

    Found by what they were started with, so those count, too, whose parent is gone.
    """
    return [p for p in psutil.process_iter() if _belongs(p, namespace, folder, url)]


def _belongs(process: psutil.Process, namespace: str, folder: Path | None, url: str | None) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        env = process.environ()
        ours = env.get("RSM_NAMESPACE") == namespace and url in (None, env.get("RSM_REDIS_URL"))
        return ours or (folder is not None and process.cwd() == str(folder))
    except psutil.Error:
        return False
