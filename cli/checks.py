"""The checks of `rsm doctor`. Each one says what to do about what it finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import redis

from rsm.broker.connection import execute
from rsm.broker.connection.eviction import SAFE
from rsm.broker.connection.factory import connect
from rsm.broker.connection.topology import place_of
from rsm.broker.protocol.codec import text
from rsm.broker.protocol.keys import ROUTER_GROUP
from rsm.broker.protocol.models import EngineState
from rsm.broker.settings import Settings
from rsm.broker.views.dead_letters import DeadLetters
from rsm.broker.views.monitor import Monitor
from rsm.cli.output import counted

Status = Literal["ok", "warning", "problem"]

_OLDEST = {"Redis": (7, 0), "Valkey": (7, 2)}
_KINDS = {"": "single server", "sentinel": "master by Sentinel", "cluster": "master of the namespace's slot"}
_SKEW_MS = 1000.0
_NEARLY_FULL = 0.8
_FULL = {
    "open_calls": "New calls will soon be refused: add engines, or raise RSM_MAX_OPEN_CALLS.",
    "open_bytes": "New calls will soon be refused: add engines, or raise RSM_MAX_OPEN_BYTES.",
    "retained_bytes": "Results will soon be removed before their TTL: shorten RSM_RESULT_TTL_S, or raise "
    "RSM_MAX_RETAINED_BYTES.",
    "dead_bytes": "The oldest dead letters will soon be removed: run `rsm dead replay`, or raise RSM_MAX_DEAD_BYTES.",
}
# In a healthy deployment, an entry leaves the router stream within milliseconds.
_SLOW_BACKLOG_MS = 5_000
_STUCK_BACKLOG_MS = 60_000


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found. `advice` says what to do; it may be empty."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def examine(settings: Settings) -> list[Check]:
    """Runs all checks. If Redis does not answer, only the first one."""
    server: Any = connect(settings)
    try:
        reached = _reachable(server)
        if reached.status == "problem":
            return [reached]
        monitor = Monitor(settings, server)
        return [reached, *(_guarded(name, check, server, monitor) for name, check in _CHECKS.items())]
    finally:
        server.close()


def _guarded(name: str, check: Callable[[Any, Monitor], Check], server: Any, monitor: Monitor) -> Check:
    """Runs one check. If the server refuses it (a managed one may forbid INFO), the others still run."""
    try:
        return check(server, monitor)
    except redis.RedisError as e:
        advice = "Check this user's permissions in Redis."
        return Check(name, "warning", f"could not be checked ({type(e).__name__}).", advice)


def _reachable(server: Any) -> Check:
    began = time.perf_counter()
    try:
        server.time()  # not PING, which a Redis with a full disk refuses
    except redis.RedisError as e:
        advice = "Start everything with `rsm up`, or name a server with --redis or RSM_REDIS_URL."
        return Check("redis", "problem", f"does not answer ({type(e).__name__}).", advice)
    return Check("redis", "ok", f"answers in {(time.perf_counter() - began) * 1000:.1f} ms.")


def _version(server: Any, _: Monitor) -> Check:
    name, shown = _server_version(server.info("server"))
    oldest = _OLDEST[name]
    if tuple(int(part) for part in shown.split(".")[:2]) < oldest:
        return Check("version", "problem", f"{name} {shown}.", f"Use {name} {oldest[0]}.{oldest[1]} or newer.")
    return Check("version", "ok", f"{name} {shown}.")


def _server_version(info: Mapping[str, Any]) -> tuple[str, str]:
    """Name and version. Valkey reports a `redis_version` too, for old clients."""
    if "valkey_version" in info:
        return "Valkey", str(info["valkey_version"])
    return "Redis", str(info["redis_version"])


def _replication(server: Any, monitor: Monitor) -> Check:
    """Which server this is, and whether its replicas suffice."""
    info, settings = server.info("replication"), monitor.settings
    kind = place_of(settings.url(), settings.namespace).kind
    replicas = [info[f"slave{i}"] for i in range(int(info.get("connected_slaves", 0)))]
    lag = max((int(r.get("lag", 0)) for r in replicas), default=0)
    shown = f"{_KINDS[kind]}, {counted(len(replicas), 'replica')}" + (f", lag {lag} s." if replicas else ".")
    if info.get("role") != "master":
        advice = "Set RSM_REDIS_URL to the master, or to Sentinel."
        return Check("replication", "problem", f"this server is a {info.get('role')}.", advice)
    if len(replicas) < settings.wait_replicas:
        advice = (
            f"RSM_WAIT_REPLICAS is {settings.wait_replicas}: every push fails with NotReplicated. Check the replicas."
        )
        return Check("replication", "problem", shown, advice)
    if kind == "sentinel" and not replicas:
        return Check("replication", "warning", shown, "Start a replica: without one, there is no failover.")
    return Check("replication", "ok", shown)


def _persistence(server: Any, _: Monitor) -> Check:
    info = server.info("persistence")
    if not info.get("aof_enabled"):
        advice = "Set `appendonly yes`; otherwise accepted calls are lost when Redis restarts."
        return Check("persistence", "problem", "the append-only file is off.", advice)
    for field in ("aof_last_write_status", "aof_last_bgrewrite_status"):
        if info.get(field, "ok") != "ok":
            return Check("persistence", "problem", f"{field} is {info[field]}.", "Check Redis's log and its disk.")
    return Check("persistence", "ok", "append-only file, last write ok.")


def _memory(server: Any, _: Monitor) -> Check:
    info = server.info("memory")
    policy, limit, used = str(info.get("maxmemory_policy")), int(info.get("maxmemory", 0)), int(info["used_memory"])
    shown = f"maxmemory-policy {policy}, {used >> 20} MiB used" + (f" of {limit >> 20}." if limit else ".")
    if policy != SAFE:
        return Check("memory", "problem", shown, f"Set `maxmemory-policy {SAFE}`: no process starts with another one.")
    if limit and used > _NEARLY_FULL * limit:
        return Check("memory", "warning", shown, "Raise maxmemory, or shorten RSM_RESULT_TTL_S.")
    return Check("memory", "ok", shown)


def _usage(_: Any, monitor: Monitor) -> Check:
    usage = monitor.usage()
    shown = "; ".join(usage_line(name, u) for name, u in usage.items()) + "."
    full = [name for name, u in usage.items() if u["bound"] and u["used"] > _NEARLY_FULL * u["bound"]]
    if not full:
        return Check("usage", "ok", shown)
    return Check("usage", "warning", shown, " ".join(_FULL[name] for name in full))


def usage_line(name: str, usage: Mapping[str, int]) -> str:
    """One limit and how much of it is used: "open calls 5 of 200000"."""
    return f"{name.replace('_', ' ')} {used_of_limit(name, usage)}"


def used_of_limit(name: str, usage: Mapping[str, int]) -> str:
    unit, size = (" MiB", 20) if name.endswith("bytes") else ("", 0)
    used, limit = usage["used"] >> size, usage["bound"] >> size
    return f"{used} of {limit}{unit}" if usage["bound"] else f"{used}{unit} (no limit)"


def _clock(server: Any, _: Monitor) -> Check:
    sent = time.time()
    seconds, micros = server.time()
    # Redis read its clock between sending and receiving; half way is the best guess.
    skew = abs((sent + time.time()) / 2 - seconds - micros / 1e6) * 1000
    if skew > _SKEW_MS:
        advice = "Run NTP on both. This affects only deadlines that producers compute from their own clock."
        return Check("clock", "warning", f"this machine and Redis differ by {skew / 1000:.1f} s.", advice)
    return Check("clock", "ok", f"this machine and Redis differ by {skew:.0f} ms.")


def _scripts(server: Any, _: Monitor) -> Check:
    try:
        execute.load_all(server)
    except redis.ResponseError as e:
        return Check("scripts", "problem", f"Redis refuses them ({type(e).__name__}).", "Allow EVAL, EVALSHA, SCRIPT.")
    return Check("scripts", "ok", "all are loaded.")


def _routers(server: Any, monitor: Monitor) -> Check:
    advice = "Start one with `rsm up` or `rsm router`."
    try:
        groups = {text(g["name"]) for g in server.xinfo_groups(monitor.keys.calls)}
    except redis.ResponseError:
        return Check("routers", "problem", "none has ever served this namespace.", advice)
    if ROUTER_GROUP not in groups:
        return Check("routers", "problem", "the consumer group is missing.", advice)
    alive = server.zcount(monitor.keys.routers, monitor.now_ms() - 2 * monitor.settings.lease_ms, "+inf")
    if not alive:
        seen = server.zcard(monitor.keys.routers)
        return Check("routers", "problem", f"none is alive ({seen} seen recently).", advice)
    return Check("routers", "ok", f"{alive} alive.")


def _backlog(server: Any, monitor: Monitor) -> Check:
    oldest = server.xrange(monitor.keys.calls, count=1)
    if not oldest:
        return Check("backlog", "ok", "no call waits for a router.")
    age = monitor.now_ms() - int(text(oldest[0][0]).partition("-")[0])
    shown = f"{counted(monitor.backlog(), 'call')} not yet routed; the oldest waits for {age / 1000:.1f} s."
    if age > _STUCK_BACKLOG_MS:
        return Check("backlog", "problem", shown, "Start a router, or check the routers' logs.")
    if age > _SLOW_BACKLOG_MS:
        return Check("backlog", "warning", shown, "Start another router: `rsm router`.")
    return Check("backlog", "ok", shown)


def _engines(_: Any, monitor: Monitor) -> Check:
    now, lease = monitor.now_ms(), monitor.settings.lease_ms
    engines = [e for e in monitor.engines() if e["state"] != EngineState.STOPPED or e["error"]]
    ready = [e for e in engines if e["state"] == EngineState.READY and now - e["heartbeat_ms"] <= lease]
    ids = {e["engine_id"] for e in ready}
    others = ", ".join(f"{e['engine_id']} {_condition(e, now, lease)}" for e in engines if e["engine_id"] not in ids)
    also = f"; {others.rstrip('.')}" if others else ""
    if not ready:
        advice = "Start one with `rsm up` or `rsm worker`, or check the workers' logs."
        return Check("engines", "problem", f"none is ready{also}.", advice)
    shown = f"{len(ready)} ready with {counted(sum(e['max_num_seqs'] for e in ready), 'slot')}{also}."
    if others:
        return Check("engines", "warning", shown, "Check the logs of those that are not ready.")
    return Check("engines", "ok", shown)


def _condition(engine: Mapping[str, Any], now: int, lease: int) -> str:
    """Why an engine is not ready."""
    if engine["state"] == EngineState.READY:
        return f"has sent no heartbeat for {(now - engine['heartbeat_ms']) / 1000:.1f} s (lease: {lease / 1000:g} s)"
    return f"is {engine['state']}{': ' + engine['error'] if engine['error'] else ''}"


def _dead_letters(server: Any, monitor: Monitor) -> Check:
    count = DeadLetters(monitor.settings, server).count()
    if count:
        return Check("dead letters", "warning", f"{count}.", "See `rsm dead ls`, then `rsm dead replay`.")
    return Check("dead letters", "ok", "none.")


_CHECKS: dict[str, Callable[[Any, Monitor], Check]] = {
    "version": _version,
    "replication": _replication,
    "persistence": _persistence,
    "memory": _memory,
    "usage": _usage,
    "clock": _clock,
    "scripts": _scripts,
    "routers": _routers,
    "backlog": _backlog,
    "engines": _engines,
    "dead letters": _dead_letters,
}
