"""The state of a namespace, for people and dashboards: fleet, calls, programs, totals. Reads only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import redis

from rsm.broker.connection.factory import connect_view
from rsm.broker.errors import BadRecord, UnknownCall
from rsm.broker.protocol.codec import number, real, text
from rsm.broker.protocol.ids import check_id
from rsm.broker.protocol.keys import Keys, literal
from rsm.broker.protocol.models import CallRecord
from rsm.broker.protocol.rules import spoken_for
from rsm.broker.protocol.snapshot import Speed
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings
from rsm.broker.views.sessions import Programs

_SCAN = 1000


@dataclass(frozen=True, slots=True)
class ActiveCall:
    """A waiting or running call. `where`: "queue", "running", "parked" or "throttled"."""

    request_id: str
    where: str
    engine_id: str
    record: CallRecord


class Monitor:
    """Reads the state of one namespace.

    Args:
        server: a client with the broker's options. Default: a new one for `settings`.
    """

    def __init__(self, settings: Settings | None = None, server: redis.Redis | None = None) -> None:
        self.settings = settings or Settings()
        self.keys = Keys(self.settings.namespace)
        self._redis: Any = server or connect_view(self.settings)
        self._transitions = Transitions(self.keys, self.settings)
        self._programs = Programs(self._redis, self.keys, self.settings)

    def now_ms(self) -> int:
        """The time on Redis's clock."""
        seconds, micros = self._redis.time()
        return int(seconds * 1000 + micros // 1000)

    def engine_ids(self) -> list[str]:
        """All engines that are alive, or were within the session TTL."""
        return sorted(text(e) for e in self._redis.zrange(self.keys.engines, 0, -1))

    def engine(self, engine_id: str) -> dict[str, Any]:
        """One engine: state, model, node, slots, `running` and `queued` calls, tokens, KV usage (0 to 1).

        `prefill_tps`, `decode_tps`: measured prompt tokens per second, and output tokens per second with all slots
        used; 0 = not measured yet. `completion_tokens`: the mean length of recent answers.
        `spoken_for`: with admission, tokens of its KV cache that programs use or will soon use again.
        `error`: why its process last ended, until it is READY again.
        `alone`: a call suspected of killing engines, which runs alone, or for which the engine is emptied.

        Raises:
            UnknownCall: no such engine.
        """
        pipe = self._redis.pipeline(transaction=False)
        pipe.hgetall(self.keys.engine(check_id(engine_id, "engine")))
        pipe.zcard(self.keys.queue(engine_id))
        pipe.zcard(self.keys.running(engine_id))
        pipe.zscore(self.keys.engines, engine_id)
        pipe.hgetall(self.keys.residents(engine_id)).time()
        found, queued, running, beat, residents, now = pipe.execute()
        if not found:
            raise UnknownCall(
                f"There is no engine {engine_id}. Known engines: {', '.join(self.engine_ids()) or 'none'}."
            )
        h = {text(k): text(v) for k, v in found.items()}
        speed = Speed.of(h.get("speed", ""))
        return {
            "engine_id": engine_id,
            "state": h.get("state", ""),
            "error": h.get("error", ""),
            "model": h.get("model", ""),
            "node": h.get("node", ""),
            "pid": number(h.get("pid")),
            "supervisor": number(h.get("supervisor")),
            "incarnation": h.get("incarnation", ""),
            "max_num_seqs": number(h.get("max_num_seqs")),
            "alone": h.get("alone", ""),
            "running": running,
            "queued": queued,
            "queued_tokens": number(h.get("queued_tokens")),
            "running_tokens": number(h.get("running_tokens")),
            "served": number(h.get("served")),
            "kv_tokens": number(h.get("kv_tokens")),
            "kv_usage": real(h.get("kv_usage")),
            "spoken_for": spoken_for(residents, now[0] * 1000 + now[1] // 1000),
            "tokens_per_s": real(h.get("tokens_per_s")),
            "prefill_tps": speed.prefill_tps if speed else 0.0,
            "decode_tps": speed.decode_tps(number(h.get("max_num_seqs"))) if speed else 0.0,
            "completion_tokens": real(h.get("completion_tokens")),
            "version": h.get("version", ""),
            "service_unit": h.get("service_unit", ""),
            "heartbeat_ms": number(text(str(beat))) if beat else 0,
        }

    def service_unit(self) -> str:
        """The service unit that the engines report, else the one of these settings. More than one is a mistake."""
        units = {e["service_unit"] for e in self.engines()} - {""}
        return ", ".join(sorted(units)) or self.settings.service_unit

    def engines(self) -> list[dict[str, Any]]:
        return [self.engine(e) for e in self.engine_ids()]

    def call(self, call_id: str) -> CallRecord:
        """One call. Raises UnknownCall if there is no record."""
        found = self._redis.hgetall(self.keys.call(check_id(call_id, "id")))
        if b"state" not in found:
            raise UnknownCall(f"There is no call {call_id}.")
        return CallRecord.from_hash(call_id, found)

    def active_calls(self, limit: int = 1000) -> list[ActiveCall]:
        """Running calls, then waiting ones, by engine and in the order of the queues; at most `limit`."""
        found: list[ActiveCall] = []
        for where, engine, key in self._places():
            for raw in self._redis.zrange(key, 0, limit - len(found) - 1) if len(found) < limit else ():
                call_id = text(raw)
                record = self._readable(call_id)
                if record is not None:
                    found.append(ActiveCall(call_id, where, engine, record))
        return found

    def _readable(self, call_id: str) -> CallRecord | None:
        """A record; None if it is gone or cannot be read, so that it does not hide the others."""
        try:
            return CallRecord.from_hash(call_id, self._redis.hgetall(self.keys.call(call_id)))
        except BadRecord:
            return None

    def running_calls(self) -> list[CallRecord]:
        """Running calls, the longest first, including calls that programs run themselves, without an engine."""
        found = []
        for key in self._redis.scan_iter(match=literal(self.keys.session("")) + "*:calls", count=_SCAN, _type="set"):
            ids = [text(raw) for raw in self._redis.smembers(key)]
            pipe = self._redis.pipeline(transaction=False)
            for call_id in ids:
                pipe.hget(self.keys.call(call_id), "state")
            running = [c for c, state in zip(ids, pipe.execute(), strict=True) if state == b"RUNNING"]
            found += [record for c in running if (record := self._readable(c))]
        return sorted(found, key=lambda record: record.started_ms or 0)

    def _places(self) -> Iterator[tuple[str, str, str]]:
        engines = self.engine_ids()
        yield from (("running", e, self.keys.running(e)) for e in engines)
        yield from (("queue", e, self.keys.queue(e)) for e in engines)
        for key in self._parked_keys():
            yield "parked", "", text(key)
        yield from (("throttled", "", key) for key in self._throttled_keys())

    def sessions(self) -> list[dict[str, Any]]:
        """The process table: every session whose entry has not expired, by program, most service first."""
        prefix = self.keys.session("")
        keys = self._redis.scan_iter(match=literal(prefix) + "*", count=_SCAN, _type="hash")
        rows = self._programs.view({text(key).removeprefix(prefix) for key in keys}, self.now_ms())
        return sorted(rows, key=lambda r: (-r["service"], r["program"], r["parent"] != "", r["session_id"]))

    def session(self, session_id: str) -> dict[str, Any]:
        """One session, with the figures of its program.

        From its program: `service` (in the deployment's unit), `level`, `waited_ms` and `ran_ms` (along the longest
        path of calls), `wait_ratio` (compared with RSM_STARVATION_BETA). Its own: `parent`, calls by state, `threads`
        (unfinished calls), the `engines` on which they run, the bytes of their bodies, the engine that it is bound to
        (`engine_id`), resident tokens by engine.

        Raises:
            UnknownCall: no such session.
        """
        rows = self._programs.view([check_id(session_id, "session")], self.now_ms())
        if not rows:
            raise UnknownCall(f"There is no session {session_id}; entries expire when idle.")
        return rows[0]

    def session_calls(self, session_id: str) -> list[str]:
        """Ids of a session's unfinished calls, then of its latest finished ones."""
        active = [text(c) for c in self._redis.smembers(self.keys.session_calls(check_id(session_id, "session")))]
        recent = [text(c) for c in self._redis.lrange(self.keys.session_recent(session_id), 0, -1)]
        return [*sorted(active), *recent]

    def backlog(self) -> int:
        """The number of calls that no router has placed yet."""
        return int(self._redis.xlen(self.keys.calls))

    def throttled(self) -> int:
        """The number of throttled calls."""
        return sum(int(self._redis.zcard(key)) for key in self._throttled_keys())

    def usage(self) -> dict[str, dict[str, int]]:
        """Usage and limits: {name: {"used", "bound"}}; bound 0 = no limit.

        `open_calls` and `open_bytes` (bodies) count unfinished calls, `retained_bytes` finished ones (records, results,
        logs). `dead_bytes` counts dead letters since the oldest one, including those replayed meanwhile.
        """
        s = self.settings
        h = {text(k): text(v) for k, v in self._redis.hgetall(self.keys.usage).items()}
        oldest = self._redis.xrange(self.keys.dead, count=1)
        dead = number(h.get("buried_bytes")) - number(oldest[0][1].get(b"before")) if oldest else 0
        return {
            "open_calls": {"used": number(h.get("open_calls")), "bound": s.max_open_calls},
            "open_bytes": {"used": number(h.get("open_bytes")), "bound": s.max_open_bytes},
            "retained_bytes": {"used": number(h.get("retained_bytes")), "bound": s.max_retained_bytes},
            "dead_bytes": {"used": dead, "bound": s.max_dead_bytes},
        }

    def stats(self) -> dict[str, Any]:
        """Totals since the namespace was created, the waiting and running calls, and `usage`. Mean times in seconds."""
        h = {text(k): number(v) for k, v in self._redis.hgetall(self.keys.stats).items()}
        engines = self.engines()
        throttled = self.throttled()
        waiting = sum(e["queued"] for e in engines) + self._parked() + throttled + self.backlog()
        ended = h.get("completed", 0) + h.get("cancelled", 0) + h.get("failed", 0)
        ran = h.get("started", 0)
        asked = h.get("affinity_hits", 0) + h.get("affinity_misses", 0)
        return {
            "submitted": h.get("submitted", 0),
            "pending": waiting,
            "throttled": throttled,
            "running": sum(e["running"] for e in engines),
            "completed": h.get("completed", 0),
            "cancelled": h.get("cancelled", 0),
            "failed": h.get("failed", 0),
            "unaccounted": h.get("submitted", 0) - ended - waiting - sum(e["running"] for e in engines),
            "requeued": h.get("requeued", 0),
            "dead_letters": h.get("dead_letters", 0),
            "promoted": h.get("promoted", 0),
            "stolen": h.get("stolen", 0),
            "ever_throttled": h.get("held", 0),
            "retired": h.get("retired", 0),
            "usage": self.usage(),
            "prompt_tokens": h.get("prompt_tokens", 0),
            "cached_tokens": h.get("cached_tokens", 0),
            "completion_tokens": h.get("completion_tokens", 0),
            "hit_rate": h.get("affinity_hits", 0) / asked if asked else 0.0,
            "mean_waiting_s": h.get("waiting_ms", 0) / ran / 1000 if ran else 0.0,
            "mean_running_s": h.get("running_ms", 0) / ran / 1000 if ran else 0.0,
        }

    def _throttled_keys(self) -> Iterator[str]:
        return (self.keys.held(text(model)) for model in sorted(self._redis.smembers(self.keys.holding)))

    def _parked(self) -> int:
        return sum(int(self._redis.zcard(key)) for key in self._parked_keys())

    def _parked_keys(self) -> Iterator[bytes]:
        found: Iterator[bytes] = self._redis.scan_iter(match=literal(self.keys.parked("")) + "*", count=_SCAN)
        return found
