"""The state of a test's namespace, in the form of the reference model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rsm.broker.protocol import codec
from rsm.broker.protocol.keys import Keys

AGE = 10**12  # ms; longer than any real wait in a test
ENDS = ("completed", "cancelled", "failed")
Names = tuple[str, ...]


@dataclass
class Seen:
    """The content of a namespace, as text."""

    records: dict[str, dict[str, str]]
    logs: dict[str, list[dict[str, str]]]
    engines: dict[str, dict[str, str]]
    queues: dict[str, list[str]]
    work: dict[str, dict[str, str]]
    starving: dict[str, list[str]]
    running: dict[str, list[str]]
    sessions: dict[str, dict[str, str]]
    open: dict[str, list[str]]
    stream: list[dict[str, str]]
    events: list[dict[str, str]]
    parked: list[str]
    listed: list[str]
    deadlines: list[str]
    solved: list[str]
    stats: dict[str, str]
    usage: dict[str, str]
    session_bytes: dict[str, str]
    dead: int

    def view(self) -> dict[str, Any]:
        """The state of Redis, in the form of `Model.view`."""
        records = {i: r for i, r in self.records.items() if "state" in r}
        engines = {e: r for e, r in self.engines.items() if r}
        assert codec.number(self.stats.get("dead_letters")) == self.dead
        return {
            "calls": {i: record(r) for i, r in records.items()},
            "stream": [(f["id"], f.get("gen", "")) for f in self.stream],
            "parked": set(self.parked),
            "queues": {e: self.queues[e] for e in engines},
            "work": {e: Counter({k: int(n) for k, n in self.work[e].items()}) for e in engines},
            "starving": {e: set(self.starving[e]) for e in engines},
            "running": {e: set(self.running[e]) for e in engines},
            "engines": {
                e: (r["incarnation"], r["state"], *numbers(r, "served", "queued_tokens", "running_tokens"))
                for e, r in engines.items()
            },
            "listed": set(self.listed),
            "sessions": {s: (counts(r, "arrivals", *ENDS), r.get("parent", ""), *numbers(r, "service"),
                             *ages(r, "waited_ms", "paid_waited_ms"), r.get("engine", ""))
                         for s, r in self.sessions.items()},
            "open": {s: set(ids) for s, ids in self.open.items()},
            "deadlines": set(self.deadlines),
            "logs": {i: [f.get("state") or f.get("text") or "restart" for f in self.logs[i]]
                     for i, r in records.items() if r.get("stream") == "1"},
            "reported": sorted((f["call"], f["gen"], f["state"]) for f in self.events if "state" in f),
            "usage": (
                *numbers(self.usage, "open_calls", "open_bytes"),
                Counter({s: int(n) for s, n in self.session_bytes.items()}),
            ),
            "solved": set(self.solved),
            "stats": counts(self.stats, "submitted", *ENDS, "requeued", "promoted", "stolen", "dead_letters"),
        }  # fmt: skip


def look(db: Any, k: Keys, calls: Names, engines: Names, sessions: Names) -> Seen:
    """Reads everything in one round trip."""
    pipe = db.pipeline(transaction=False)
    plan: list[tuple[Callable[..., Any], Callable[[str], str], Names]] = [
        (pipe.hgetall, k.call, calls),
        (pipe.xrange, k.events, calls),
        (pipe.hgetall, k.engine, engines),
        (lambda key: pipe.zrange(key, 0, -1), k.queue, engines),
        (pipe.hgetall, k.work, engines),
        (lambda key: pipe.zrange(key, 0, -1), k.starving, engines),
        (lambda key: pipe.zrange(key, 0, -1), k.running, engines),
        (pipe.hgetall, k.session, sessions),
        (pipe.smembers, k.session_calls, sessions),
    ]
    for command, key, names in plan:
        for name in names:
            command(key(name))
    pipe.xrange(k.calls).xrange(k.inbox("box"))
    for zset in (k.parked(""), k.engines, k.deadlines, k.solved):
        pipe.zrange(zset, 0, -1)
    for totals in (k.stats, k.usage, k.session_bytes):
        pipe.hgetall(totals)
    pipe.xlen(k.dead)
    replies = (plain(r) for r in pipe.execute())
    named: list[Any] = [{name: next(replies) for name in names} for _, _, names in plan]
    return Seen(*named, *replies)


def plain(reply: Any) -> Any:
    """Turns bytes into text, and stream entries into their fields."""
    if isinstance(reply, dict):
        return texts(reply)
    if isinstance(reply, int):
        return reply
    return [texts(r[1]) if isinstance(r, tuple) else codec.text(r) for r in reply]


def texts(fields: Any) -> dict[str, str]:
    return {codec.text(k): codec.text(v) for k, v in fields.items()}


def record(r: dict[str, str]) -> tuple[Any, ...]:
    """A record in the form of `Call.seen`."""
    flag = r.get("cancel", "") if r["state"] == "RUNNING" else ""
    attempt, failures, level = numbers(r, "attempt", "failures", "level")
    lost = (failures, tuple(r.get("deaths", "").split()))
    end = (flag, r.get("error_code", ""), r["session"])
    placed = (level, "promoted_ms" in r, *ages(r, "waited_ms"), len(r.get("stolen_from", "").split()))
    return r["gen"], attempt, r["state"], *lost, r.get("engine", ""), *placed, *end


def numbers(fields: dict[str, str], *names: str) -> list[int]:
    return [codec.number(fields.get(n)) for n in names]


def ages(fields: dict[str, str], *names: str) -> list[int]:
    """Waiting times, in ages."""
    return [n // AGE for n in numbers(fields, *names)]


def counts(fields: dict[str, str], *names: str) -> Counter[str]:
    return Counter({n: codec.number(fields[n]) for n in names if n in fields})
