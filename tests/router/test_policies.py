"""Routing policies, and the coordinator that knows where the sessions' caches are."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import redis

from rsm.broker import InvalidRequest, Settings
from rsm.broker.client.sync import Client
from rsm.broker.connection import execute
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.transitions import EngineView, SessionView, Transitions
from rsm.router.affinity import KVCacheCoordinator, best_engine
from rsm.router.policies import POLICIES, Policy, create_policy
from rsm.router.policies.autellix import Autellix
from rsm.router.policies.base import least_loaded, with_call
from rsm.router.policies.least_loaded import LeastLoaded
from rsm.router.policies.round_robin import RoundRobin
from rsm.router.policies.session_hash import SessionHash
from rsm.router.views import CallView, Choice
from tests.support.fake_worker import FakeWorker, patient, routing
from tests.support.waiting import eventually

DEFAULTS = Settings()
NOWHERE = SessionView()


def engine(engine_id: str, queued_tokens: int = 0, **fields: Any) -> EngineView:
    return EngineView(engine_id, "READY", "m", queued_tokens=queued_tokens, **fields)


def call(prompt_tokens: int = 10, session: str = "s") -> CallView:
    return CallView(session, "m", prompt_tokens)


# -- load


@pytest.mark.parametrize(
    ("engines", "chosen"),
    [
        ([engine("a", 10), engine("b", 9)], "b"),
        ([engine("a", 10), engine("b", 4, running_tokens=5)], "b"),
        ([engine("a", 10), engine("b", 4, running_tokens=7)], "a"),
        ([engine("a", 10, queued=2), engine("b", 10, queued=1)], "b"),
        ([engine("a", 10, running=2), engine("b", 10, queued=1)], "b"),
        ([engine("a", served=5), engine("b", served=4)], "b"),
        ([engine("b"), engine("a")], "a"),
        ([engine("a", 10, served=0), engine("b", 9, served=99, queued=50)], "b"),
    ],
)
def test_least_loaded_is_fewest_tokens_then_fewest_calls_then_least_served(
    engines: list[EngineView], chosen: str
) -> None:
    assert least_loaded(engines).id == chosen
    assert LeastLoaded(DEFAULTS).choose(call(), engines, NOWHERE).engine == chosen


def test_a_call_is_load_from_the_moment_it_is_assigned() -> None:
    """A batch is spread although no engine has reported its load meanwhile."""
    fleet = {e: engine(e) for e in "abc"}
    for i in range(30):
        chosen = least_loaded(list(fleet.values())).id
        fleet[chosen] = with_call(fleet[chosen], 10 + i % 3)
    assert {e.served for e in fleet.values()} == {10}
    assert all(e.queued == e.served for e in fleet.values())
    assert max(e.queued_tokens for e in fleet.values()) - min(e.queued_tokens for e in fleet.values()) <= 12


# -- the four policies


def test_round_robin_gives_equal_shares_in_any_order_of_the_fleet() -> None:
    policy = RoundRobin(DEFAULTS)
    fleet = [engine(e) for e in "abc"]
    chosen = [policy.choose(call(), fleet[i % 3 :] + fleet[: i % 3], NOWHERE).engine for i in range(9)]
    assert Counter(chosen) == {"a": 3, "b": 3, "c": 3}
    assert all(one != following for one, following in pairwise(chosen))
    assert policy.choose(call(), fleet[:1], NOWHERE).engine == "a"


def test_session_hash_is_stable() -> None:
    fleet = [engine(f"e{i}") for i in range(5)]
    sessions = [f"s{i}" for i in range(500)]

    def homes(engines: Sequence[EngineView]) -> dict[str, str]:
        policy = SessionHash(DEFAULTS)
        return {s: policy.choose(call(session=s), engines, NOWHERE).engine for s in sessions}

    before = homes(fleet)
    assert homes(fleet[::-1]) == before, "whatever the order, the process and the load"
    assert homes([replace(e, queued_tokens=1000 * i) for i, e in enumerate(fleet)]) == before
    shares = Counter(before.values())
    assert len(shares) == 5
    assert min(shares.values()) > 60, "roughly a fifth each"
    without = homes(fleet[:-1])
    assert {s for s in sessions if without[s] != before[s]} == {s for s in sessions if before[s] == "e4"}
    grown = homes([*fleet, engine("e5")])
    assert {grown[s] for s in sessions if grown[s] != before[s]} == {"e5"}


def test_autellix_sends_short_calls_where_there_is_least_to_do() -> None:
    policy = Autellix(DEFAULTS)
    session = SessionView("a", {"a": 9000})
    fleet = [engine("a", 10), engine("b")]
    assert not policy.needs_session(call(2048))
    choice = policy.choose(call(2048), fleet, session)
    assert (choice.engine, choice.bind, choice.hit) == ("b", False, None)


def test_autellix_sends_long_calls_where_their_cache_is() -> None:
    policy = Autellix(DEFAULTS)
    fleet = [engine("a", 9999), engine("b")]
    assert policy.needs_session(call(2049))
    choice = policy.choose(call(2049), fleet, SessionView("a", {"b": 9000}))
    assert (choice.engine, choice.bind, choice.hit) == ("a", True, True)


def test_autellix_binds_a_session_at_its_first_long_call() -> None:
    policy = Autellix(DEFAULTS)
    choice = policy.choose(call(2049), [engine("a", 5), engine("b", 4)], NOWHERE)
    assert (choice.engine, choice.bind, choice.hit) == ("b", True, False)


def test_autellix_binds_again_when_the_engine_is_gone() -> None:
    policy = Autellix(DEFAULTS)
    fleet = [engine("a", 5), engine("b", 4), engine("c", 3)]
    gone = SessionView("x", {"x": 9000, "a": 100, "b": 50})
    choice = policy.choose(call(2049), fleet, gone)
    assert (choice.engine, choice.bind, choice.hit) == ("a", True, True), "the most cache of the remaining engines"
    choice = policy.choose(call(2049), fleet, SessionView("x", {"x": 9000}))
    assert (choice.engine, choice.bind, choice.hit) == ("c", True, False)


def test_autellix_takes_its_threshold_from_the_settings() -> None:
    policy = Autellix(DEFAULTS.model_copy(update={"cache_token_threshold": 0}))
    assert policy.needs_session(call(1))
    assert not policy.needs_session(call(0))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_says_why(name: str) -> None:
    policy = create_policy(DEFAULTS.model_copy(update={"policy": name}))
    for tokens in (1, 5000):
        choice = policy.choose(call(tokens), [engine("a")], NOWHERE)
        assert choice.engine == "a"
        assert choice.why
        assert "\n" not in choice.why


# -- choosing a policy


class LastEngine(Policy):
    """A user's policy."""

    def choose(self, call: CallView, engines: Sequence[EngineView], session: SessionView) -> Choice:
        return Choice(engines[-1].id, "it is the last")


class Unfinished(Policy):
    pass


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module."""
    module = ModuleType("users_own_policies")
    vars(module).update(LastEngine=LastEngine, Unfinished=Unfinished, function=least_loaded)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def named(name: str) -> Settings:
    return DEFAULTS.model_copy(update={"policy": name})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("autellix", Autellix),
        ("least_loaded", LeastLoaded),
        ("round_robin", RoundRobin),
        ("session_hash", SessionHash),
        ("rsm.router.policies.least_loaded:LeastLoaded", LeastLoaded),
    ],
)
def test_a_policy_by_name(name: str, kind: type[Policy]) -> None:
    policy = create_policy(named(name))
    assert type(policy) is kind
    assert policy.settings.policy == name


def test_a_users_own_policy(plugin: str) -> None:
    assert isinstance(create_policy(named(f"{plugin}:LastEngine")), LastEngine)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "fastest",
        "no.such.module:Class",
        "rsm.router.policies",
        "rsm.router.policies:",
        "rsm.router.policies:No",
        ":X",
        ".a:X",
    ],
)
def test_no_such_policy(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"There is no routing policy .* Use one of autellix, ") as refused:
        create_policy(named(name))
    assert "round_robin" in str(refused.value)


@pytest.mark.parametrize("attribute", ["function", "Unfinished", "__name__"])
def test_a_class_that_is_no_policy(plugin: str, attribute: str) -> None:
    with pytest.raises(InvalidRequest, match=r"is not a subclass of rsm\.router\.Policy"):
        create_policy(named(f"{plugin}:{attribute}"))


# -- policies at work


def place(settings: Settings, n: int, prompt_tokens: int, sessions: int) -> Counter[tuple[str, str]]:
    """Calls of some sessions, routed over three engines: how many of (session, engine)."""
    workers = [FakeWorker(settings, e).up() for e in ("e0", "e1", "e2")]
    with Client(settings=settings) as client, routing(patient(settings)):
        calls = [client.prepare("hi", session=f"s{i % sessions}", prompt_tokens=prompt_tokens) for i in range(n)]
        handles = client.submit_many(calls)
        eventually(lambda: all(h.record().engine_id for h in handles))
        records = [h.record() for h in handles]
        client.cancel_session("s0")
    for w in workers:
        w.close()
    assert all(r.why for r in records)
    return Counter((r.session_id, r.engine_id) for r in records)


@pytest.mark.parametrize("policy", ["least_loaded", "round_robin"])
def test_baselines_spread_the_calls(settings: Settings, policy: str) -> None:
    placed = place(settings.model_copy(update={"policy": policy}), 30, 5000, 1)
    assert set(placed.values()) == {10}


@pytest.mark.parametrize("policy", ["session_hash", "autellix"])
def test_a_session_with_long_prompts_stays_on_its_engine(settings: Settings, policy: str) -> None:
    placed = place(settings.model_copy(update={"policy": policy}), 60, 5000, 12)
    assert len(placed) == 12
    assert set(placed.values()) == {5}
    assert len({e for _, e in placed}) > 1


def test_autellix_spreads_the_sessions_too(settings: Settings) -> None:
    placed = place(settings, 60, 5000, 12)
    assert Counter(e for _, e in placed) == {"e0": 4, "e1": 4, "e2": 4}


def test_autellix_spreads_short_calls(settings: Settings) -> None:
    assert set(place(settings, 30, 2048, 1).values()) == {10}


def test_a_bound_session_moves_when_its_engine_drains(settings: Settings, db: redis.Redis, keys: Keys) -> None:
    transitions = Transitions(keys, settings)
    workers = {e: FakeWorker(settings, e).up() for e in ("e0", "e1")}
    with Client(settings=settings) as client, routing(patient(settings)):

        def engine_of(call_id: str) -> str:
            client.submit("hi", id=call_id, session="s", prompt_tokens=5000)
            eventually(lambda: client.record(call_id).engine_id)
            return client.record(call_id).engine_id

        first = engine_of("c1")
        other = "e1" if first == "e0" else "e0"
        assert engine_of("c2") == first, "although the other one is idle"
        execute.run(db, transitions.drain(first))
        assert engine_of("c3") == other
        eventually(lambda: {client.record(c).engine_id for c in ("c1", "c2")} == {other})
        workers[first].up()
        assert engine_of("c4") == other, "bound again"
        stats = KVCacheCoordinator(settings=settings, server=db).get_cache_stats()
        assert (stats["affinity_hits"], stats["affinity_misses"]) == (4, 2)
    for w in workers.values():
        w.close()


# -- the coordinator


@pytest.fixture
def coordinator(settings: Settings, db: redis.Redis) -> KVCacheCoordinator:
    return KVCacheCoordinator(settings=settings, server=db)


def test_best_engine() -> None:
    session = SessionView("", {"a": 5, "b": 9, "c": 0})
    assert best_engine(session, ["a", "b", "c"]) == "b"
    assert best_engine(session, ["a", "c"]) == "a"
    assert best_engine(session, ["c", "d"]) is None
    assert best_engine(session, []) is None
    assert best_engine(replace(session, bound="d"), ["a", "d"]) == "d"
    assert best_engine(replace(session, bound="x"), ["a", "d"]) == "a"


def test_a_session_goes_where_its_cache_was_recorded(coordinator: KVCacheCoordinator) -> None:
    best = coordinator.get_best_engine_for_session
    assert best("s1", ["e1", "e2"], 5000) is None
    coordinator.record_cache_usage("s1", "e1", 3000)
    coordinator.record_cache_usage("s1", "e2", 4000)
    assert best("s1", ["e1", "e2"], 5000) == "e2"
    assert best("s1", ["e1"], 5000) == "e1"
    assert best("s1", ["e3"], 5000) is None
    assert best("s1", [], 5000) is None
    assert best("s2", ["e1", "e2"], 5000) is None, "another session has no cache there"
    coordinator.record_cache_usage("s1", "e1", 9000)
    assert best("s1", ["e1", "e2"], 5000) == "e1"


def test_short_prompts_may_go_anywhere_and_are_not_counted(coordinator: KVCacheCoordinator) -> None:
    coordinator.record_cache_usage("s1", "e1", 3000)
    assert coordinator.get_best_engine_for_session("s1", ["e1"], 2048) is None
    assert coordinator.get_cache_stats()["affinity_misses"] == 0
    assert coordinator.get_best_engine_for_session("s1", ["e1"], 2049) == "e1"


def test_the_threshold_can_be_given(settings: Settings, db: redis.Redis) -> None:
    coordinator = KVCacheCoordinator(cache_token_threshold=10, settings=settings, server=db)
    coordinator.record_cache_usage("s1", "e1", 5)
    assert coordinator.cache_token_threshold == 10
    assert coordinator.get_best_engine_for_session("s1", ["e1"], 10) is None
    assert coordinator.get_best_engine_for_session("s1", ["e1"], 11) == "e1"
    assert KVCacheCoordinator(0, settings=settings, server=db).cache_token_threshold == 0
    assert KVCacheCoordinator(settings=settings, server=db).cache_token_threshold == 2048


def test_a_coordinator_of_its_own_connection(settings: Settings) -> None:
    coordinator = KVCacheCoordinator(settings=settings)
    coordinator.record_cache_usage("s1", "e1", 3000)
    assert coordinator.get_best_engine_for_session("s1", ["e1"], 5000) == "e1"
    coordinator._redis.close()


def test_cache_stats(coordinator: KVCacheCoordinator) -> None:
    assert coordinator.get_cache_stats() == {
        "affinity_hits": 0, "affinity_misses": 0, "prompt_tokens": 0, "cached_tokens": 0, "hit_rate": 0.0,
        "token_hit_rate": 0.0,
    }  # fmt: skip
    coordinator.record_cache_usage("s1", "e1", 3000)
    for session in ("s1", "s1", "s1", "s2"):
        coordinator.get_best_engine_for_session(session, ["e1"], 5000)
    stats = coordinator.get_cache_stats()
    assert (stats["affinity_hits"], stats["affinity_misses"], stats["hit_rate"]) == (3, 1, 0.75)


def test_what_the_engines_counted_is_in_the_stats(
    coordinator: KVCacheCoordinator, settings: Settings, client: Client
) -> None:
    worker = FakeWorker(settings).up()
    with routing(patient(settings)):
        client.submit("hi", session="s1")
        worker.finish(worker.take_soon(), prompt_tokens=400, cached_tokens=100, resident_tokens=420)
    assert coordinator.get_cache_stats()["token_hit_rate"] == 0.25
    assert coordinator.get_best_engine_for_session("s1", ["e1", "e2"], 5000) == "e1", "workers record it too"
    worker.close()


def test_coordinators_share_what_they_know(
    settings: Settings, coordinator: KVCacheCoordinator, db: redis.Redis
) -> None:
    other = KVCacheCoordinator(settings=settings, server=db)
    other.record_cache_usage("s1", "e1", 3000)
    assert coordinator.get_best_engine_for_session("s1", ["e1"], 5000) == "e1"
    assert other.get_cache_stats() == coordinator.get_cache_stats()


def test_what_is_known_of_an_idle_session_expires(
    coordinator: KVCacheCoordinator, settings: Settings, db: redis.Redis, keys: Keys
) -> None:
    coordinator.record_cache_usage("s1", "e1", 3000)
    assert 0 < db.ttl(keys.affinity("s1")) <= settings.session_ttl_s


def test_the_coordinator_takes_ids_only(coordinator: KVCacheCoordinator) -> None:
    for session, engine_id in (("a b", "e1"), ("s", "{e}"), ("", "e1")):
        with pytest.raises(InvalidRequest):
            coordinator.record_cache_usage(session, engine_id, 5)
    with pytest.raises(InvalidRequest):
        coordinator.get_best_engine_for_session("a b", ["e1"], 5000)
