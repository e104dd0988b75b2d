"""The proxies of the chaos suite: each fault of a line does what its name says, and nothing else."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest
import redis

from chaos.proxy import Lines
from rsm.broker import Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.factory import connect
from tests.support.waiting import eventually


@pytest.fixture
def lines(server: EmbeddedRedis) -> Iterator[Lines]:
    opened = Lines(server.socket)
    yield opened
    opened.close()


@pytest.fixture
def line(lines: Lines, settings: Settings) -> Iterator[tuple[Lines, redis.Redis]]:
    proxy = lines.open("test")
    through = connect(settings.with_redis(proxy.url))
    through.proxy = proxy  # type: ignore[attr-defined]
    yield lines, through
    through.close()


def test_a_line_without_faults_passes_everything(line: tuple[Lines, redis.Redis], db: redis.Redis) -> None:
    _, through = line
    big = random.Random(1).randbytes(1 << 20)
    through.set("chaos-x", big, ex=60)
    assert through.get("chaos-x") == big == db.get("chaos-x")


def test_a_command_runs_although_its_reply_is_dropped(line: tuple[Lines, redis.Redis], db: redis.Redis) -> None:
    lines, through = line
    through.ping()
    lines.do(lambda: setattr(through.proxy, "swallow", 1))  # type: ignore[attr-defined]
    with pytest.raises(redis.ConnectionError):
        through.set("chaos-y", "1", ex=60)
    assert db.get("chaos-y") == b"1"
    assert through.get("chaos-y") == b"1", "more than one reply was dropped"


def test_a_torn_request_does_not_run(line: tuple[Lines, redis.Redis], db: redis.Redis) -> None:
    lines, through = line
    through.ping()
    lines.do(lambda: setattr(through.proxy, "tear", 1))  # type: ignore[attr-defined]
    with pytest.raises(redis.ConnectionError):
        through.set("chaos-z", "1", ex=60)
    assert db.get("chaos-z") is None


def test_a_late_request_runs_although_its_connection_has_ended(
    line: tuple[Lines, redis.Redis], db: redis.Redis
) -> None:
    lines, through = line
    through.ping()
    lines.do(lambda: setattr(through.proxy, "late", [0.3]))  # type: ignore[attr-defined]
    with pytest.raises(redis.ConnectionError):
        through.set("chaos-l", "1", ex=60)
    assert db.get("chaos-l") is None
    through.set("chaos-l", "2", ex=60)
    eventually(lambda: db.get("chaos-l") == b"1", what="the first request, after the second")


def test_a_stalled_line_delivers_late(line: tuple[Lines, redis.Redis]) -> None:
    lines, through = line
    through.ping()
    lines.do(through.proxy.stall)  # type: ignore[attr-defined]
    began = time.monotonic()
    heal = threading.Timer(0.5, lambda: lines.do(through.proxy.restore))  # type: ignore[attr-defined]
    heal.start()
    through.ping()
    assert time.monotonic() - began >= 0.5
    heal.join()
