"""Rules that exist twice: the Python copies agree with the scripts' Lua, which runs here unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsm.broker import Settings
from rsm.broker.protocol import rules
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.snapshot import EngineView, SessionView, Share
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.views import sessions
from rsm.router.admission import Admission, context_of, with_context
from rsm.router.views import CallView
from rsm.simulation.lua_rules import rules as lua_rules
from rsm.simulation.process_table import Account
from rsm.workers.scheduling.plas import Plas, PlasRules
from tests.support.lua.runtime import ARGS, PREFIX, run_modules

LUA: Any = lua_rules()
TIERS = rules.LAST_TIER + 1
NOW = 1_790_000_000_000
HALF = 8000.0

relaxed = settings(deadline=None, database=None)
priorities = st.one_of(st.just(0), st.integers(-300, 300))
levels = st.integers(0, 15)
tiers = st.integers(0, rules.LAST_TIER)
tokens = st.integers(0, 1 << 20)
services = st.one_of(st.integers(0, 1 << 40), st.floats(0, 1e12))
bounds = st.sets(st.integers(1, 1 << 40), max_size=15).map(sorted)


def table(items: Any) -> Any:
    return LUA.list(items)


def test_constants() -> None:
    assert rules.LAST_TIER == LUA.LAST_TIER
    assert rules.RUN_FLOOR_MS == LUA.RUN_FLOOR_MS
    assert rules.MOST_DEEP == LUA.MOST_DEEP
    assert rules.TOTALS == tuple(LUA.totals.values()) == Account._fields
    assert PlasRules().floor_s * 1000 == LUA.RUN_FLOOR_MS


# -- the place in a queue


@relaxed
@given(priorities, levels, st.integers(0, 2**41 - 1))
def test_rank(priority: int, level: int, arrival: int) -> None:
    score = LUA.queue_score(priority, level, arrival)
    assert rules.rank_of(priority, level) == score // 2**41


counted = run_modules("lib", exports=("count_waiting", "increments", "work_key"))


@relaxed
@given(priorities, levels, tokens, tokens)
def test_what_waits_is_counted_under_its_rank(priority: int, level: int, prompt: int, reuse: int) -> None:
    key = counted.work_key("e")
    counted.increments[key] = None
    call = {"priority": str(priority), "prompt_tokens": str(prompt), "reuse": str(reuse)}
    counted.count_waiting("e", counted.list(call), str(level), 1)
    rank = rules.rank_of(priority, level)
    assert dict(counted.increments[key].items()) == {f"{rank}": 1, f"{rank}:tokens": max(0, prompt - reuse)}


# -- programs


@relaxed
@given(services, bounds)
def test_level(service: float, of: list[int]) -> None:
    level = LUA.level_of(service, table(of))
    assert rules.level_of(service, of) == PlasRules(bounds=tuple(of)).level_of(service) == level


@relaxed
@given(bounds.filter(bool), st.data())
def test_a_level_ends_below_its_bound(of: list[int], data: st.DataObject) -> None:
    bound = data.draw(st.sampled_from(of))
    for service in (bound - 1, bound):
        assert rules.level_of(service, of) == LUA.level_of(service, table(of))


@relaxed
@given(st.integers(0, 1 << 41), st.integers(0, 1 << 41))
def test_unpaid(total: int, paid: int) -> None:
    assert rules.unpaid(total, paid) == LUA.unpaid(total, paid)


@relaxed
@given(st.integers(0, 10**9), st.integers(0, 10**7), st.integers(0, 10**7), st.floats(0.01, 64), st.integers(1, 3))
def test_when_a_call_starves(since: int, waited: int, ran: int, beta: float, level: int) -> None:
    """In an engine's scheduler as in the queues, which count in milliseconds."""
    plas = Plas(PlasRules(bounds=(10, 20, 30), beta=beta))
    plas.add("p", arrival=since / 1000, inherited=100.0, level=level, waited_s=waited / 1000, ran_s=ran / 1000)
    assert plas.next_promotion() == pytest.approx(LUA.starves_at(since, waited, ran, beta) / 1000)


def test_without_beta_no_call_starves() -> None:
    plas = Plas(PlasRules(beta=0))
    plas.add("p", arrival=0.0, inherited=1e9)
    assert plas.next_promotion() == LUA.starves_at(0, 0, 0, 0) == inf


def ancestors(n: int) -> dict[str, dict[str, str]]:
    """Entries of sessions: s0 is the child of s1, that of s2, …; the last one has no parent."""
    return {f"s{i}": {"parent": f"s{i + 1}"} if i < n else {} for i in range(n + 1)}


@pytest.mark.parametrize("depth", [0, 1, 31, 32, 33, 40])
def test_the_program_of_a_session(depth: int) -> None:
    """The ancestor that is charged when a call ends is the one that the views show."""
    entries = ancestors(depth)

    def call(command: str, *of: Any) -> Any:
        if command != "HMGET":
            return None
        entry = entries[of[0].removeprefix(f"{PREFIX}session:")]
        return [entry.get(name, False) for name in of[1:]]

    lua = run_modules("lib", "programs", "family", exports=("program_of",), call=call)
    assert sessions.root_of("s0", entries) == lua.program_of("s0").id == f"s{min(depth, rules.MOST_DEEP)}"


# -- the contexts in a cache


@relaxed
@given(priorities, st.integers(0, 40))
def test_tier(priority: int, level: int) -> None:
    assert rules.tier_of(priority, level) == LUA.tier_of(priority, level)


contexts = st.lists(tokens.map(float), min_size=TIERS, max_size=TIERS)
# Few and small numbers, so that a demand often equals the headroom.
few = st.integers(0, 3)
shares = st.builds(Share, few.map(float), st.booleans(), st.just(False), few)


@settings(relaxed, max_examples=1000)
@given(
    st.lists(few.map(float), min_size=TIERS, max_size=TIERS), shares, st.sampled_from([0, 0, 0, -1, 1]), few, few,
    st.integers(0, 8), st.integers(0, 2), st.sampled_from([0.5, 1.0, 2.0]),
)  # fmt: skip
def test_whether_a_call_fits(
    spoken: list[float], share: Share, priority: int, level: int, prompt: int, kv: int, running: int, factor: float
) -> None:
    engine = EngineView("e", "READY", "m", kv_tokens=kv, spoken_for=spoken, running=running)
    call, session = CallView("s", "m", prompt, priority=priority), SessionView(level=level, shares={"e": share})
    context, tier = context_of(call, engine, session), LUA.tier_of(priority, level)
    fits = LUA.fits(table(spoken), tier, table(share._asdict()), context, kv * factor, running)
    assert Admission(factor).open_to(call, [engine], session) == [engine] * bool(fits)


def account(active: Sequence[float], thinking: Sequence[float], at: int = NOW) -> Any:
    return table({"at": at, "active": table(list(active)), "thinking": table(list(thinking))})


@relaxed
@given(
    contexts, st.lists(tiers, max_size=3), tokens, tokens, st.lists(levels, min_size=2, max_size=2),
    st.floats(0, 4 * HALF),
)  # fmt: skip
def test_what_a_call_takes_up(
    others: list[float], before: list[int], prompt: int, resident: int, at: list[int], idle_ms: float
) -> None:
    """After a router has assigned a call, its view of the engine equals the account that the script writes.

    `before`: tiers of the session's ended calls there. `at`: levels of two new calls.
    """
    sums, mine = account(others, [0.0] * TIERS), table({"calls": 0, "tokens": 0, "since": 0, "tier": 0})
    for tier in before:
        LUA.arrives(sums, mine, 500, 500, tier, NOW, HALF)
        LUA.leaves(sums, mine, 10, NOW, HALF)
    now = NOW + idle_ms
    engine = EngineView("e", "READY", "m", spoken_for=list(LUA.spoken_for(sums, now, HALF).values()))
    share = Share(LUA.share_of(mine, now, HALF), LUA.is_cached_here(mine, now, HALF), False, mine.tier)
    session = SessionView(resident={"e": resident}, shares={"e": share})
    for level in at:  # the second one beside the first
        LUA.arrives(sums, mine, prompt, max(0, prompt - resident), LUA.tier_of(0, level), now, HALF)
        engine, session = with_context(engine, CallView("s", "m", prompt), replace(session, level=level))
        assert engine.spoken_for == pytest.approx(list(LUA.spoken_for(sums, now, HALF).values()), abs=1e-6)
        assert session.shares["e"].tokens == pytest.approx(mine.tokens)
        assert session.shares["e"].tier == mine.tier


written = st.one_of(st.integers(0, 1 << 30), st.floats(0, 1 << 30).map(lambda x: round(x, 3)))


@relaxed
@given(
    st.lists(written, max_size=TIERS), st.lists(written, max_size=TIERS),
    st.one_of(st.just(0), st.floats(1, 1e6)), st.integers(-1000, 100_000),
)  # fmt: skip
def test_what_of_a_cache_is_spoken_for(active: list[float], thinking: list[float], half: float, idle_ms: int) -> None:
    """From an engine's account in Redis."""
    now, at = NOW, NOW - idle_ms
    lists = {"active": active, "thinking": thinking}
    entry = {"at": str(at), "half": str(half)} | {name: " ".join(map(str, n)) for name, n in lists.items()}

    def call(command: str, *of: Any) -> Any:
        if command == "TIME":
            return [now // 1000, now % 1000 * 1000]
        return [entry.get(name, False) for name in of[1:]] if command == "HMGET" else None

    exports = ("account_of", "spoken_for", "NOW")
    lua = run_modules("lib", "residents", "residence", exports=exports, call=call)
    account = lua.account_of("e")
    expected = sum(lua.spoken_for(account, lua.NOW, account.half).values())
    fields = {name.encode(): value.encode() for name, value in entry.items()}
    assert rules.spoken_for(fields, now) == pytest.approx(expected, abs=0.5 + expected * 1e-9)


def test_without_an_account_nothing_is_spoken_for() -> None:
    assert rules.spoken_for({}, NOW) == 0


# -- limits


def test_limits_are_those_of_the_settings() -> None:
    chosen = Settings(
        max_body_bytes=1 << 10, inbox_max=101, max_dead_bytes=2002, max_open_calls=303, max_open_bytes=4004,
        max_session_calls=505, max_session_bytes=6006,
    )  # fmt: skip
    given_to_lua = Transitions(Keys("n"), chosen).listen("c", "i").args[1 : len(ARGS) + 1]
    limits = run_modules("lib", exports=("LIMITS",), args=given_to_lua).LIMITS
    assert dict(limits.items()) == {
        "inbox_max": 101, "dead_bytes": 2002, "open_calls": 303, "open_bytes": 4004, "session_calls": 505,
        "session_bytes": 6006,
    }  # fmt: skip
