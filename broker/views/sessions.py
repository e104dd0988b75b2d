"""The process table for people and dashboards (Autellix, section 4.2.1): programs and their sessions.

Reads only. The entry of a program's root has its service, wait and run time. They are shown with each of its sessions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rsm.broker.protocol.codec import number, text
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.rules import MOST_DEEP, RUN_FLOOR_MS, TOTALS, level_of, unpaid
from rsm.broker.protocol.snapshot import resident_tokens
from rsm.broker.settings import Settings

# How many unfinished calls of a session are read; if there are more, an arbitrary selection.
MOST_THREADS = 256
_MANY = 500

Row = dict[str, Any]


class Programs:
    """Reads the sessions of one namespace. `server`: a client with the broker's options."""

    def __init__(self, server: Any, keys: Keys, settings: Settings) -> None:
        self._redis = server
        self._keys = keys
        self._bounds = settings.level_bounds

    def view(self, sessions: Iterable[str], now_ms: int) -> list[Row]:
        """One row for each of these sessions that has an entry, in the given order."""
        rows: list[Row] = []
        entries: dict[str, dict[str, str]] = {}
        for batch in _batches(list(sessions)):
            found = self._read(batch)
            entries |= {s: f[0] for s, f in found.items()}
            self._read_ancestors(entries)
            threads = self._threads({s: f[4] for s, f in found.items()}, now_ms)
            rows += [self._row(s, found[s], entries, threads[s]) for s in batch if s in found]
        return rows

    def _read(self, sessions: Sequence[str]) -> dict[str, Any]:
        """For each session with an entry: its fields, number of open calls, affinity, open bytes, ids of open calls."""
        k, pipe = self._keys, self._redis.pipeline(transaction=False)
        for s in sessions:
            pipe.hgetall(k.session(s)).scard(k.session_calls(s)).hgetall(k.affinity(s))
            pipe.hget(k.session_bytes, s).srandmember(k.session_calls(s), MOST_THREADS)
        replies = pipe.execute()
        found = {s: replies[i : i + 5] for s, i in zip(sessions, range(0, len(replies), 5), strict=True)}
        return {s: [_texts(f[0]), *f[1:]] for s, f in found.items() if f[0]}

    def _read_ancestors(self, entries: dict[str, dict[str, str]]) -> None:
        """Adds the entries of all ancestors."""
        for _ in range(MOST_DEEP):
            missing = {h.get("parent", "") for h in entries.values()} - entries.keys() - {""}
            if not missing:
                return
            pipe = self._redis.pipeline(transaction=False)
            for s in missing:
                pipe.hgetall(self._keys.session(s))
            entries |= {s: _texts(h) for s, h in zip(missing, pipe.execute(), strict=True)}

    def _threads(self, calls: Mapping[str, Sequence[bytes]], now_ms: int) -> dict[str, list[Row]]:
        """The open calls of each session, oldest first."""
        plan = [(s, text(c)) for s, ids in calls.items() for c in ids]
        pipe = self._redis.pipeline(transaction=False)
        for _, call in plan:
            pipe.hmget(self._keys.call(call), "state", "engine", "submitted_ms", "started_ms", "inherited", "level")
        threads: dict[str, list[Row]] = {s: [] for s in calls}
        for (s, call), fields in zip(plan, pipe.execute() if plan else [], strict=True):
            if fields[0] in (b"PENDING", b"RUNNING"):
                threads[s].append(_thread(call, fields, now_ms))
        return {s: sorted(rows, key=lambda r: (r["arrival_ms"], r["request_id"])) for s, rows in threads.items()}

    def _row(self, session: str, found: Sequence[Any], entries: Mapping[str, Mapping[str, str]], threads: Any) -> Row:
        h, active, affinity, open_bytes, _ = found
        program = root_of(session, entries)
        total = {n: number(entries[program].get(n)) for n in TOTALS}
        waited, ran = (unpaid(total[n], total[f"paid_{n}"]) for n in ("waited_ms", "ran_ms"))
        return {
            "session_id": session,
            "program": program,
            "parent": h.get("parent", ""),
            "service": total["service"],
            "level": level_of(total["service"], self._bounds),
            "waited_ms": total["waited_ms"],
            "ran_ms": total["ran_ms"],
            "wait_ratio": round(waited / max(ran, RUN_FLOOR_MS), 3),
            **{n: number(h.get(n)) for n in ("arrivals", "completed", "cancelled", "failed")},
            "active": active,
            "threads": threads,
            "engines": sorted({t["engine_id"] for t in threads if t["state"] == "RUNNING" and t["engine_id"]}),
            "open_bytes": number(open_bytes),
            "engine_id": h.get("engine", ""),
            "resident_tokens": resident_tokens(affinity.items()),
            "last_arrival_ms": number(h.get("last_arrival_ms")),
            "last_completion_ms": number(h.get("last_completion_ms")),
        }


def _thread(call: str, fields: Sequence[bytes | None], now_ms: int) -> Row:
    state, engine = text(fields[0]), text(fields[1])
    submitted, started, inherited, level = (number(f) for f in fields[2:])
    running = state == "RUNNING"
    return {
        "request_id": call,
        "state": state,
        "engine_id": engine,
        "arrival_ms": submitted,
        "waited_ms": max(0, (started if running else now_ms) - submitted),
        "ran_ms": max(0, now_ms - started) if running else 0,
        "service": inherited,
        "level": level,
    }


def root_of(session: str, entries: Mapping[str, Mapping[str, str]]) -> str:
    """The root of a session's program, which is charged for it: its farthest ancestor (family.lua, program_of)."""
    for _ in range(MOST_DEEP):
        parent = entries[session].get("parent", "")
        if parent not in entries:
            return session
        session = parent
    return session


def _texts(h: Mapping[bytes, bytes]) -> dict[str, str]:
    return {text(k): text(v) for k, v in h.items()}


def _batches(items: Sequence[str]) -> Iterator[Sequence[str]]:
    return (items[i : i + _MANY] for i in range(0, len(items), _MANY))
