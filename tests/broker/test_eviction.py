"""A Redis that evicts keys when it is full: every process rejects it, on a real server with such a policy."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from rsm.broker import EvictingRedis, Settings
from rsm.broker.connection.embedded import EmbeddedRedis
from rsm.broker.connection.eviction import eviction_policy, require_noeviction
from rsm.broker.connection.factory import connect
from rsm.cli.checks import examine
from rsm.engine.fleet import Fleet
from rsm.engine.manager import MultiEngineManager
from rsm.router.router import Router
from rsm.workers.config import EngineConfig
from rsm.workers.environment import CONFIG_VARIABLE
from rsm.workers.supervision.node import run_node
from tests.support.rsm_command import RSM, clean_env

SIM = EngineConfig(engine_id="e1", backend="sim")


@pytest.fixture(scope="module")
def evicting() -> Iterator[Settings]:
    """The settings of a dedicated server that evicts; `maxmemory` is not set."""
    with EmbeddedRedis() as server:
        settings = Settings().with_redis(server.url)
        with connect(settings) as db:
            db.config_set("maxmemory-policy", "allkeys-lru")
        yield settings


def run(evicting: Settings, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = clean_env() | evicting.environment() | env
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-P", "-m", "rsm.router"],
        [sys.executable, "-P", "-m", "rsm.workers"],
        [RSM, "router"],
        [RSM, "worker", "--engine-id", "e1", "--backend", "sim"],
        [RSM, "worker", "--engine-id", "e1", "--backend", "sim", "--supervised"],
        [RSM, "node"],
        [RSM, "up", "--backend", "sim"],
    ],
    ids=lambda command: " ".join(command[1:4]),
)
def test_a_process_ends_with_the_status_of_a_wrong_configuration(evicting: Settings, command: list[str]) -> None:
    done = run(evicting, *command, **{CONFIG_VARIABLE: SIM.model_dump_json()})
    assert done.returncode == os.EX_CONFIG == 78, done.stderr
    assert "allkeys-lru" in done.stderr
    assert "CONFIG SET maxmemory-policy noeviction" in " ".join(done.stderr.split())


def test_in_a_program_it_is_an_error(evicting: Settings) -> None:
    with pytest.raises(EvictingRedis, match="allkeys-lru"):
        Router(evicting).run()
    with pytest.raises(EvictingRedis):
        Fleet(evicting).start([SIM])
    with pytest.raises(EvictingRedis):
        MultiEngineManager([SIM], settings=evicting).start()
    with pytest.raises(EvictingRedis):
        run_node("here", evicting)


def test_the_doctor_calls_it_a_problem(evicting: Settings) -> None:
    memory = next(check for check in examine(evicting) if check.name == "memory")
    assert (memory.status, "noeviction" in memory.advice) == ("problem", True)


@pytest.fixture
def db(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    with connect(Settings().with_redis(server.url)) as client:
        yield client


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-lru", "volatile-ttl", "allkeys-random"])
def test_every_other_policy_is_refused(evicting: Settings, policy: str) -> None:
    with connect(evicting) as db:
        db.config_set("maxmemory-policy", policy)
        with pytest.raises(EvictingRedis, match=policy):
            require_noeviction(db)
        db.config_set("maxmemory-policy", "allkeys-lru")


def user(db: Any, *rules: str) -> None:
    db.execute_command("ACL", "SETUSER", "narrow", "reset", "on", "nopass", "~*", "+@all", *rules)


@pytest.fixture
def narrow(db: redis.Redis, server: EmbeddedRedis) -> Iterator[redis.Redis]:
    """A client of a user whose permissions a test takes away."""
    user(db)
    with connect(Settings().with_redis(f"{server.url}?username=narrow&password=any")) as client:
        yield client
    db.acl_deluser("narrow")


def test_it_needs_no_permission_for_config(db: redis.Redis, narrow: redis.Redis) -> None:
    user(db, "-config")
    assert eviction_policy(narrow) == "noeviction"


def test_it_uses_config_if_info_is_forbidden(db: redis.Redis, narrow: redis.Redis) -> None:
    user(db, "-info")
    assert eviction_policy(narrow) == "noeviction"


def test_an_unknown_policy_is_a_warning(db: redis.Redis, narrow: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    user(db, "-info", "-config")
    with caplog.at_level(logging.WARNING):
        require_noeviction(narrow)
    assert "maxmemory-policy" in caplog.text
