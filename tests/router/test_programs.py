"""Programs, from their producer to the views: any number of routers and workers, sub-agents, the process table."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from rsm.broker import AsyncClient, CallCancelled, Client, InvalidRequest, Settings, ShardedClient
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.transitions import Claimed
from rsm.broker.views.monitor import Monitor
from rsm.engine.seed_api.process_table import GlobalProcessTable, SessionManager
from tests.support.fake_worker import FakeWorker, hold, patient, routing
from tests.support.waiting import eventually
from tests.support.world import World

ROUTERS, WORKERS, PROGRAMS = 3, 3, 12


def charge_as_told(worker: FakeWorker, call: Claimed) -> None:
    """Charges the service that the call's id ends with."""
    worker.finish(call, service=int(call.fence.call_id.rpartition(".")[2]))


@pytest.fixture
def fleet(settings: Settings) -> Iterator[Settings]:
    """Several routers and workers."""
    calm = patient(settings)
    with ExitStack() as stack:
        for i in range(WORKERS):
            stack.enter_context(FakeWorker(calm, f"e{i}").serving(charge_as_told))
        for _ in range(ROUTERS):
            stack.enter_context(routing(calm))
        yield calm


@dataclass(frozen=True)
class Plan:
    """A program: sequential stages of parallel calls. The program itself or a sub-agent makes each call."""

    name: str
    stages: tuple[tuple[tuple[int, str], ...], ...]

    @property
    def service(self) -> int:
        """The service of the longest path, as each stage begins after the one before."""
        return sum(max(cost for cost, _ in stage) for stage in self.stages)

    def run(self, client: Client) -> None:
        for n, stage in enumerate(self.stages):
            calls = [
                client.prepare(
                    "hi",
                    id=f"{self.name}-{n}-{i}.{cost}",
                    session=f"{self.name}{agent}",
                    parent_session=self.name if agent else None,
                )
                for i, (cost, agent) in enumerate(stage)
            ]
            for handle in client.submit_many(calls):
                handle.result(60)


def plan(name: str, rng: random.Random) -> Plan:
    def stage() -> tuple[tuple[int, str], ...]:
        calls = rng.choice((1, 1, 5))
        return tuple((rng.randrange(1, 3000), rng.choice(("", ".sub1", ".sub2"))) for _ in range(calls))

    return Plan(name, tuple(stage() for _ in range(6)))


def test_with_any_number_of_routers_and_workers_service_is_that_of_one(fleet: Settings, monitor: Monitor) -> None:
    rng = random.Random(7)
    plans = [plan(f"p{i}", rng) for i in range(PROGRAMS)]
    with ThreadPoolExecutor(PROGRAMS) as pool, Client(settings=fleet) as client:
        list(pool.map(lambda p: p.run(client), plans))
    rows = {row["session_id"]: row for row in monitor.sessions()}
    assert {p.name: rows[p.name]["service"] for p in plans} == {p.name: p.service for p in plans}
    served = {e["engine_id"]: e["served"] for e in monitor.engines()}
    assert min(served.values()) > 0, "all of them served calls"
    for row in rows.values():
        assert row["program"] == row["session_id"].partition(".")[0]
        assert row["service"] == rows[row["program"]]["service"]
        assert (row["active"], row["arrivals"]) == (0, row["completed"])


# -- sub-agents, by clients


async def test_both_clients_refuse_a_circle_of_sessions(settings: Settings, client: Client) -> None:
    client.submit("hi", session="sub", parent_session="main")
    with pytest.raises(InvalidRequest, match="main is an ancestor of sub"):
        client.submit("hi", session="main", parent_session="sub")
    with pytest.raises(InvalidRequest, match="parent_session must be"):
        client.submit("hi", session="main", parent_session="a b")
    async with AsyncClient(settings=settings) as other:
        with pytest.raises(InvalidRequest, match="cannot be its own parent"):
            await other.submit("hi", session="main", parent_session="main")
        await other.submit("hi", session="sub2", parent_session="sub")
    with SessionManager(GlobalProcessTable(settings)).session("sub3", parent="sub2") as session:
        assert Monitor(settings).session(session)["program"] == "main"
    assert Monitor(settings).backlog() == 2, "what was refused is nowhere"


async def test_a_cancel_of_a_session_stops_its_sub_agents_on_all_engines(settings: Settings) -> None:
    calm = patient(settings)
    with ExitStack() as stack:
        for e in ("e1", "e2"):
            stack.enter_context(FakeWorker(calm, e).serving(hold))
        stack.enter_context(routing(calm))
        client = stack.enter_context(Client(settings=calm))
        handles = [client.submit("hi", session="main")]
        handles += [client.submit("hi", session=f"sub{i}", parent_session="main") for i in range(4)]
        handles.append(client.submit("hi", session="leaf", parent_session="sub3"))
        monitor = Monitor(calm)
        eventually(lambda: all(h.record().state == "RUNNING" for h in handles), what="all calls run")
        assert monitor.session("main")["engines"] != []
        async with AsyncClient(settings=calm) as other:
            assert await other.cancel_session("sub0", descendants=False) == 1
            assert await other.cancel_session("main") == 5
        for handle in handles:
            with pytest.raises(CallCancelled):
                handle.result(20)


def test_a_sub_agents_calls_go_to_the_shard_of_its_parent(settings: Settings) -> None:
    names = [f"{settings.namespace}-{i}" for i in range(3)]
    with ShardedClient(names, settings.url()) as shards:
        for i in range(9):
            shards.submit("hi", session=f"sub{i}", parent_session="main")
        settings_of_parent = shards.client("main").settings
        assert Monitor(settings_of_parent).session("sub8")["program"] == "main"
        assert shards.cancel_session("main") == 9


# -- the views


def test_a_row_of_the_table(world: World) -> None:
    worker = world.worker()
    world.charge("main", 5_000, waited_ms=3_000, ran_ms=2_000)
    world.submit("c1", session="sub", parent_session="main")
    world.assign("c1")
    call = worker.take()
    world.submit("c2", session="main")
    monitor = Monitor(world.settings, world.db)
    main, sub = monitor.sessions()
    assert (main["session_id"], main["program"], main["parent"]) == ("main", "main", "")
    assert (sub["session_id"], sub["program"], sub["parent"]) == ("sub", "main", "main")
    of_program = ("service", "level", "waited_ms", "ran_ms", "wait_ratio")
    assert [main[n] for n in of_program] == [sub[n] for n in of_program] == [5_000, 2, 3_000, 2_000, 1.5]
    assert (main["engines"], sub["engines"], main["active"], sub["active"]) == ([], ["e1"], 1, 1)
    assert [(t["request_id"], t["state"], t["engine_id"]) for t in main["threads"]] == [("c2", "PENDING", "")]
    (thread,) = sub["threads"]
    assert (thread["request_id"], thread["state"], thread["engine_id"], thread["service"]) == (
        "c1",
        "RUNNING",
        "e1",
        5_000,
    )
    submitted, started = world.record("c1").ints("submitted_ms", "started_ms")
    assert (thread["arrival_ms"], thread["waited_ms"]) == (submitted, started - submitted)
    assert thread["ran_ms"] >= 0
    assert monitor.session("sub")["parent"] == "main"
    worker.finish(call, service=10)
    assert Monitor(world.settings, world.db).session("sub")["service"] == 5_010


def test_the_ratio_is_what_is_compared_with_beta(world: World) -> None:
    world.charge("s", 1, waited_ms=4_000)
    monitor = Monitor(world.settings, world.db)
    assert monitor.session("s")["wait_ratio"] == 4.0, "a program that has not run counts as having run for a second"
    world.db.hset(Keys(world.settings.namespace).session("s"), mapping={"paid_waited_ms": 3_000})
    assert monitor.session("s")["wait_ratio"] == 1.0, "a promotion has paid for the other wait"


def test_the_unit_is_that_of_the_engines(world: World) -> None:
    monitor = Monitor(world.settings, world.db)
    assert monitor.service_unit() == "tokens"
    FakeWorker(world.settings, "e1", server=world.db, service_unit="time").up()
    assert monitor.service_unit() == "time"


def test_many_sessions_take_few_round_trips(world: World) -> None:
    for i in range(1200):
        world.db.hset(world.keys.session(f"s{i:04}"), mapping={"service": i, "parent": f"s{i - 1:04}" if i % 2 else ""})
    rows = Monitor(world.settings, world.db).sessions()
    assert len(rows) == 1200
    assert [r["service"] for r in rows[:3]] == [1198, 1198, 1196], "that of the program"
    world.db.delete(*(world.keys.session(f"s{i:04}") for i in range(1200)))
