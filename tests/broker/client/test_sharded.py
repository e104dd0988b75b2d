"""Several namespaces as one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest

from rsm.broker import (
    AsyncShardedClient,
    CallCancelled,
    InvalidRequest,
    RequestState,
    Settings,
    ShardedClient,
    namespace_of,
)
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.transitions import Claimed
from tests.support.fake_worker import FakeWorker, echo, hold, routing
from tests.support.topologies import Cluster

_SESSIONS = [f"session-{i}" for i in range(30_000)]
_NAMES = ["a", "b", "c", "d", "e"]


def test_the_spread_is_even() -> None:
    counts = Counter(namespace_of(s, _NAMES) for s in _SESSIONS)
    share = len(_SESSIONS) / len(_NAMES)
    # Five standard deviations of a binomial count.
    assert all(abs(n - share) < 5 * (share * (1 - 1 / len(_NAMES))) ** 0.5 for n in counts.values())


def test_only_what_must_move_moves() -> None:
    before = {s: namespace_of(s, _NAMES[:4]) for s in _SESSIONS}
    after = {s: namespace_of(s, _NAMES) for s in _SESSIONS}
    moved = [s for s in _SESSIONS if before[s] != after[s]]
    assert {after[s] for s in moved} == {"e"}, "sessions move only to the new namespace"
    assert len(moved) == pytest.approx(len(_SESSIONS) / 5, rel=0.05)


def test_the_mapping_is_the_same_everywhere() -> None:
    """Another process, another order, another language: these values must never change."""
    wanted = {"s0": "d", "s1": "b", "s2": "d", "s3": "b", "s4": "b", "s5": "a"}
    assert {s: namespace_of(s, _NAMES) for s in wanted} == wanted
    assert {s: namespace_of(s, _NAMES[::-1]) for s in wanted} == wanted


@pytest.mark.parametrize("names", [[], "rsm", ["a", "a"], ["a", "no good"]])
def test_invalid_namespaces(names: Sequence[str]) -> None:
    with pytest.raises(InvalidRequest):
        ShardedClient(names)
    with pytest.raises(InvalidRequest):
        AsyncShardedClient(names)


# -- three namespaces on the three masters of a Cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as running:
        yield running


@pytest.fixture
def shards(cluster: Cluster) -> list[Settings]:
    """A namespace on each master."""
    by_master: dict[int, Settings] = {}
    while len(by_master) < len(cluster.nodes):
        settings = Settings(namespace=f"t{new_id()}", lease_ms=60_000, tick_ms=50).with_redis(cluster.url)
        by_master.setdefault(cluster.master(settings.namespace).port, settings)
    return list(by_master.values())


@pytest.fixture
def serving(shards: list[Settings]) -> Iterator[None]:
    """A router and a worker in each. Calls of a session named stay-… run until they are cancelled."""

    def answer(worker: FakeWorker, call: Claimed) -> None:
        (hold if call.session.startswith("stay") else echo)(worker, call)

    with ExitStack() as stack:
        for settings in shards:
            stack.enter_context(routing(settings))
            stack.enter_context(FakeWorker(settings).serving(answer))
        yield


_PROGRAMS = [f"program-{i}" for i in range(24)]


def test_sessions_are_spread_and_awaited(shards: list[Settings], serving: None) -> None:
    names = [s.namespace for s in shards]
    with ShardedClient(names, settings=shards[0]) as client:
        handles = [client.submit(f"{s} {i}", session=s) for s in _PROGRAMS for i in range(2)]
        assert [h.result(20).text for h in handles] == [f"{s} {i}" for s in _PROGRAMS for i in range(2)]
        for handle in handles:
            home = client.client(handle.session)
            assert home.settings.namespace == namespace_of(handle.session, names)
            assert home.record(handle.id).state is RequestState.COMPLETED
        assert {namespace_of(s, names) for s in _PROGRAMS} == set(names)
        alone = client.submit("alone", id="alone")
        assert client.client("alone").record("alone").session_id == alone.session == "alone"
        stay = [client.submit("long", session="stay-1") for _ in range(3)]
        assert client.cancel_session("stay-1") == 3
        for handle in stay:
            with pytest.raises(CallCancelled):
                handle.result(20)


async def test_the_same_for_asyncio(shards: list[Settings], serving: None) -> None:
    names = [s.namespace for s in shards]
    async with AsyncShardedClient(names, settings=shards[0]) as client, asyncio.timeout(30):
        calls = [await client.submit(f"{s}", session=s, stream=True) for s in _PROGRAMS]
        assert [(await call).text for call in calls] == _PROGRAMS
        assert ["".join([d.text async for d in call.stream()]) for call in calls] == _PROGRAMS
        stay = [await client.submit("long", session="stay-1") for _ in range(3)]
        assert await client.cancel_session("stay-1") == 3
        assert all(isinstance(e, CallCancelled) for e in await asyncio.gather(*stay, return_exceptions=True))
