"""A master dies under load, with a router, workers and clients as in production."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from rsm.broker import AsyncClient, BrokerUnavailable, CallLost, Client, NotReplicated, Settings
from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import OUTAGES, persist
from rsm.broker.protocol.keys import Keys
from rsm.engine.fleet import Fleet
from tests.support.sim_processes import assert_undisturbed, said, sim
from tests.support.topologies import Cluster, UnderSentinel
from tests.support.waiting import eventually

pytestmark = pytest.mark.timeout(180)

Watched = UnderSentinel | Cluster
ONE_REPLICA = [pytest.param((UnderSentinel, 1), id="sentinel"), pytest.param((Cluster, 1), id="cluster")]
# With only one replica, WAIT 1 fails after a failover until the old master is back as a replica.
TWO_REPLICAS = [pytest.param((UnderSentinel, 2), id="sentinel"), pytest.param((Cluster, 2), id="cluster")]
_TOKENS = 30
# The time limit of a call that has to survive a failover.
_PATIENCE_S = 90.0


@pytest.fixture
def watched(request: pytest.FixtureRequest, no_processes_left: None) -> Iterator[Watched]:
    """A master with replicas, and Sentinel or Cluster to promote one. It ends before processes are counted."""
    kind, replicas = request.param
    with kind(replicas=replicas) as running:
        yield running


@pytest.fixture
def settings(watched: Watched) -> Settings:
    return Settings(namespace=watched.namespace(), lease_ms=1500, heartbeat_ms=200, tick_ms=100).with_redis(watched.url)


@pytest.fixture
def fleet(settings: Settings) -> Iterator[Fleet]:
    fleet = Fleet(settings, output=subprocess.DEVNULL)
    fleet.start([sim("e1"), sim("e2")])
    yield fleet
    fleet.stop()


def fail_over(watched: Watched, namespace: str) -> float:
    """Kills the master and restarts it as a replica; returns the seconds until there was a new master."""
    old, began = watched.master(namespace), time.monotonic()
    old.kill()
    eventually(lambda: watched.master(namespace) is not old, 60, "another master")
    took = time.monotonic() - began
    old.start()
    return took


@dataclass
class Ledger:
    """What the producers saw, kept outside Redis."""

    accepted: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    again: int = 0

    async def produce(self, client: AsyncClient, producer: int, until: asyncio.Event) -> None:
        i = 0
        while not until.is_set():
            await self._one(client, f"{producer}-{i}")
            i += 1

    async def _one(self, client: AsyncClient, call_id: str) -> None:
        call = None
        while call is None:
            try:
                call = await client.submit(_prompt(call_id), id=call_id, stream=True, max_tokens=_TOKENS)
            except NotReplicated as e:
                self.again += len(e.call_ids)
        self.accepted[call_id] = time.monotonic()
        try:
            words = await _read(call)
        except CallLost:
            self.lost.append(call_id)
            return
        assert words == said(_prompt(call_id), _TOKENS), "the stream is whole"
        self.ended[call_id] = time.monotonic()


def _prompt(call_id: str) -> str:
    return f"prompt of {call_id}"


def _gap(times: list[float]) -> float:
    """The longest gap between two times, in seconds."""
    times = sorted(times)
    return max(later - before for before, later in pairwise(times))


@pytest.mark.parametrize("watched", TWO_REPLICAS, indirect=True)
async def test_with_wait_nothing_accepted_is_lost(watched: Watched, settings: Settings, fleet: Fleet) -> None:
    settings = settings.model_copy(update={"wait_replicas": 1, "wait_ms": 200})
    ledger, over = Ledger(), asyncio.Event()
    async with AsyncClient(settings=settings, redis_timeout=_PATIENCE_S) as client, asyncio.timeout(_PATIENCE_S):
        producers = [asyncio.create_task(ledger.produce(client, i, over)) for i in range(8)]
        await asyncio.sleep(1.5)
        before = len(ledger.accepted)
        promoted = await asyncio.to_thread(fail_over, watched, settings.namespace)
        enough = len(ledger.ended) + 20
        await asyncio.to_thread(eventually, lambda: len(ledger.ended) >= enough, _PATIENCE_S)
        over.set()
        await asyncio.gather(*producers)
    assert before > 8, "there was load when the master died"
    assert ledger.lost == []
    assert ledger.ended.keys() == ledger.accepted.keys()
    with Client(settings=settings) as look:
        for call_id in ledger.accepted:
            assert_undisturbed(look, call_id, _prompt(call_id), _TOKENS)
    print(
        f"\n{len(ledger.accepted)} calls; another master after {promoted:.1f} s; nothing accepted for "
        f"{_gap([*ledger.accepted.values()]):.1f} s, nothing ended for {_gap([*ledger.ended.values()]):.1f} s; "
        f"submitted again for want of replicas: {ledger.again}"
    )


@pytest.mark.parametrize("watched", ONE_REPLICA, indirect=True)
async def test_calls_that_an_asynchronous_replica_lacks_are_reported_lost_and_no_call_is_stuck(
    watched: Watched, settings: Settings, fleet: Fleet
) -> None:
    """The worst case of asynchronous replication: the replica gets none of the accepted calls."""
    master = watched.master(settings.namespace)
    async with AsyncClient(settings=settings, redis_timeout=_PATIENCE_S) as client, asyncio.timeout(_PATIENCE_S):
        long = [await client.submit(_prompt(f"l{i}"), id=f"l{i}", stream=True, max_tokens=600) for i in range(4)]
        streams = [asyncio.create_task(_read(call)) for call in long]
        await asyncio.sleep(1)
        master.refuse_replicas()
        finished = [await client.submit(_prompt(f"f{i}"), id=f"f{i}", max_tokens=5) for i in range(4)]
        assert [(await call.result()).text for call in finished] == [said(_prompt(f"f{i}"), 5) for i in range(4)]
        open_ = [await client.submit(_prompt(f"o{i}"), id=f"o{i}", max_tokens=3000) for i in range(12)]
        careful = AsyncClient(settings=settings.model_copy(update={"wait_replicas": 1, "wait_ms": 100}))
        async with careful:
            with pytest.raises(NotReplicated, match="0 of 1"):
                await careful.submit(_prompt("w"), id="w", max_tokens=5)
        await asyncio.to_thread(fail_over, watched, settings.namespace)
        ends = await asyncio.gather(*open_, return_exceptions=True)
        assert [type(end) for end in ends] == [CallLost] * len(ends), (
            "each waiting client gets an error for a lost call"
        )
        again = [await client.submit(_prompt(f"o{i}"), id=f"o{i}", max_tokens=5) for i in range(12)]
        assert [(await call).text for call in again] == [said(_prompt(f"o{i}"), 5) for i in range(12)]
        # Calls that the replica has continue, even if it lacks their claims, chunks or ends.
        assert [(await call).text for call in long] == [said(_prompt(f"l{i}"), 600) for i in range(4)]
        for i, words in enumerate(await asyncio.gather(*streams)):
            assert words == said(_prompt(f"l{i}"), 600)
    eventually(lambda: not _unfinished(settings), what="no record is stuck")
    with Client(settings=settings) as look:
        for i in range(4):
            assert_undisturbed(look, f"l{i}", _prompt(f"l{i}"), 600)


async def _read(call: Any) -> str:
    words: list[str] = []
    async for delta in call.stream():
        words = [] if delta.restart else [*words, delta.text]
    return "".join(words)


def _unfinished(settings: Settings) -> list[str]:
    server: Any = connect(settings)
    with server:
        records = server.scan_iter(match=f"{Keys(settings.namespace).call('')}*", _type="hash")
        return [key.decode() for key in records if server.hget(key, "state") in (b"PENDING", b"RUNNING")]


@pytest.mark.parametrize("watched", ONE_REPLICA[:1], indirect=True)
async def test_a_master_that_freezes_is_replaced(watched: Watched, settings: Settings, fleet: Fleet) -> None:
    """Its kernel still accepts connections and commands; after it wakes up it acts as the master for a while."""
    master = watched.master(settings.namespace)
    async with AsyncClient(settings=settings, redis_timeout=_PATIENCE_S) as client, asyncio.timeout(_PATIENCE_S):
        calls = [await client.submit(_prompt(f"{i}"), id=f"{i}", max_tokens=200) for i in range(8)]
        await client.redis.wait(1, 5000)  # otherwise the replica may lack the last of them
        master.freeze()
        began = time.monotonic()
        more = [asyncio.create_task(client.submit(_prompt(f"m{i}"), id=f"m{i}", max_tokens=5)) for i in range(4)]
        await asyncio.to_thread(eventually, lambda: watched.master(settings.namespace) is not master, 60)
        print(f"\nanother master after {time.monotonic() - began:.1f} s", end="")
        await asyncio.gather(*more)
        print(f"; calls accepted again after {time.monotonic() - began:.1f} s")
        results = await asyncio.gather(*calls)
        assert [r.text for r in results] == [said(_prompt(f"{i}"), 200) for i in range(8)]
        master.thaw()
        for i, call in enumerate(await asyncio.gather(*more)):
            assert (await call).text == said(_prompt(f"m{i}"), 5)
    eventually(lambda: master.replicates(), 60, "the old master follows the new one")


@pytest.mark.parametrize("watched", ONE_REPLICA, indirect=True)
def test_no_master_at_all_is_reported(watched: Watched) -> None:
    settings = Settings().with_redis(watched.url)
    for node in watched.nodes:
        node.kill()
    with Client(settings=settings, redis_timeout=0.5) as client:
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable, match="No master found"):
            client.submit("p")
        assert time.monotonic() - began < 20
    with connect(settings) as server, pytest.raises(OUTAGES):
        persist(server.time, "test", lambda: False, 0.2)
