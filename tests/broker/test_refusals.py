"""A Redis that answers but cannot serve: commands are retried, whichever way they are sent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from rsm.broker import AsyncClient, Client, Settings
from rsm.broker.connection.dedicated import DedicatedConnection
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.factory import connect, connect_async
from rsm.broker.connection.failover import Denied, Refused, refusal
from rsm.broker.connection.retry import OUTAGES, require_access
from rsm.broker.errors import AccessDenied
from rsm.broker.protocol.ids import new_id
from rsm.router.router import Router
from tests.support.waiting import eventually

_parse: Any = redis.connection.DefaultParser.parse_error  # how redis-py parses an error reply


@pytest.mark.parametrize(
    "said",
    [
        "MISCONF Errors writing to the AOF file: No space left on device",
        "MISCONF Valkey is configured to save RDB snapshots. script: 1234, on @user_script:1.",
        "NOREPLICAS Not enough good replicas to write. script: on @user_script:1.",
        "READONLY You can't write against a read only replica.",
        "MOVED 3999 127.0.0.1:6381",
        "MOVED 3999 :6381",
        "ASK 3999 127.0.0.1:6381",
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "CLUSTERDOWN The cluster is down",
        "CLUSTERDOWN Hash slot not served",
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
        "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
    ],
)
def test_a_temporary_refusal_is_retried(said: str) -> None:
    assert isinstance(refusal(_parse(said)), OUTAGES)


@pytest.mark.parametrize(
    "said",
    [
        "ERR unknown command 'NONSENSE'",
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "BUSYGROUP Consumer Group name already exists",
        "NOGROUP No such key '{t}:calls' or consumer group 'router' in XREADGROUP",
        "UNBLOCKED the stream key no longer exists",
        "NOSCRIPT No matching script. Please use EVAL.",
        "CROSSSLOT Keys in request don't hash to the same slot",
    ],
)
def test_other_errors_are_not_retried(said: str) -> None:
    assert refusal(_parse(said)) is None


@pytest.mark.parametrize(
    "said",
    [
        "NOPERM this user has no permissions to run the 'config' command",
        "ERR ACL failure in script: User u has no permissions to run the 'hset' command script: on @user_script:1.",
    ],
)
def test_a_denied_user_is_retried(said: str) -> None:
    denied = refusal(_parse(said))
    assert isinstance(denied, Denied)
    assert isinstance(denied, OUTAGES)
    with pytest.raises(AccessDenied, match="no permissions"):
        require_access(denied)


@pytest.fixture(scope="module")
def own_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as running:
        yield running


@pytest.fixture
def own_settings(own_server: EmbeddedRedis) -> Settings:
    return Settings(namespace=f"t{new_id()}", lease_ms=1500, tick_ms=50).with_redis(own_server.url)


class Misconf:
    """A server whose disk fails: it cannot rename its snapshot to its final name, so it refuses every write."""

    def __init__(self, server: EmbeddedRedis) -> None:
        self._obstacle: Path = server.folder / "dump.rdb"
        self._redis: Any = redis.Redis(unix_socket_path=str(server.socket), protocol=2)

    def __enter__(self) -> None:
        self._obstacle.unlink(missing_ok=True)
        self._obstacle.mkdir()
        self._redis.config_set("save", "3600 1")
        self._snapshot("err")

    def __exit__(self, *_: object) -> None:
        self._obstacle.rmdir()
        self._snapshot("ok")
        self._redis.config_set("save", "")
        self._redis.close()

    def _snapshot(self, status: str) -> None:
        self._redis.bgsave()
        eventually(lambda: self._redis.info("persistence")["rdb_last_bgsave_status"] == status)


_WRITE = ("SET", "{t}:a", "1")
_SCRIPT = ("EVAL", "return redis.call('SET', KEYS[1], 1)", 1, "{t}:a")


def _piped(client: Any, command: tuple[Any, ...]) -> Any:
    pipe = client.pipeline(transaction=False)
    pipe.execute_command("ECHO", "1")
    pipe.execute_command(*command)
    return pipe


@pytest.mark.parametrize("command", [_WRITE, _SCRIPT], ids=["command", "script"])
async def test_a_refused_write_is_a_lost_connection_on_every_path(
    own_server: EmbeddedRedis, own_settings: Settings, command: tuple[Any, ...]
) -> None:
    line = DedicatedConnection(own_settings)
    client: Any = connect(own_settings)
    with client, Misconf(own_server):
        with pytest.raises(Refused, match="MISCONF"):
            client.execute_command(*command)
        with pytest.raises(Refused):
            _piped(client, command).execute()
        with pytest.raises(Refused):
            _piped(client, command).execute(raise_on_error=False)
        with pytest.raises(Refused):
            line.exchange([("ECHO", "1"), command, ("ECHO", "2")])
        assert line.execute_command("ECHO", "3") == b"3", "no reply of the refused batch is left"
        aio: Any = connect_async(own_settings)
        async with aio:
            with pytest.raises(Refused):
                await aio.execute_command(*command)
            with pytest.raises(Refused):
                await _piped(aio, command).execute(raise_on_error=False)
            assert await aio.echo("3") == b"3"
    assert line.execute_command(*command) in (b"OK", True)
    line.close()


async def test_calls_wait_while_redis_cannot_write(own_server: EmbeddedRedis, own_settings: Settings) -> None:
    router = Router(own_settings)
    serving = threading.Thread(target=router.run)
    with Client(settings=own_settings) as client, connect(own_settings) as db:
        serving.start()
        placed = client.submit("before")
        eventually(lambda: db.xlen(client.keys.calls) == 0)
        async with AsyncClient(settings=own_settings) as aio:
            with Misconf(own_server):
                first = asyncio.create_task(asyncio.to_thread(client.submit, "during"))
                second = asyncio.create_task(aio.submit("during"))
                await asyncio.sleep(0.5)
                assert not first.done()
                assert not second.done()
                assert serving.is_alive(), "a full disk must not end the router"
            ids = [placed.id, (await first).id, (await second).id]
        eventually(lambda: db.xlen(client.keys.calls) == 0, what="the router continues")
        assert {client.record(i).state for i in ids} == {"PENDING"}
        router.stop()
        serving.join(10)
        assert not serving.is_alive()
