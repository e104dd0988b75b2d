"""Python copies of some rules of the scripts (programs.lua, residents.lua), for code that runs no Lua.

Tests compare each copy with its original: tests/protocol/test_rules.py; NEW_CACHE in test_transitions_routing.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from rsm.broker.protocol.codec import number, real, text

LAST_TIER = 15
# A program counts as having run for at least this long. Otherwise every new program would starve at once.
RUN_FLOOR_MS = 1000
# How many ancestors a session may have.
MOST_DEEP = 32
# A program's totals, as fields of its root's entry.
TOTALS = ("service", "waited_ms", "ran_ms", "paid_waited_ms", "paid_ran_ms")
# An engine's count of computed tokens jumps by this much when its process restarts with an empty cache (register.lua).
NEW_CACHE = 1 << 40


def rank_of(priority: int, level: int) -> int:
    """A call's place in its engine's queue, without its arrival: lower is earlier (programs.lua, queue_score)."""
    return (min(max(priority, -128), 127) + 128) * 16 + level


def level_of(service: float, bounds: Sequence[float]) -> int:
    """The level for an amount of service: 0 is the best, the number of bounds the last (programs.lua, level_of)."""
    return bisect_right(bounds, service)


def unpaid(total: int, paid: int) -> int:
    """A program's waiting, or running, that no promotion has paid for yet (programs.lua, unpaid)."""
    return max(0, total - paid)


def tier_of(priority: int, level: int) -> int:
    """The tier in which a call competes for KV cache: 0 is the best, 15 the last (residents.lua, tier_of)."""
    return min(level, LAST_TIER) if priority == 0 else 0 if priority < 0 else LAST_TIER


def spoken_for(residents: Mapping[bytes, bytes], now_ms: int) -> int:
    """Tokens of an engine's KV cache that sessions use, from the engine's account in Redis (residence.lua)."""
    active, thinking = (sum(real(n) for n in text(residents.get(name)).split()) for name in (b"active", b"thinking"))
    half_ms, idle_ms = max(1.0, real(residents.get(b"half"))), max(0, now_ms - number(residents.get(b"at")))
    return round(min(active + thinking * 2 ** (-idle_ms / half_ms), 1 << 53))
