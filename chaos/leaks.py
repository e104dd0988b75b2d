"""Finds leaks: keys that never expire, and processes that were left behind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import redis

# Keys that may have no expiry: they hold no call forever, or vanish when empty.
LASTING = re.compile(
    r"(calls|dead|stats|usage|usage:sessions|finished|engines|deadlines|(parked|held|starving):.*|holding"
    r"|engine:[^:]+(:queue|:work|:starving|:residents|:running)?"  # an engine's hash lasts while it is registered
    r"|session:[^:]+:calls)"
)
_SCAN = 1000


def leaked_keys(server: redis.Redis, prefix: str) -> list[str]:
    """Returns the keys under `prefix`, without the prefix, that never expire although they should."""
    names = [name for name in _without_expiry(server, prefix) if not LASTING.fullmatch(name)]
    names = [name for name in names if not _is_open_call(server, prefix + name)]
    return [name for name in names if not _is_at_work(server, prefix, name)]


def _without_expiry(server: redis.Redis, prefix: str) -> Iterator[str]:
    pattern = prefix.replace("[", r"\[") + "*"
    for key in server.scan_iter(match=pattern, count=_SCAN):
        if server.ttl(key) == -1:
            yield key.decode().removeprefix(prefix)


def _is_open_call(server: redis.Redis, key: str) -> bool:
    """Tells whether a key is the record or the log of an unfinished call, which must not expire."""
    return server.hget(key.removesuffix(":events"), "state") in (b"PENDING", b"RUNNING") if ":call:" in key else False


def _is_at_work(server: redis.Redis, prefix: str, name: str) -> bool:
    """Tells whether a key is the residency of a session with unfinished calls, which must not expire."""
    kind, _, session = name.partition(":")
    return kind == "residency" and server.exists(f"{prefix}session:{session}:calls") == 1


def processes_of(namespace: str, folder: Path | None = None, url: str | None = None) -> list[psutil.Process]:
    """Returns the live processes of a namespace; `url` limits them to one server, `folder` adds the server in it.

    They are found by their environment and folder, so processes without a parent are included.
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
