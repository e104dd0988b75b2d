"""Rejects a Redis that evicts keys when its memory is full, because accepted calls or results would vanish."""

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
    """The server's maxmemory-policy; "" if it does not report one.

    Tries INFO first, because managed services and strict ACLs forbid CONFIG.
    """
    return _answer(lambda: _from_info(server)) or _answer(lambda: _from_config(server))


def require_noeviction(server: redis.Redis) -> None:
    """Rejects an evicting policy. It does so even if no `maxmemory` is set, because a CONFIG SET could set one later.

    If the policy is unknown, logs a warning.

    Raises:
        EvictingRedis: the policy is not `noeviction`.
    """
    policy = eviction_policy(server)
    if not policy:
        log.warning("Redis does not report its maxmemory-policy; make sure that it is %s, or calls may be lost", SAFE)
    elif policy != SAFE:
        raise EvictingRedis(
            f"Redis has maxmemory-policy {policy}, which evicts calls and results when memory is full. "
            f"Set it to {SAFE}, with `redis-cli CONFIG SET maxmemory-policy {SAFE}` and in its configuration file."
        )


def require_noeviction_at(settings: Settings) -> None:
    """Like `require_noeviction`, for the server of these settings. Also raises redis.ConnectionError."""
    server = connect(settings)
    try:
        require_noeviction(server)
    finally:
        server.close()


def _answer(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except (ResponseError, Denied):  # an unknown command, or a forbidden one
        return ""


def _from_info(server: Any) -> str:
    return str(server.info("memory").get("maxmemory_policy", ""))


def _from_config(server: Any) -> str:
    # Not config_get: services that hide CONFIG reply in formats that redis-py's parser does not accept.
    reply = server.execute_command("CONFIG GET", "maxmemory-policy")
    if isinstance(reply, dict):
        return str(reply.get("maxmemory-policy", ""))
    return text(reply[1]) if reply and len(reply) == 2 else ""
