"""The embedded server: only its owner can reach it, processes with the same folder share it, and its data persists."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from rsm.broker import BrokerUnavailable
from rsm.broker.connection.embedded import EmbeddedRedis

NOBODY = 65534
_CONNECT = """
import os, socket, sys
path, uid = sys.argv[1], int(sys.argv[2])
if uid:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
try:
    socket.socket(socket.AF_UNIX).connect(path)
except OSError as e:
    print(type(e).__name__)
else:
    print("connected")
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rsm-embedded-") as name:
        yield Path(name) / "state"


def test_only_its_owner_can_reach_it(folder: Path) -> None:
    with EmbeddedRedis(folder) as server, redis.Redis.from_url(server.url) as client:
        assert folder.stat().st_mode & 0o077 == 0
        assert server.socket.stat().st_mode & 0o077 == 0
        assert client.config_get("port") == {"port": "0"}


def test_it_listens_only_on_its_socket(folder: Path) -> None:
    with EmbeddedRedis(folder) as server:
        assert server.pid is not None
        found = psutil.Process(server.pid).net_connections(kind="inet")
        assert found == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_connect() -> None:
    with tempfile.TemporaryDirectory(prefix="rsm-embedded-") as name:
        Path(name).chmod(0o755)  # so that only the server's own folder keeps others out
        with EmbeddedRedis(Path(name) / "state") as server:
            assert [connects(server.socket, uid) for uid in (0, NOBODY)] == ["connected", "PermissionError"]
            server.folder.chmod(0o755)  # the socket still has its own mode
            assert connects(server.socket, NOBODY) == "PermissionError"


def connects(path: Path, uid: int) -> str:
    """The outcome of another user's attempt to connect."""
    done = subprocess.run(
        [sys.executable, "-c", _CONNECT, str(path), str(uid)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(BrokerUnavailable, match="is not a folder of this user"):
        EmbeddedRedis(folder).start()
    assert list(folder.iterdir()) == []


def test_a_link_is_refused(folder: Path) -> None:
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    with pytest.raises(BrokerUnavailable, match="is not a folder of this user"):
        EmbeddedRedis(folder).start()
    assert list(elsewhere.iterdir()) == []


def test_a_folder_that_others_may_have_written_to_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "redis.sock").touch()
    with pytest.raises(BrokerUnavailable, match="Other users can write"):
        EmbeddedRedis(folder).start()


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


def test_a_second_server_of_the_same_folder_shares_it_and_does_not_stop_it(folder: Path) -> None:
    with EmbeddedRedis(folder) as first:
        with EmbeddedRedis(folder) as second:
            assert second.pid is None
        with redis.Redis.from_url(first.url) as client:
            assert client.ping()


def test_a_path_too_long_for_a_socket_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable, match=r"too long for a unix socket\. Set RSM_DATA_DIR"):
        EmbeddedRedis(tmp_path / ("x" * 100)).start()
