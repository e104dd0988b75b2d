"""The rules of program scheduling, programs.lua, as the simulator runs them: without Redis."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from rsm.simulation.lua_rules import rules

LUA: Any = rules()
BOUNDS = (10, 40, 160)


def level_of(service: float, bounds: tuple[int, ...] = BOUNDS) -> int:
    return int(LUA.level_of(service, LUA.list(bounds)))


@pytest.mark.parametrize(
    ("service", "level"), [(0, 0), (9, 0), (10, 1), (39, 1), (40, 2), (159, 2), (160, 3), (1e12, 3)]
)
def test_a_level_is_a_bin_of_service(service: float, level: int) -> None:
    assert level_of(service) == level


def test_without_bounds_there_is_one_level() -> None:
    assert level_of(1e9, ()) == 0


def test_calls_one_after_another_add_up() -> None:
    service = 0
    for own in (4, 3, 1):
        service = LUA.charged(service, service, own)
    assert service == 8


def test_of_parallel_calls_the_longest_counts_in_any_order() -> None:
    for owns in itertools.permutations((4, 7, 1)):
        service = 10
        for own in owns:
            service = LUA.charged(service, 10, own)
        assert service == 17


def test_a_call_starves_when_the_whole_program_has_waited_beta_times_as_long_as_it_ran() -> None:
    assert LUA.starves_at(5000, 0, 2000, 8) == 5000 + 16_000
    assert LUA.starves_at(5000, 6000, 2000, 8) == 5000 + 10_000, "the earlier wait counts"
    assert LUA.starves_at(5000, 60_000, 2000, 8) == 5000, "at once"
    assert LUA.starves_at(5000, 0, 0, 8) == 5000 + 8000, "a program that has not run counts as having run for a second"
    assert LUA.starves_at(5000, 60_000, 2000, 0) == float("inf"), "beta 0: never"


def test_where_a_call_stands() -> None:
    bounds, never = LUA.list(BOUNDS), float("inf")
    now = 100_000
    assert LUA.place(9, 1e9, 0, 0, now, bounds, 8) == (0, never, False), "no call starves in the first level"
    assert LUA.place(50, 0, 5_000, now, now, bounds, 8) == (2, now + 40_000, False)
    assert LUA.place(50, 40_000, 5_000, now, now, bounds, 8) == (0, never, True)
    assert LUA.place(50, 0, 5_000, now - 40_000, now, bounds, 8) == (0, never, True), "it waited in the router"
    assert LUA.place(50, 1e9, 0, 0, now, bounds, 0) == (2, never, False)


def test_what_a_promotion_has_paid_for_no_longer_counts() -> None:
    assert [LUA.unpaid(10, 0), LUA.unpaid(10, 4), LUA.unpaid(10, 12)] == [10, 6, 0]


def test_class_goes_ahead_of_level_and_level_of_arrival() -> None:
    arrivals = (1, 1_790_000_000_000, 2**41 - 1)
    order = list(itertools.product((-128, -1, 0, 127), (0, 1, 15), arrivals))
    scores = [LUA.queue_score(*place) for place in order]
    assert scores == sorted(set(scores))
    assert all(int(s) == s < 2**53 for s in scores), "exact in a double"
    assert LUA.queue_score(999, 0, 1) == LUA.queue_score(127, 0, 1)
