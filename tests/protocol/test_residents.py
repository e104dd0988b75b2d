"""The contexts in an engine's KV cache, residents.lua: the arithmetic, as the simulator runs it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from rsm.broker.protocol.rules import tier_of
from rsm.simulation.lua_rules import rules

LUA: Any = rules()
HALF = 8000.0


TIERS = int(LUA.LAST_TIER) + 1


def sums(at: float = 0) -> Any:
    return LUA.list({"at": at, "active": LUA.list([0.0] * TIERS), "thinking": LUA.list([0.0] * TIERS)})


def mine(calls: int = 0, tokens: float = 0, since: float = 0, tier: int = 0) -> Any:
    return LUA.list({"calls": calls, "tokens": tokens, "since": since, "tier": tier})


def seen(s: Any, m: Any) -> tuple[float, ...]:
    return sum(s.active.values()), sum(s.thinking.values()), m.calls, m.tokens


def spoken_for(s: Any, now: float, tier: int = TIERS - 1) -> float:
    return float(LUA.up_to(LUA.spoken_for(s, now, HALF), tier))


def test_a_context_counts_in_full_while_calls_run_and_half_as_much_after_each_half_life() -> None:
    s, m = sums(), mine()
    LUA.arrives(s, m, 1000, 1000, 0, 0, HALF)
    assert spoken_for(s, 50_000) == 1000
    LUA.leaves(s, m, 24, 60_000, HALF)
    assert [spoken_for(s, 60_000 + n * HALF) for n in range(3)] == [1024, 512, 256]
    assert LUA.share_of(m, 60_000 + HALF, HALF) == 512


def test_a_returning_session_takes_its_decayed_share_out_again() -> None:
    s, m, other = sums(), mine(), mine()
    for one in (m, other):
        LUA.arrives(s, one, 1000, 1000, 0, 0, HALF)
        LUA.leaves(s, one, 0, 0, HALF)
    LUA.arrives(s, m, 1500, 1500, 0, HALF, HALF)
    assert seen(s, m) == (1500, 500, 1, 1500), "only the other session is left among the thinking ones"
    assert spoken_for(s, HALF) == 2000


def test_parallel_calls_of_a_session_count_what_is_new_in_them() -> None:
    s, m = sums(), mine()
    LUA.arrives(s, m, 1000, 300, 0, 0, HALF)
    assert spoken_for(s, 0) == 1000, "the whole context of the first call is new"
    LUA.arrives(s, m, 1000, 300, 0, 0, HALF)
    LUA.leaves(s, m, 50, 10, HALF)
    assert seen(s, m) == (1350, 0, 1, 1350), "one call still runs, so nothing decays"
    LUA.leaves(s, m, 50, 20, HALF)
    assert seen(s, m) == (0, 1400, 0, 1400)


def test_a_call_that_never_ran_leaves_nothing_behind() -> None:
    s, m = sums(), mine()
    LUA.arrives(s, m, 1000, 1000, 0, 0, HALF)
    LUA.leaves(s, m, None, 10, HALF)
    assert seen(s, m) == (0, 0, 0, 0)
    assert not LUA.is_cached_here(m, 10, HALF)


def test_a_session_counts_as_cached_for_two_half_lives() -> None:
    m = mine(tokens=1000, since=5)
    assert LUA.is_cached_here(m, 5 + 2 * HALF, HALF)
    assert not LUA.is_cached_here(m, 6 + 2 * HALF, HALF)
    assert LUA.is_cached_here(mine(calls=1, tokens=0, since=0), 10**9, HALF)
    assert not LUA.is_cached_here(mine(), 0, HALF), "a session that was never there"


AWAY = {"tokens": 0, "cached": False, "tier": 0}


def fits(
    spoken: list[float], call_tier: int, context: float, calls: int = 1, capacity: float = 1000, **share: Any
) -> bool:
    taken = LUA.list([*spoken, *[0.0] * (TIERS - len(spoken))])
    return bool(LUA.fits(taken, call_tier, LUA.list(AWAY | share), context, capacity, calls))


def test_contexts_of_its_own_tier_and_better_ones_are_taken() -> None:
    assert [fits([600, 0, 300], tier, 400) for tier in range(4)] == [True, True, False, False]
    assert fits([600, 0, 300], 2, 100)
    assert fits([700, 0, 300], 2, 200, tokens=200, tier=2), "its own share is headroom"
    assert not fits([700, 300], 0, 301, tokens=200, tier=1), "but only if its tier was counted"


def test_a_cached_session_competes_with_better_tiers_only() -> None:
    assert fits([600, 5000], 1, 400, cached=True, tokens=400, tier=1)
    assert not fits([601, 5000], 1, 400, cached=True, tokens=400, tier=1)
    assert fits([5000], 0, 900, cached=True)


def test_a_context_larger_than_the_cache_fits_where_nothing_runs() -> None:
    assert not fits([0], 0, 1500, calls=1)
    assert fits([900], 0, 1500, calls=0)
    assert not fits([900], 0, 400, calls=0), "thinking sessions will come back"


def test_an_engine_of_unknown_size_has_headroom() -> None:
    assert fits([9e9], 3, 1e6, capacity=0)


def test_classes_are_tiers() -> None:
    assert [LUA.tier_of(p, 3) for p in (-128, -1, 0, 1, 127)] == [0, 0, 3, TIERS - 1, TIERS - 1]
    assert [tier_of(p, n) for p in (-1, 0, 1) for n in (0, 7, 15)] == [
        LUA.tier_of(p, n) for p in (-1, 0, 1) for n in (0, 7, 15)
    ]


def test_sums_are_those_of_all_sessions_whatever_happens() -> None:
    """Compared with a simple account of every session."""
    rng, now = random.Random(5), 1e12
    s, them = sums(at=now), {n: mine() for n in range(8)}
    for _ in range(3000):
        now += rng.choice((0, 1, 40, 700, 9000))
        m = them[rng.randrange(8)]
        if m.calls and rng.random() < 0.6:
            LUA.leaves(s, m, rng.choice((0, 7, -3, None)), now, HALF)
        else:
            context = rng.randrange(1, 5000)
            LUA.arrives(s, m, context, rng.randrange(context), 0, now, HALF)
        expected = sum(LUA.share_of(x, now, HALF) for x in them.values())
        assert spoken_for(s, now) == pytest.approx(expected, abs=1e-6)
    for m in them.values():
        while m.calls:
            LUA.leaves(s, m, None, now, HALF)
    assert seen(s, mine())[0] == 0
    assert spoken_for(s, now + 100 * HALF) < 1e-9


def admissible(waiting: Sequence[dict[str, Any]], *caches: tuple[str, float, float, int]) -> list[int]:
    """Positions, from 0, of the calls that are admitted. The caches' contexts are of tier 0."""

    def demand(c: dict[str, Any]) -> Any:
        shares = {e: LUA.list(AWAY | s) for e, s in c.get("shares", {}).items()}
        return LUA.list({"tier": 0, "starves": False, **c, "shares": LUA.list(shares)})

    def cache(name: str, spoken: float, capacity: float, calls: int) -> Any:
        taken = LUA.list([spoken, *[0.0] * (TIERS - 1)])
        return LUA.list({"id": name, "spoken": taken, "capacity": capacity, "calls": calls})

    return [
        int(n) - 1
        for n in LUA.admissible(LUA.list([demand(c) for c in waiting]), LUA.list([cache(*c) for c in caches])).values()
    ]


def test_calls_are_admitted_in_order_each_where_most_headroom_is() -> None:
    waiting = [{"context": 500}, {"context": 601}, {"context": 200}]
    assert admissible(waiting, ("a", 400, 1000, 1), ("b", 300, 1000, 1)) == [0, 2], (
        "there was no headroom left for the second"
    )


def test_what_is_left_of_a_session_counts_as_headroom_for_it() -> None:
    assert admissible([{"context": 500}], ("a", 900, 1000, 1)) == []
    assert admissible([{"context": 500, "shares": {"a": {"tokens": 400}}}], ("a", 900, 1000, 1)) == [0]


def test_a_call_goes_where_its_context_is_cached() -> None:
    crowded, empty = ("a", 0, 1000, 1), ("b", 0, 2000, 1)
    there = {"context": 500, "tier": 1, "shares": {"a": {"tokens": 500, "cached": True, "tier": 1}}}
    assert admissible([there, {"context": 1100}], ("b", 0, 1000, 1), crowded) == [0]
    assert admissible([there, {"context": 1100}], empty, crowded) == [0, 1]


def test_only_a_few_may_overtake_one_that_fits_nowhere() -> None:
    large, small = {"context": 900}, {"context": 1}
    cache = ("a", 500, 1000, 1)
    assert admissible([large, small, small], cache) == [1, 2]
    assert admissible([*[large] * LUA.BYPASS, small], cache) == [LUA.BYPASS]
    assert admissible([*[large] * (LUA.BYPASS + 1), small], cache) == []


def test_no_call_overtakes_one_that_starves() -> None:
    assert admissible([{"context": 900, "starves": True}, {"context": 1}], ("a", 500, 1000, 1)) == []
    assert admissible([{"context": 400, "starves": True}, {"context": 1}], ("a", 500, 1000, 1)) == [0, 1]
