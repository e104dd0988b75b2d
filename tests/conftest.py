"""Fixtures: a real server per test process, a namespace per test, and checks for leaked keys and processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakeredis
import psutil
import pytest
import redis

from chaos.leaks import leaked_keys
from rsm.broker import Client, Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.factory import connect
from rsm.broker.protocol.ids import new_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.views.monitor import Monitor
from tests.support.roles import Roles
from tests.support.sim_processes import Start, WorkerProcess, sim, state_of
from tests.support.topologies import TOPOLOGIES, Topology
from tests.support.waiting import eventually as eventually
from tests.support.world import World

# In a shell's background, this process and its children ignore SIGINT. The tests of Ctrl-C need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--topology", choices=TOPOLOGIES, default="standalone", help="the Redis of `server`, `settings`")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Topology]:
    """The Redis of this test process: one server, a master under Sentinel, or a Cluster of three masters."""
    with TOPOLOGIES[request.config.getoption("--topology")]() as running:
        yield running


@pytest.fixture
def settings(server: Topology) -> Settings:
    """Settings with fast timers and a namespace of their own."""
    return Settings(namespace=f"t{new_id()}", lease_ms=1500, heartbeat_ms=200, tick_ms=100).with_redis(server.url)


@pytest.fixture
def keys(settings: Settings) -> Keys:
    return Keys(settings.namespace)


@pytest.fixture
def transitions(settings: Settings, keys: Keys) -> Transitions:
    return Transitions(keys, settings)


@pytest.fixture
def db(settings: Settings) -> Iterator[redis.Redis]:
    client = connect(settings)
    yield client
    client.close()


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings=settings) as c:
        yield c


@pytest.fixture
def monitor(settings: Settings, db: redis.Redis) -> Monitor:
    return Monitor(settings, db)


@pytest.fixture
def fragile() -> Iterator[EmbeddedRedis]:
    """A server that a test may kill."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def cut_off(fragile: EmbeddedRedis, settings: Settings) -> Settings:
    """Settings for the fragile server."""
    # `everysec` may lose what is written during a sync. Most tests are not about that.
    with redis.Redis(unix_socket_path=str(fragile.socket)) as server:
        server.config_set("appendfsync", "always")
    return settings.with_redis(fragile.url)


@pytest.fixture
def roles(db: redis.Redis, settings: Settings) -> Iterator[Roles]:
    made = Roles(db, settings)
    made.create()
    yield made
    made.drop()


@pytest.fixture(params=["server", "fakeredis"])
def world(request: pytest.FixtureRequest, settings: Settings) -> Iterator[World]:
    """A namespace on a real server, and one on fakeredis. Both are checked for leaked keys."""
    if request.param == "server":
        db = connect(settings)
        yield World(db, settings)
        db.close()
    else:
        fake = World(fakeredis.FakeRedis(server_type="valkey", version=(7, 2)), settings)
        yield fake
        assert not fake.leaks()


@pytest.fixture
def start(settings: Settings, tmp_path: Path) -> Iterator[Start]:
    """Starts workers. Those that are left at the end are killed."""
    started: list[WorkerProcess] = []

    def start(
        engine_id: str = "e1", *, ready: bool = True, settings: Settings = settings, **sim_args: Any
    ) -> WorkerProcess:
        worker = WorkerProcess(sim(engine_id, **sim_args), settings, tmp_path / f"{engine_id}-{len(started)}.log")
        started.append(worker)
        if ready:
            monitor = Monitor(settings)
            eventually(
                lambda: monitor.engine(engine_id)["pid"] == worker.pid if state_of(monitor, engine_id) else False
            )
            eventually(lambda: state_of(monitor, engine_id) == "READY", what=worker.log())
        return worker

    yield start
    for worker in started:
        worker.kill()


@pytest.fixture(autouse=True)
def no_key_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a key without TTL, unless it is of an open call or on the list of lasting keys."""
    if "settings" not in request.fixturenames:
        yield
        return
    settings: Settings = request.getfixturevalue("settings")
    yield
    server = connect(settings)
    try:
        leaks = leaked_keys(server, Keys(settings.namespace).prefix)
        assert not leaks, f"keys without TTL: {leaks}"
    finally:
        server.close()


@pytest.fixture(autouse=True)
def no_processes_left(server: Topology) -> Iterator[None]:
    """Fails a test that leaves a child process behind."""
    me = psutil.Process()
    before = {p.pid for p in me.children(recursive=True)}
    yield
    left = [p for p in me.children(recursive=True) if p.pid not in before and p.is_running()]
    _, alive = psutil.wait_procs(left, timeout=5)
    names = [(p.pid, " ".join(p.cmdline()[:6])) for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    for p in alive:
        p.kill()
    assert not names, f"processes left behind: {names}"
