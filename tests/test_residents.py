"""Whose contexts an engine's KV cache holds, lua/residents.lua: the arithmetic, as the simulator runs it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from simulation.rules import rules

LUA: Any = rules()
HALF = 8000.0


def sums(active: float = 0, thinking: float = 0, at: float = 0) -> Any:
    return LUA.list({"active": active, "thinking": thinking, "at": at})


def mine(calls: int = 0, tokens: float = 0, since: float = 0) -> Any:
    return LUA.list({"calls": calls, "tokens": tokens, "since": since})


def seen(s: Any, m: Any) -> tuple[float, ...]:
    return s.active, s.thinking, m.calls, m.tokens


def spoken_for(s: Any, now: float) -> float:
    return float(LUA.spoken_for(s, now, HALF))


def test_a_context_counts_in_full_while_calls_run_and_half_as_much_after_each_half_life() -> None:
    s, m = sums(), mine()
    LUA.arrives(s, m, 1000, 1000, 0, HALF)
    assert spoken_for(s, 50_000) == 1000
    LUA.leaves(s, m, 24, 60_000, HALF)
    assert [spoken_for(s, 60_000 + n * HALF) for n in range(3)] == [1024, 512, 256]
    assert LUA.share_of(m, 60_000 + HALF, HALF) == 512


def test_who_returns_takes_its_decayed_share_out_again() -> None:
    s, m, other = sums(), mine(), mine()
    for one in (m, other):
        LUA.arrives(s, one, 1000, 1000, 0, HALF)
        LUA.leaves(s, one, 0, 0, HALF)
    LUA.arrives(s, m, 1500, 1500, HALF, HALF)
    assert seen(s, m) == (1500, 500, 1, 1500), "of the thinking ones only the other is left"
    assert spoken_for(s, HALF) == 2000


def test_parallel_calls_of_a_session_count_what_is_new_in_them() -> None:
    s, m = sums(), mine()
    LUA.arrives(s, m, 1000, 300, 0, HALF)
    assert s.active == 1000, "of the first all is new"
    LUA.arrives(s, m, 1000, 300, 0, HALF)
    LUA.leaves(s, m, 50, 10, HALF)
    assert seen(s, m) == (1350, 0, 1, 1350), "one still runs, so nothing decays"
    LUA.leaves(s, m, 50, 20, HALF)
    assert seen(s, m) == (0, 1400, 0, 1400)


def test_a_call_that_never_ran_leaves_nothing_behind() -> None:
    s, m = sums(), mine()
    LUA.arrives(s, m, 1000, 1000, 0, HALF)
    LUA.leaves(s, m, None, 10, HALF)
    assert seen(s, m) == (0, 0, 0, 0)
    assert not LUA.is_home(m, 10, HALF)


def test_a_session_is_at_home_for_two_half_lives() -> None:
    m = mine(tokens=1000, since=5)
    assert LUA.is_home(m, 5 + 2 * HALF, HALF)
    assert not LUA.is_home(m, 6 + 2 * HALF, HALF)
    assert LUA.is_home(mine(calls=1, tokens=0, since=0), 10**9, HALF)
    assert not LUA.is_home(mine(), 0, HALF), "who was never there"


@pytest.mark.parametrize(
    ("spoken", "share", "context", "capacity", "calls", "fits"),
    [
        (600, 0, 400, 1000, 3, True), (601, 0, 400, 1000, 3, False), (900, 300, 400, 1000, 3, True),
        (0, 0, 1500, 1000, 1, False), (900, 0, 1500, 1000, 0, True), (900, 0, 400, 1000, 0, False),
        (9e9, 0, 1, 0, 9, True),
    ],
)  # fmt: skip
def test_what_fits(spoken: float, share: float, context: float, capacity: float, calls: int, fits: bool) -> None:
    """Contexts up to the capacity; a larger one where nothing runs; anything where no capacity is known."""
    assert LUA.fits(spoken, share, context, capacity, calls) is fits


def test_sums_are_those_of_all_sessions_whatever_happens() -> None:
    """Against a plain account of every session."""
    rng, now = random.Random(5), 1e12
    s, them = sums(at=now), {n: mine() for n in range(8)}
    for _ in range(3000):
        now += rng.choice((0, 1, 40, 700, 9000))
        m = them[rng.randrange(8)]
        if m.calls and rng.random() < 0.6:
            LUA.leaves(s, m, rng.choice((0, 7, -3, None)), now, HALF)
        else:
            context = rng.randrange(1, 5000)
            LUA.arrives(s, m, context, rng.randrange(context), now, HALF)
        expected = sum(LUA.share_of(x, now, HALF) for x in them.values())
        assert spoken_for(s, now) == pytest.approx(expected, abs=1e-6)
    for m in them.values():
        while m.calls:
            LUA.leaves(s, m, None, now, HALF)
    assert s.active == 0
    assert spoken_for(s, now + 100 * HALF) < 1e-9


def let_in(waiting: Sequence[dict[str, Any]], *rooms: tuple[str, float, float, int]) -> list[int]:
    calls = [LUA.list({"starves": False, **c, "shares": LUA.list(c.get("shares", {}))}) for c in waiting]
    names = ("id", "spoken", "capacity", "calls")
    views = [LUA.list(dict(zip(names, r, strict=True))) for r in rooms]
    return [n - 1 for n in LUA.let_in(LUA.list(calls), LUA.list(views)).values()]


def test_calls_are_let_in_in_order_each_where_most_room_is() -> None:
    waiting = [{"context": 500}, {"context": 601}, {"context": 200}]
    assert let_in(waiting, ("a", 400, 1000, 1), ("b", 300, 1000, 1)) == [0, 2], "the second found no room any more"


def test_what_is_left_of_a_session_counts_as_room_for_it() -> None:
    assert let_in([{"context": 500}], ("a", 900, 1000, 1)) == []
    assert let_in([{"context": 500, "shares": {"a": 400}}], ("a", 900, 1000, 1)) == [0]


def test_only_a_few_may_go_ahead_of_one_that_fits_nowhere() -> None:
    large, small = {"context": 900}, {"context": 1}
    room = ("a", 500, 1000, 1)
    assert let_in([large, small, small], room) == [1, 2]
    assert let_in([*[large] * LUA.BYPASS, small], room) == [LUA.BYPASS]
    assert let_in([*[large] * (LUA.BYPASS + 1), small], room) == []


def test_nobody_goes_ahead_of_one_that_starves() -> None:
    assert let_in([{"context": 900, "starves": True}, {"context": 1}], ("a", 500, 1000, 1)) == []
    assert let_in([{"context": 400, "starves": True}, {"context": 1}], ("a", 500, 1000, 1)) == [0, 1]
