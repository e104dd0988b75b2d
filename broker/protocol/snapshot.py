"""Reads the reply of snapshot.lua: the fleet and the sessions, as a router sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

from rsm.broker.protocol.codec import number, pairs, real, text
from rsm.broker.protocol.rules import LAST_TIER


@dataclass(frozen=True, slots=True)
class Speed:
    """How long a step of an engine takes, in seconds. The engine's worker measures it.

    Attributes:
        step_s: the time of every step.
        token_s: extra time for each prompt token that the step computes.
        seq_s: extra time for each call that gets a token in the step.
    """

    step_s: float
    token_s: float
    seq_s: float

    def __str__(self) -> str:
        """The format of the field in an engine's hash; `of` reads it."""
        return f"{self.step_s:.6g} {self.token_s:.6g} {self.seq_s:.6g}"

    @classmethod
    def of(cls, value: str) -> Speed | None:
        """Reads that format. None if the value is empty or invalid, because another process writes it."""
        try:
            step_s, token_s, seq_s = map(float, value.split())
        except ValueError:
            return None
        valid = all(0 <= x < inf for x in (step_s, token_s, seq_s))
        return cls(step_s, token_s, seq_s) if valid else None

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens computed per second; 0 = prompts cost nothing."""
        return 1 / self.token_s if self.token_s > 0 else 0.0

    def decode_tps(self, batch: float) -> float:
        """Output tokens per second of all calls together, while `batch` calls decode."""
        step = self.step_s + batch * self.seq_s
        return batch / step if step > 0 else 0.0


class Ahead(NamedTuple):
    """The waiting calls of one rank in an engine's queue, and the prompt tokens that they are expected to compute."""

    calls: int
    tokens: int


@dataclass(frozen=True, slots=True)
class EngineView:
    """An engine as the router sees it. Token counts are of prompts. `heartbeat_ms` is on Redis's clock.

    Attributes:
        kv_tokens: capacity of its KV cache; 0 = unknown. `kv_usage` is the fraction of it that running calls use.
        speed: its measured speed; None = not measured yet.
        prefill_s: remaining time to compute the prompts of the calls that it has started, in seconds.
        ahead: the waiting calls in its queue, by rank (`rank_of`).
        computed: tokens whose KV it has computed so far, prompts and outputs. Its growth shows how much of the cache
            has been replaced.
        cache_age_s: the age of the oldest tokens that its cache can contain; inf = the cache is not full.
        completion_tokens: the mean length of recent answers; 0 = unknown.
        spoken_for: tokens of its KV cache that sessions use, or will soon use again, by tier (residents.lua).
        reuse_found: the fraction of the tokens expected in its cache that were there.
    """

    id: str
    state: str
    model: str
    heartbeat_ms: int = 0
    queued: int = 0
    running: int = 0
    queued_tokens: int = 0
    running_tokens: int = 0
    served: int = 0
    max_num_seqs: int = 1
    tokens_per_s: float = 0.0
    kv_tokens: int = 0
    kv_usage: float = 0.0
    speed: Speed | None = None
    prefill_s: float = 0.0
    ahead: Mapping[int, Ahead] = field(default_factory=dict)
    computed: int = 0
    completion_tokens: float = 0.0
    spoken_for: Sequence[float] = ()
    cache_age_s: float = inf
    reuse_found: float = 1.0

    @property
    def load_tokens(self) -> int:
        return self.queued_tokens + self.running_tokens

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens computed per second; 0 = not measured."""
        return self.speed.prefill_tps if self.speed else 0.0

    @property
    def decode_tps(self) -> float:
        """Output tokens per second while all slots are used; 0 = not measured."""
        return self.speed.decode_tps(self.max_num_seqs) if self.speed else 0.0


class CacheUse(NamedTuple):
    """The last use of a session's cache on an engine, `idle_s` seconds ago. `computed`: the engine's count at that time
    (`EngineView.computed`); None = unknown."""

    idle_s: float
    computed: int | None = None


class Share(NamedTuple):
    """A session's share of an engine's KV cache, in tokens, decayed since its last call there ended.

    `cached`: the cache probably still holds its context. `active`: it has unfinished calls there. `tier`: the tier that
    it is counted in.
    """

    tokens: float = 0.0
    cached: bool = False
    active: bool = False
    tier: int = 0


NOT_THERE = Share()


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as the router sees it.

    Attributes:
        bound: the engine that it is bound to.
        resident: engine id → tokens of its KV cache that should be there.
        used: engine id → the last use of that cache.
        program: the root of its tree; "" = not read.
        service: the service of its program, in service units.
        level: the level that a call would get now.
        completed: how many of its calls have completed.
        completion_tokens: the mean length of their answers.
        shares: engine id → its share of that engine's KV cache, if it has one.
    """

    bound: str = ""
    resident: Mapping[str, int] = field(default_factory=dict)
    used: Mapping[str, CacheUse] = field(default_factory=dict)
    program: str = ""
    service: int = 0
    level: int = 0
    completed: int = 0
    completion_tokens: float = 0.0
    shares: Mapping[str, Share] = field(default_factory=dict)


def resident_tokens(affinity: Iterable[tuple[bytes, bytes]]) -> dict[str, int]:
    """Tokens by engine, from the fields of an affinity hash: engine id and `TOKENS:LAST_USE_MS`."""
    return {text(e): number(text(v).partition(":")[0]) for e, v in affinity}


def cache_uses(affinity: Iterable[tuple[bytes, bytes]], now_ms: int) -> dict[str, CacheUse]:
    """Last uses, from the same fields. If a worker wrote them, they are `TOKENS:LAST_USE_MS:COMPUTED`."""
    uses = {}
    for e, value in affinity:
        _, last_ms, computed = (*text(value).split(":"), "", "")[:3]
        uses[text(e)] = CacheUse(max(0, now_ms - number(last_ms)) / 1000, number(computed) if computed else None)
    return uses


class FleetSnapshot(NamedTuple):
    engines: list[EngineView]
    sessions: dict[str, SessionView]


class SnapshotReader:
    """Reads snapshots. If an engine has not changed since the last one, its view stays the same object, so values
    derived from it (cost_model.py) stay valid. Snapshots are 20 ms apart, so most engines of a large fleet have not
    changed."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[Sequence[bytes], EngineView]] = {}

    def read(self, reply: Sequence[Any], sessions: Sequence[str]) -> FleetSnapshot:
        rows, found, now_ms = reply
        views = [session_view(row, number(now_ms)) for row in found]
        return FleetSnapshot(self._engines(rows), dict(zip(sessions, views, strict=True)))

    def _engines(self, rows: Sequence[Sequence[bytes]]) -> list[EngineView]:
        if not rows:  # the snapshot may be of sessions only
            return []
        self._known = {row[0]: self._view(row) for row in rows}
        return [view for _, view in self._known.values()]

    def _view(self, row: Sequence[bytes]) -> tuple[Sequence[bytes], EngineView]:
        known = self._known.get(row[0])
        return known if known is not None and known[0] == row else (row, engine_view(row))


def engine_view(row: Sequence[bytes]) -> EngineView:
    """Reads a row of snapshot.lua. Fields that other processes write may be missing or invalid."""
    return EngineView(
        id=text(row[0]),
        heartbeat_ms=number(row[1]),
        queued=int(row[2]),
        running=int(row[3]),
        ahead=_ahead(row[4]),
        prefill_s=number(row[5]) / 1000,
        state=text(row[6]),
        model=text(row[7]),
        queued_tokens=number(row[8]),
        running_tokens=number(row[9]),
        served=number(row[10]),
        max_num_seqs=number(row[11], 1),
        tokens_per_s=real(row[12]),
        kv_tokens=number(row[13]),
        kv_usage=real(row[14]),
        speed=Speed.of(text(row[15])),
        computed=number(row[16]),
        completion_tokens=real(row[17]),
        cache_age_s=real(row[18], inf),
        reuse_found=real(row[19], 1.0),
        spoken_for=[real(n) for n in text(row[20]).split()],
    )


def _ahead(work: bytes) -> dict[int, Ahead]:
    """From `RANK CALLS RANK:tokens TOKENS …`, in any order."""
    if not work:
        return {}
    words = text(work).split()
    fields = dict(zip(words[::2], words[1::2], strict=False))
    return {
        int(rank): Ahead(number(calls), number(fields.get(f"{rank}:tokens")))
        for rank, calls in fields.items()
        if rank.isdecimal()
    }


def session_view(row: Sequence[Any], now_ms: int) -> SessionView:
    affinity, completed = pairs(row[1]), number(row[5])
    return SessionView(
        bound=text(row[0]),
        resident=resident_tokens(affinity),
        used=cache_uses(affinity, now_ms),
        program=text(row[2]),
        service=number(row[3]),
        level=int(row[4]),
        completed=completed,
        completion_tokens=number(row[6]) / max(completed, 1),
        shares={text(e): _share(value) for e, value in pairs(row[7])},
    )


def _share(value: bytes) -> Share:
    """From `TOKENS CACHED CALLS TIER`."""
    tokens, cached, calls, tier = (*map(number, text(value).split()), 0, 0, 0, 0)[:4]
    return Share(float(tokens), cached=cached > 0, active=calls > 0, tier=min(max(tier, 0), LAST_TIER))
