"""Reads what Redis holds after a run, directly from the server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import redis

from chaos.leaks import leaked_keys
from rsm.broker.protocol.codec import number, text
from rsm.broker.protocol.keys import ROUTER_GROUP, Keys
from rsm.broker.protocol.models import CallRecord
from rsm.broker.settings import Settings
from rsm.broker.views.monitor import Monitor

_TOTALS = ("submitted", "completed", "cancelled", "failed", "requeued", "dead_letters", "ever_throttled", "stolen")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a call's log. `at_ms` is on Redis's clock; `end`: whether it is a terminal event."""

    at_ms: int
    n: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    end: bool = False


@dataclass(slots=True)
class Kept:
    """One call's record and log.

    Attributes:
        ends_in_inboxes: number of its terminal events in all inboxes.
        inbox: the inbox that received its last events. Clients trim what they have read, except from INBOX.
    """

    state: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    error_code: str = ""
    engine: str = ""
    attempts: int = 1
    finished_ms: int = 0
    log: list[Entry] = field(default_factory=list)
    ends_in_inboxes: int = 0
    inbox: str = ""


@dataclass(slots=True)
class Snapshot:
    """Everything that Redis holds. `busy` describes what still waits or runs; `leaked` names keys that never expire."""

    calls: dict[str, Kept] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    busy: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)


def snapshot(
    settings: Settings, server: redis.Redis, ids: Iterable[str], before: Mapping[str, Any] | None = None
) -> Snapshot:
    """Reads everything about these calls. `before`: Redis's totals when the ledgers started."""
    keys, monitor = Keys(settings.namespace), Monitor(settings, server)
    ends = _ends_in_inboxes(server, keys)
    calls = {}
    for call_id in ids:
        found: Any = server.hgetall(keys.call(call_id))
        if b"state" in found:
            record, log = CallRecord.from_hash(call_id, found), server.xrange(keys.events(call_id))
            calls[call_id] = _kept(record, log, ends[call_id], text(found.get(b"inbox")))
    now = monitor.stats()
    totals = {name: now[name] - (before or {}).get(name, 0) for name in _TOTALS}
    return Snapshot(calls, totals, busy(settings, server), leaked_keys(server, keys.prefix))


def busy(settings: Settings, server: redis.Redis) -> list[str]:
    """Describes what still waits or runs; empty once all calls have ended and all workers know it."""
    keys, monitor, db = Keys(settings.namespace), Monitor(settings, server), _any(server)
    found = {"entries on the router stream": db.xlen(keys.calls), "deadlines": db.zcard(keys.deadlines)}
    found["entries pending for routers"] = db.xpending(keys.calls, ROUTER_GROUP)["pending"]
    found |= {"parked calls": monitor._parked(), "throttled calls": monitor.throttled()}
    for e in monitor.engines():
        name = e["engine_id"]
        found |= {f"{what} on {name}": e[what] for what in ("running", "queued", "running_tokens", "queued_tokens")}
        found[f"calls that {name} reports as running"] = number(db.hget(keys.engine(name), "running"))
    return [f"{count} {what}" for what, count in found.items() if count]


def _kept(record: CallRecord, log: Any, ends_in_inboxes: int, inbox: str) -> Kept:
    result = record.result
    return Kept(
        record.state.value,
        result.text if result else "",
        result.token_ids if result else [],
        record.error_code,
        record.engine_id,
        record.attempt,
        record.finished_ms or 0,
        [_entry(eid, fields) for eid, fields in log],
        ends_in_inboxes,
        inbox,
    )


def _entry(eid: bytes, fields: Mapping[bytes, bytes]) -> Entry:
    ids = tuple(int(i) for i in text(fields.get(b"token_ids")).split())
    at_ms = int(eid.partition(b"-")[0])
    return Entry(at_ms, number(fields.get(b"n")), text(fields.get(b"text")), ids, b"state" in fields)


def _ends_in_inboxes(server: redis.Redis, keys: Keys) -> Counter[str]:
    ends: Counter[str] = Counter()
    for key in _any(server).scan_iter(match=f"{keys.inbox('')}*", count=1000):
        ends.update(text(f[b"call"]) for _, f in _any(server).xrange(key) if b"state" in f)
    return ends


def _any(server: redis.Redis) -> Any:
    """Returns the server as Any, since redis-py's replies have no useful types."""
    return server
