"""What look.lua answers: the fleet and the sessions, as a router sees them."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from rsm.broker.protocol.codec import number, pairs, real, text
from rsm.broker.protocol.messages import (
    LAST_TIER,
    Ahead,
    EngineView,
    Look,
    SessionView,
    Share,
    Speed,
    cache_uses,
    resident_tokens,
)


class Looks:
    """Reads looks. Of an engine of which nothing has changed since the last one it gives the very same view, so that
    what was made of that (cost_model.py) holds, too: in a large fleet most are, for a look is 20 ms after another."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[Sequence[bytes], EngineView]] = {}

    def read(self, reply: Sequence[Any], sessions: Sequence[str]) -> Look:
        rows, found, now_ms = reply
        views = [session_view(row, number(now_ms)) for row in found]
        return Look(self._engines(rows), dict(zip(sessions, views, strict=True)))

    def _engines(self, rows: Sequence[Sequence[bytes]]) -> list[EngineView]:
        if not rows:  # it may not have been asked for them
            return []
        self._known = {row[0]: self._view(row) for row in rows}
        return [view for _, view in self._known.values()]

    def _view(self, row: Sequence[bytes]) -> tuple[Sequence[bytes], EngineView]:
        known = self._known.get(row[0])
        return known if known is not None and known[0] == row else (row, engine_view(row))


def engine_view(row: Sequence[bytes]) -> EngineView:
    """As look.lua gives it; what another process has written may be missing or junk."""
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
    """Of `RANK CALLS RANK:tokens TOKENS …`, in any order."""
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
    """Of `TOKENS HOME CALLS TIER`."""
    tokens, home, calls, tier = (*map(number, text(value).split()), 0, 0, 0, 0)[:4]
    return Share(float(tokens), home=home > 0, active=calls > 0, tier=min(max(tier, 0), LAST_TIER))
