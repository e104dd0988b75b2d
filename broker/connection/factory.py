"""Connections to Redis, without the client defaults that bite a queue.

redis-py retries every command by default, and so pushes twice when a reply is lost; its socket timeout of 5 s cuts
blocking reads short; and from 8.0 on it speaks RESP3. Here retries are ours (every command we send may be repeated),
a blocking read gets a client of its own, and the protocol is pinned.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import redis
import redis.asyncio
from redis import exceptions as errors
from redis.backoff import NoBackoff

from rsm.broker.connection.failover import ASYNC_LINKS, LINKS, Denied, Refused
from rsm.broker.connection.topology import place_of
from rsm.broker.errors import AccessDenied, BrokerUnavailable
from rsm.broker.settings import Settings

T = TypeVar("T")
log = logging.getLogger("rsm.redis")

# What a restart, a fail-over, a cut line or a full server looks like from here; anything else is an error of ours.
# Refusals that pass, such as MISCONF, MOVED or NOREPLICAS, are made ConnectionErrors by `failover.py`.
BLIPS = (
    errors.ConnectionError,
    errors.TimeoutError,
    errors.BusyLoadingError,
    errors.ReadOnlyError,
    errors.OutOfMemoryError,
)

# A user that is refused. Among the blips, for passwords and rights are changed while parts run.
_DENIED = (errors.AuthenticationError, errors.AuthorizationError, Denied)

COMMAND_TIMEOUT_S = 10.0


def connect(settings: Settings, block_s: float | None = None) -> redis.Redis:
    """A client for ordinary commands, or, with `block_s`, one for reads that block up to so many seconds.

    Raises:
        InvalidRequest: the Redis URL has none of the known forms.
    """
    from redis.connection import ConnectionPool
    from redis.retry import Retry

    options = _options(settings, block_s, LINKS)
    return redis.Redis.from_pool(ConnectionPool(**options, retry=Retry(NoBackoff(), 0)))


def connect_patiently(settings: Settings) -> redis.Redis:
    """A client for a library that blocks as it likes and gives up at the first error: it tries again by itself, for
    about 20 seconds, so a command whose reply was lost may run twice."""
    from redis.backoff import ExponentialBackoff
    from redis.connection import ConnectionPool
    from redis.retry import Retry

    options = _options(settings, None, LINKS)
    return redis.Redis.from_pool(ConnectionPool(**options, retry=Retry(ExponentialBackoff(cap=2.0, base=0.05), 15)))


def connect_async(settings: Settings, block_s: float | None = None) -> redis.asyncio.Redis:
    """The same for asyncio."""
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
    """TCP options by which a peer that vanished without a word (its host lost power, a firewall forgot the line) is
    noticed in about six seconds, also by a read that waits; not every system has all of them."""
    wanted = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 6_000}
    return {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}


_KEEPALIVE = _keepalive()


def reason(error: Exception) -> str:
    """Why Redis does not serve, in words fit for a log: a refusal's text quotes no data of ours."""
    return str(error) if isinstance(error, Refused) else type(error).__name__


class Backoff:
    """Pauses between tries: 20 ms, doubling, at most one second. Logs the first failure of a row and the recovery."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._tries = 0

    def pause(self, error: Exception) -> float:
        """The seconds to wait before the next try."""
        self._tries += 1
        if self._tries == 1:
            log.warning("%s: Redis is not reachable (%s); trying again until it is", self._what, reason(error))
        return float(min(1.0, 0.02 * 2 ** min(self._tries, 6)))

    def recovered(self) -> bool:
        """Notes a success; True if it ended a row of failures."""
        if not self._tries:
            return False
        log.warning("%s: Redis is back after %d tries", self._what, self._tries)
        self._tries = 0
        return True


def no_answer(within_s: float, error: Exception) -> BrokerUnavailable:
    """The error for whoever has no more patience after so many seconds."""
    return BrokerUnavailable(
        f"Redis did not answer for {within_s:g} s ({reason(error)}). Check RSM_REDIS_URL; `rsm doctor` helps."
    )


def require_access(error: Exception) -> None:
    """For whoever should not try again for ever with a password that is wrong.

    Raises:
        AccessDenied: the error is Redis's refusal of this user.
    """
    # redis-py's asyncio client wraps what goes wrong while it connects.
    error = error.__cause__ if isinstance(error.__cause__, _DENIED) else error
    if isinstance(error, Denied):
        raise AccessDenied(
            f"Redis does not let this user do its part: {error}. Give it the rights of its role; `rsm acl` prints them."
        ) from None
    if isinstance(error, _DENIED):
        raise AccessDenied(
            "Redis refuses this user or its password (in RSM_REDIS_URL, or --redis); `rsm acl` makes users."
        ) from None


def persist(
    action: Callable[[], T],
    what: str,
    stopped: Callable[[], bool],
    timeout_s: float | None = None,
    *,
    denial_is_final: bool = False,
) -> T | None:
    """Repeats `action` until Redis answers, for a blip is not a death. None if `stopped()` came true meanwhile.

    Raises:
        AccessDenied: `denial_is_final`, and Redis refuses this user.
        redis.ConnectionError or its kin: `timeout_s` seconds have passed.
    """
    backoff = Backoff(what)
    until = None if timeout_s is None else time.monotonic() + timeout_s
    while not stopped():
        try:
            result = action()
        except BLIPS as e:
            if denial_is_final:
                require_access(e)
            if until is not None and time.monotonic() > until:
                raise
            time.sleep(backoff.pause(e))
        else:
            backoff.recovered()
            return result
    return None
