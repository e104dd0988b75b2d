"""Refuses a Redis that deletes keys when its memory is full: accepted calls, or their results, would vanish."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import redis
from redis.exceptions import ResponseError

from rsm.broker.connection.factory import connect
from rsm.broker.connection.failover import Denied
from rsm.broker.errors import EvictingRedis
from rsm.broker.protocol.codec import text
from rsm.broker.settings import Settings

log = logging.getLogger("rsm.redis")

SAFE = "noeviction"


def eviction_policy(server: redis.Redis) -> str:
    """The server's maxmemory-policy, "" if it does not say.

    INFO is asked first, for CONFIG is what managed services and careful access lists forbid.
    """
    return _answer(lambda: _from_info(server)) or _answer(lambda: _from_config(server))


def require_noeviction(server: redis.Redis) -> None:
    """Refuses an evicting policy also while no `maxmemory` is set: one CONFIG SET later it would cost calls.

    Raises:
        EvictingRedis: the policy is not `noeviction`. One that is not known is a warning in the log.
    """
    policy = eviction_policy(server)
    if not policy:
        log.warning("Redis does not say its maxmemory-policy; it must be %s, or accepted calls may vanish", SAFE)
    elif policy != SAFE:
        raise EvictingRedis(
            f"Redis has maxmemory-policy {policy}, which deletes calls and results when memory is full. "
            f"Set it to {SAFE}: `redis-cli CONFIG SET maxmemory-policy {SAFE}`, and in its configuration."
        )


def require_noeviction_at(settings: Settings) -> None:
    """The same for the server of these settings. Raises EvictingRedis, or a redis.ConnectionError."""
    server = connect(settings)
    try:
        require_noeviction(server)
    finally:
        server.close()


def _answer(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except (ResponseError, Denied):  # unknown there, or forbidden
        return ""


def _from_info(server: Any) -> str:
    return str(server.info("memory").get("maxmemory_policy", ""))


def _from_config(server: Any) -> str:
    # Not config_get: a service that hides CONFIG answers in forms that redis-py's parser does not take.
    reply = server.execute_command("CONFIG GET", "maxmemory-policy")
    if isinstance(reply, dict):
        return str(reply.get("maxmemory-policy", ""))
    return text(reply[1]) if reply and len(reply) == 2 else ""
