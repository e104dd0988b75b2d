"""How a Redis URL is parsed, and how the master of a namespace is found."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from redis import AuthenticationError

from rsm.broker import AsyncClient, BrokerUnavailable, Client, InvalidRequest, Settings
from rsm.broker.connection.dedicated import DedicatedConnection
from rsm.broker.connection.factory import connect, connect_async
from rsm.broker.connection.failover import Refused
from rsm.broker.connection.retry import OUTAGES, persist
from rsm.broker.connection.topology import Address, place_of
from rsm.cli.checks import examine
from rsm.workers.supervision.node import NodeClient, run_node
from tests.support.topologies import Cluster, UnderSentinel, free_port


def test_a_plain_url_names_its_server() -> None:
    place = place_of("rediss://u:p%40@h:7/3?ssl_ca_certs=/ca", "rsm")
    assert place.finder is None
    assert place.scheme == "rediss"
    wanted = {"host": "h", "port": 7, "db": 3, "username": "u", "password": "p@", "ssl_ca_certs": "/ca"}
    assert place.options == wanted


def test_a_sentinels_url() -> None:
    url = "redis+sentinel://u:p%40@a:1,b,[::1]:3/main/2?sentinel_username=su&sentinel_password=sp"
    place = place_of(url, "rsm")
    assert place.scheme == "redis"
    assert place.options == {"username": "u", "password": "p@", "db": 2}
    finder = place.finder
    assert finder is not None
    assert finder.question == ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")
    assert set(finder.seeds()) == {("a", 1), ("b", 26379), ("::1", 3)}
    assert (finder.options["username"], finder.options["password"]) == ("su", "sp"), "Sentinel has its own users"
    assert "db" not in finder.options


def test_a_clusters_url() -> None:
    place = place_of("rediss+cluster://:p@a:1,b?ssl_ca_certs=/ca", "rsm")
    assert (place.scheme, place.options) == ("rediss", {"password": "p", "ssl_ca_certs": "/ca"})
    finder = place.finder
    assert finder is not None
    assert set(finder.seeds()) == {("a", 1), ("b", 6379)}
    assert finder.options["password"] == "p", "the nodes know the same users"
    assert finder.options["ssl_ca_certs"] == "/ca"


def test_seeds_take_turns_in_being_asked_first() -> None:
    finder = place_of("redis+cluster://a,b,c", "rsm").finder
    assert finder is not None
    assert {finder.seeds()[0][0] for _ in range(3)} == {"a", "b", "c"}


@pytest.mark.parametrize(
    "url",
    [
        "http://:hidden@h",
        "h:6379",
        "redis+sentinel://:hidden@h:26379",  # no master
        "redis+sentinel://:hidden@/main",  # no seed
        "redis+sentinel://:hidden@h/main/x",
        "redis+sentinel://:hidden@h/main/1/2",
        "redis+sentinel://:hidden@h:port/main",
        "redis+cluster://:hidden@h/1",  # a cluster has one database
        "redis+cluster://:hidden@h,/",
        "unix+cluster://:hidden@/x",
        "redis+moon://:hidden@h",
    ],
)
async def test_the_error_for_a_bad_url_hides_its_password(url: str) -> None:
    settings = Settings().with_redis(url)
    for use in (connect, connect_async, DedicatedConnection):
        with pytest.raises(InvalidRequest, match=r"redis\+cluster://") as e:
            use(settings)
        assert "hidden" not in str(e.value)


_NODE = [b"10.0.0.1", 7, b"id", []]
_ROWS = [[0, 99, _NODE, [b"10.0.0.9", 7, b"id", []]], [100, 16383, [b"10.0.0.2", 8, b"id"]]]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (_ROWS, ("10.0.0.2", 8)),
        ([[0, 16383, [b"", 7, b"id"]]], ("asked", 7)),  # the node does not know its own name
        ([[0, 16383, [None, 7, b"id"]]], ("asked", 7)),
        ([[0, 16383, [b"?", 7, b"id"]]], None),  # a node with an unknown name
        (_ROWS[:1], None),  # no node serves the slot
        ([], None),
    ],
)
def test_the_owner_of_the_slot(rows: list[Any], found: Address | None) -> None:
    finder = place_of("redis+cluster://asked", "rsm").finder  # the slot of {rsm} is 14868
    assert finder is not None
    assert finder.read(rows, ("asked", 6379)) == found


# -- real servers


@pytest.fixture(scope="module")
def sentinel() -> Iterator[UnderSentinel]:
    with UnderSentinel() as running:
        yield running


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as running:
        yield running


def test_every_namespace_is_found_on_its_own_master(cluster: Cluster) -> None:
    ports = set()
    for name in ("a", "b", "c", "d", "e", "f"):
        with connect(Settings(namespace=name).with_redis(cluster.url)) as server:
            server.set(f"{{{name}}}:here", "1")
            ports.add(server.connection_pool.get_connection().port)
    assert ports == {n.port for n in cluster.nodes}


async def _survives_the_loss_of_seeds(url: str, dead: str) -> None:
    head, _, tail = url.partition("://")
    settings = Settings().with_redis(f"{head}://{dead},{tail}")
    for _ in range(2):  # the dead seed is asked first one of these times
        with connect(settings) as server:
            assert server.time()
        async with connect_async(settings) as aio:
            assert await aio.time()


@pytest.mark.parametrize("dead", ["closed", "unknown.invalid"], ids=["closed port", "no such host"])
async def test_one_seed_that_answers_is_enough(sentinel: UnderSentinel, cluster: Cluster, dead: str) -> None:
    dead = f"127.0.0.1:{free_port()}" if dead == "closed" else dead
    await _survives_the_loss_of_seeds(sentinel.url, dead)
    await _survives_the_loss_of_seeds(cluster.url, dead)


async def test_an_unknown_master_is_retried(sentinel: UnderSentinel, cluster: Cluster) -> None:
    """A Sentinel that does not know the master yet, a node without cluster mode, a host that is not in DNS yet."""
    lone = sentinel.master("").port
    urls = [
        sentinel.url.replace("/primary", "/other"),
        f"redis+cluster://127.0.0.1:{lone}",
        "redis+cluster://x.invalid",
    ]
    for url in urls:
        settings = Settings().with_redis(url)
        with pytest.raises(OUTAGES, match="No master found"):
            connect(settings).time()
        with pytest.raises(OUTAGES, match="No master found"):
            DedicatedConnection(settings).execute_command("TIME")
        async with connect_async(settings) as aio:
            with pytest.raises(OUTAGES, match="No master found"):
                await aio.time()
    with (
        pytest.raises(BrokerUnavailable, match="cluster support disabled"),
        Client(urls[1], redis_timeout=0.1) as client,
    ):
        client.record("c")
    async with AsyncClient(urls[1], redis_timeout=0.1) as client:
        with pytest.raises(BrokerUnavailable, match="cluster support disabled"):
            await client.record("c")


async def test_a_wrong_password_is_reported_as_such(cluster: Cluster) -> None:
    settings = Settings().with_redis(cluster.url.replace("://", "://nobody:wrong@"))
    with connect(settings) as server, pytest.raises(AuthenticationError):
        server.time()
    async with connect_async(settings) as aio:
        with pytest.raises(AuthenticationError):
            await aio.time()


def test_a_plain_url_of_a_cluster_says_what_is_wrong(cluster: Cluster) -> None:
    wrong = next(n for n in cluster.nodes if n is not cluster.master("rsm"))
    with (
        pytest.raises(BrokerUnavailable, match="Moved"),
        Client(f"redis://127.0.0.1:{wrong.port}", redis_timeout=0.1) as c,
    ):
        c.record("c")


def test_a_node_that_is_wrongly_named_master_is_not_used(sentinel: UnderSentinel) -> None:
    settings = Settings().with_redis(sentinel.url)
    replica = next(n for n in sentinel.nodes if n.info("server").get("redis_mode") != "sentinel" and n.replicates())
    with connect(settings) as server:
        link: Any = server.connection_pool.make_connection()
        link._find = lambda: ("127.0.0.1", replica.port)
        with pytest.raises(Refused, match=r"has the role (replica|slave)"):
            link.connect()
        assert not link.is_connected


def test_a_slot_that_moves_is_followed(cluster: Cluster) -> None:
    settings = Settings(namespace="mover").with_redis(cluster.url)
    line, key = DedicatedConnection(settings), "{mover}:k"
    old = cluster.master("mover")
    new = next(n for n in cluster.nodes if n is not old)
    assert line.execute_command("SET", key, "1") == b"OK"
    slot = line.execute_command("CLUSTER", "KEYSLOT", key)
    old_id, new_id = old.ask("CLUSTER", "MYID"), new.ask("CLUSTER", "MYID")
    new.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", old_id)
    old.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", new_id)
    old.ask("MIGRATE", "127.0.0.1", new.port, key, 0, 1000)
    with pytest.raises(Refused, match="Ask"):
        line.execute_command("GET", key)
    for node in (new, old, *cluster.nodes):
        node.ask("CLUSTER", "SETSLOT", slot, "NODE", new_id)
    assert persist(lambda: line.execute_command("GET", key), "test", lambda: False, 10) == b"1"
    assert line._connection.port == new.port
    line.close()


def test_a_peer_that_vanishes_silently_is_detected_soon(cluster: Cluster) -> None:
    with connect(Settings().with_redis(cluster.url), block_s=600) as server:
        server.time()
        sock = server.connection_pool.get_connection()._sock
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 10_000
        probes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        seconds = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) * probes
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) + seconds <= 10


@pytest.mark.parametrize(("kind", "shown"), [("sentinel", "1 replica"), ("cluster", "0 replicas")])
def test_doctor_knows_them(request: pytest.FixtureRequest, kind: str, shown: str) -> None:
    settings = Settings(namespace=f"t{kind}").with_redis(request.getfixturevalue(kind).url)
    found = {check.name: check for check in examine(settings)}
    assert (found["redis"].status, found["replication"].status) == ("ok", "ok")
    assert shown in found["replication"].detail
    greedy = {check.name: check for check in examine(settings.model_copy(update={"wait_replicas": 2}))}
    assert greedy["replication"].status == "problem"
    assert "RSM_WAIT_REPLICAS" in greedy["replication"].advice


def test_rq_says_that_it_is_not_for_a_cluster(cluster: Cluster) -> None:
    settings = Settings().with_redis(cluster.url)
    for ask in (lambda: run_node("here", settings), lambda: NodeClient("here", settings).drain_engine("e1")):
        with pytest.raises(InvalidRequest, match="does not run on a Redis Cluster"):
            ask()
