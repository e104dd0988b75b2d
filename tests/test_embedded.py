"""The embedded server: its owner's alone, shared by who names its folder, and it keeps what it was told."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from broker import BrokerUnavailable
from broker.embedded import EmbeddedRedis


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rsm-embedded-") as name:
        yield Path(name) / "state"


def test_it_is_reachable_by_its_owner_alone(folder: Path) -> None:
    with EmbeddedRedis(folder) as server, redis.Redis.from_url(server.url) as client:
        assert folder.stat().st_mode & 0o077 == 0
        assert server.socket.stat().st_mode & 0o077 == 0
        assert client.config_get("port") == {"port": "0"}


def test_a_folder_that_was_open_to_others_is_closed(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    with EmbeddedRedis(folder):
        assert folder.stat().st_mode & 0o077 == 0


def test_it_never_evicts_and_survives_a_kill(folder: Path) -> None:
    with EmbeddedRedis(folder) as server:
        with redis.Redis.from_url(server.url) as client:
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            client.config_set("appendfsync", "always")
            client.set("kept", "yes")
        server.kill()
        with redis.Redis.from_url(server.start()) as client:
            assert client.get("kept") == b"yes"


def test_a_second_one_of_the_same_folder_shares_it_and_does_not_stop_it(folder: Path) -> None:
    with EmbeddedRedis(folder) as first:
        with EmbeddedRedis(folder) as second:
            assert second.pid is None
        with redis.Redis.from_url(first.url) as client:
            assert client.ping()


def test_a_path_too_long_for_a_socket_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable, match="too long for a unix socket; set RSM_DATA_DIR"):
        EmbeddedRedis(tmp_path / ("x" * 100)).start()
