"""Is everything as it should be? One small check after the other, each with what to do if not."""

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

Status = Literal["ok", "warning", "problem"]

_FLOOR = {"Redis": (7, 0), "Valkey": (7, 2)}
_KINDS = {"": "one server", "sentinel": "a master that Sentinel names", "cluster": "the slot's master in a Cluster"}
_SKEW_MS = 1000.0
_NEARLY_FULL = 0.8
_FULL = {
    "open_calls": "Producers are about to be refused: add engines, or raise RSM_MAX_OPEN_CALLS.",
    "open_bytes": "Producers are about to be refused: add engines, or raise RSM_MAX_OPEN_BYTES.",
    "retained_bytes": "Results go before their TTL: shorten RSM_RESULT_TTL_S, or raise RSM_MAX_RETAINED_BYTES.",
    "dead_bytes": "The oldest dead letters are about to go: `rsm dead replay`, or raise RSM_MAX_DEAD_BYTES.",
}
# In a healthy deployment an entry stays on the router stream for milliseconds.
_SLOW_BACKLOG_MS = 5_000
_STUCK_BACKLOG_MS = 60_000


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found. `advice` says what to do, "" if nothing."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def examine(settings: Settings) -> list[Check]:
    """Runs all checks. Without Redis there is only the first."""
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
    """A check that this server refuses (a managed one may forbid INFO) must not hide the others."""
    try:
        return check(server, monitor)
    except redis.RedisError as e:
        return Check(name, "warning", f"could not be checked ({type(e).__name__}).", "Look at the user's permissions.")


def _reachable(server: Any) -> Check:
    began = time.perf_counter()
    try:
        server.time()  # not PING: a Redis whose disk is full refuses that one too
    except redis.RedisError as e:
        advice = "Start everything with `rsm up`, or name a server with --redis or RSM_REDIS_URL."
        return Check("redis", "problem", f"does not answer ({type(e).__name__}).", advice)
    return Check("redis", "ok", f"answers in {(time.perf_counter() - began) * 1000:.1f} ms.")


def _version(server: Any, _: Monitor) -> Check:
    name, shown = _server_version(server.info("server"))
    floor = _FLOOR[name]
    if tuple(int(part) for part in shown.split(".")[:2]) < floor:
        return Check("version", "problem", f"{name} {shown}.", f"Use {name} {floor[0]}.{floor[1]} or newer.")
    return Check("version", "ok", f"{name} {shown}.")


def _server_version(info: Mapping[str, Any]) -> tuple[str, str]:
    """Valkey also calls itself a Redis 7.2, for old clients; its own version stands beside."""
    if "valkey_version" in info:
        return "Valkey", str(info["valkey_version"])
    return "Redis", str(info["redis_version"])


def _replication(server: Any, monitor: Monitor) -> Check:
    """Who the master is, and what a fail-over would lose."""
    info, settings = server.info("replication"), monitor.settings
    kind = place_of(settings.url(), settings.namespace).kind
    replicas = [info[f"slave{i}"] for i in range(int(info.get("connected_slaves", 0)))]
    lag = max((int(r.get("lag", 0)) for r in replicas), default=0)
    shown = f"{_KINDS[kind]}, {len(replicas)} replicas" + (f", the slowest {lag} s behind." if replicas else ".")
    if info.get("role") != "master":
        return Check("replication", "problem", f"this server is a {info.get('role')}.", "Name the master, or Sentinel.")
    if len(replicas) < settings.wait_replicas:
        advice = f"RSM_WAIT_REPLICAS is {settings.wait_replicas}: every push fails with NotReplicated. Look at them."
        return Check("replication", "problem", shown, advice)
    if kind == "sentinel" and not replicas:
        return Check("replication", "warning", shown, "Without a replica nobody can take the master's place.")
    return Check("replication", "ok", shown)


def _persistence(server: Any, _: Monitor) -> Check:
    info = server.info("persistence")
    if not info.get("aof_enabled"):
        advice = "Set `appendonly yes`, or accepted calls are lost when Redis restarts."
        return Check("persistence", "problem", "the append-only file is off.", advice)
    for field in ("aof_last_write_status", "aof_last_bgrewrite_status"):
        if info.get(field, "ok") != "ok":
            return Check("persistence", "problem", f"{field} is {info[field]}.", "Look at Redis's log and its disk.")
    return Check("persistence", "ok", "append-only file, last write ok.")


def _memory(server: Any, _: Monitor) -> Check:
    info = server.info("memory")
    policy, limit, used = str(info.get("maxmemory_policy")), int(info.get("maxmemory", 0)), int(info["used_memory"])
    shown = f"maxmemory-policy {policy}, {used >> 20} MiB used" + (f" of {limit >> 20}." if limit else ".")
    if policy != SAFE:
        return Check("memory", "problem", shown, f"Set `maxmemory-policy {SAFE}`: no part starts on any other.")
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
    """One bound and how far it is used, in words: "open calls 5 of 200000"."""
    unit, size = (" MiB", 20) if name.endswith("bytes") else ("", 0)
    bound = f"of {usage['bound'] >> size}{unit}" if usage["bound"] else "(no bound)"
    return f"{name.replace('_', ' ')} {usage['used'] >> size} {bound}"


def _clock(server: Any, _: Monitor) -> Check:
    sent = time.time()
    seconds, micros = server.time()
    # Its clock was read somewhere between sending and receiving; half way is the best guess.
    skew = abs((sent + time.time()) / 2 - seconds - micros / 1e6) * 1000
    if skew > _SKEW_MS:
        advice = "Run NTP on both. Only deadlines that producers compute from their own clock are affected."
        return Check("clock", "warning", f"this machine and Redis are {skew / 1000:.1f} s apart.", advice)
    return Check("clock", "ok", f"{skew:.0f} ms from Redis's.")


def _scripts(server: Any, _: Monitor) -> Check:
    try:
        execute.load_all(server)
    except redis.ResponseError as e:
        return Check("scripts", "problem", f"Redis refuses them ({type(e).__name__}).", "Allow EVAL, EVALSHA, SCRIPT.")
    return Check("scripts", "ok", "all load.")


def _routers(server: Any, monitor: Monitor) -> Check:
    advice = "Start a router: `rsm up` or `rsm router`."
    try:
        groups = {text(g["name"]) for g in server.xinfo_groups(monitor.keys.calls)}
    except redis.ResponseError:
        return Check("routers", "problem", "no router has ever served this namespace.", advice)
    if ROUTER_GROUP not in groups:
        return Check("routers", "problem", "the consumer group is missing.", advice)
    alive = server.zcount(monitor.keys.routers, monitor.now_ms() - 2 * monitor.settings.lease_ms, "+inf")
    if not alive:
        return Check(
            "routers", "problem", f"none is alive ({server.zcard(monitor.keys.routers)} seen of late).", advice
        )
    return Check("routers", "ok", f"{alive} alive.")


def _backlog(server: Any, monitor: Monitor) -> Check:
    oldest = server.xrange(monitor.keys.calls, count=1)
    if not oldest:
        return Check("backlog", "ok", "every call is placed.")
    age = monitor.now_ms() - int(text(oldest[0][0]).partition("-")[0])
    shown = f"{monitor.backlog()} calls not yet placed, the oldest for {age / 1000:.1f} s."
    if age > _STUCK_BACKLOG_MS:
        return Check("backlog", "problem", shown, "Start a router, or look at the routers' logs.")
    if age > _SLOW_BACKLOG_MS:
        return Check("backlog", "warning", shown, "Start another router: `rsm router`.")
    return Check("backlog", "ok", shown)


def _engines(_: Any, monitor: Monitor) -> Check:
    now, lease = monitor.now_ms(), monitor.settings.lease_ms
    engines = [e for e in monitor.engines() if e["state"] != EngineState.STOPPED or e["error"]]
    ready = [e for e in engines if e["state"] == EngineState.READY and now - e["heartbeat_ms"] <= lease]
    ids = {e["engine_id"] for e in ready}
    others = ", ".join(f"{e['engine_id']} {_ails(e, now, lease)}" for e in engines if e["engine_id"] not in ids)
    if not ready:
        advice = "Start one: `rsm up` or `rsm worker`; look at its log."
        return Check("engines", "problem", f"none is ready{': ' + others if others else ''}.", advice)
    slots = sum(e["max_num_seqs"] for e in ready)
    shown = f"{len(ready)} ready with {slots} slots{'; ' + others if others else ''}."
    if others:
        return Check("engines", "warning", shown, "Look at the logs of those that are not ready.")
    return Check("engines", "ok", shown)


def _ails(engine: Mapping[str, Any], now: int, lease: int) -> str:
    if engine["state"] == EngineState.READY:
        return f"silent for {(now - engine['heartbeat_ms']) / 1000:.1f} s (lease: {lease / 1000:g} s)"
    return f"{engine['state']}{': ' + engine['error'] if engine['error'] else ''}"


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
