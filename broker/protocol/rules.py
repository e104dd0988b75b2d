"""Rules that the scripts state, too (programs.lua, residents.lua), for parts that have no Lua at hand.

`tests/protocol/test_rules.py` holds each of them to its original.
"""

from __future__ import annotations

from collections.abc import Mapping

from rsm.broker.protocol.codec import number, real, text

LAST_TIER = 15


def rank_of(priority: int, level: int) -> int:
    """Where a call stands in its engine's queue, arrival aside: lower is earlier (programs.lua, queue_score)."""
    return (min(max(priority, -128), 127) + 128) * 16 + level


def tier_of(priority: int, level: int) -> int:
    """For whom KV cache is taken or free: 0 is the best, 15 the last (residents.lua, tier_of)."""
    return min(level, LAST_TIER) if priority == 0 else 0 if priority < 0 else LAST_TIER


def spoken_for(residents: Mapping[bytes, bytes], now_ms: int) -> int:
    """Tokens of an engine's KV cache that sessions have, of its accounts as they stand in Redis (residence.lua)."""
    active, thinking = (sum(real(n) for n in text(residents.get(name)).split()) for name in (b"active", b"thinking"))
    half_ms, idle_ms = max(1.0, real(residents.get(b"half"))), max(0, now_ms - number(residents.get(b"at")))
    return round(min(active + thinking * 2 ** (-idle_ms / half_ms), 1 << 53))
