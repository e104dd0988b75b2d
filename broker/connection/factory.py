"""Connections to Redis, without the client defaults that harm a queue.

By default, redis-py retries every command, so it pushes twice when a reply is lost. Its socket timeout of 5 s cuts
blocking reads short. From version 8.0 on it speaks RESP3. Here the callers retry (every command that they send can be
repeated), a blocking read gets its own client, and the protocol version is pinned.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.client import Pipeline

from rsm.broker.connection.failover import ASYNC_LINKS, LINKS
from rsm.broker.connection.retry import explained
from rsm.broker.connection.topology import place_of
from rsm.broker.settings import Settings

T = TypeVar("T")
log = logging.getLogger("rsm.redis")


COMMAND_TIMEOUT_S = 10.0


def connect(settings: Settings, block_s: float | None = None) -> redis.Redis:
    """A client for ordinary commands or, with `block_s`, for reads that block for up to this many seconds.

    Raises:
        InvalidRequest: the Redis URL has none of the known forms.
    """
    from redis.connection import ConnectionPool
    from redis.retry import Retry

    options = _options(settings, block_s, LINKS)
    return redis.Redis.from_pool(ConnectionPool(**options, retry=Retry(NoBackoff(), 0)))


class _View(redis.Redis):
    """Raises errors that name the server and say what to do, in place of redis-py's, when Redis is unreachable."""

    settings: Settings

    def execute_command(self, *args: Any, **options: Any) -> Any:
        with explained(self.settings):
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Any:
        made = _ViewPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        made.settings = self.settings
        return made


class _ViewPipeline(Pipeline):
    settings: Settings

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        with explained(self.settings):
            found: list[Any] = super().execute(raise_on_error)
            return found


def connect_view(settings: Settings) -> redis.Redis:
    """A client for interactive use: raises BrokerUnavailable at once if Redis is unreachable or rejects the user."""
    view: Any = _View.from_pool(connect(settings).connection_pool)
    view.settings = settings
    return cast(redis.Redis, view)


def connect_patiently(settings: Settings) -> redis.Redis:
    """A client for a library that sets its own blocking times and gives up at the first error.

    It retries for about 20 seconds, so a command whose reply was lost may run twice.
    """
    from redis.backoff import ExponentialBackoff
    from redis.connection import ConnectionPool
    from redis.retry import Retry

    options = _options(settings, None, LINKS)
    return redis.Redis.from_pool(ConnectionPool(**options, retry=Retry(ExponentialBackoff(cap=2.0, base=0.05), 15)))


def connect_async(settings: Settings, block_s: float | None = None) -> redis.asyncio.Redis:
    """Like `connect`, for asyncio."""
    from redis.asyncio.connection import ConnectionPool
    from redis.asyncio.retry import Retry

    options = _options(settings, block_s, ASYNC_LINKS)
    return redis.asyncio.Redis.from_pool(ConnectionPool(**options, retry=Retry(NoBackoff(), 0)))


def _options(settings: Settings, block_s: float | None, links: Mapping[tuple[str, bool], type]) -> dict[str, Any]:
    place = place_of(settings.url(), settings.namespace)
    options: dict[str, Any] = {
        "connection_class": links[place.scheme, place.finder is not None],
        "protocol": 2,
        "socket_timeout": COMMAND_TIMEOUT_S + (block_s or 0.0),
        "socket_connect_timeout": COMMAND_TIMEOUT_S,
    }
    if place.scheme != "unix":
        options |= {"socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE}
    if place.finder is not None:
        options["finder"] = place.finder
    return options | place.options


def _keepalive() -> dict[int, int]:
    """TCP options that detect a vanished peer (host power loss, firewall timeout) in about six seconds, even during a
    blocking read. Some systems lack some of them."""
    wanted = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 6_000}
    return {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}


_KEEPALIVE = _keepalive()
