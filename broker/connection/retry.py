"""Retries: which errors are temporary, how long to pause, and when to give up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from redis import exceptions as errors

from rsm.broker.connection.failover import Denied, Refused
from rsm.broker.connection.topology import shown_url
from rsm.broker.errors import AccessDenied, BrokerUnavailable
from rsm.broker.settings import Settings

T = TypeVar("T")
log = logging.getLogger("rsm.redis")

# The errors of a brief outage: a restart, a failover, a lost connection, a full server. All others are not retried.
# `failover.py` turns temporary refusals, such as MISCONF, MOVED or NOREPLICAS, into ConnectionErrors.
OUTAGES = (
    errors.ConnectionError,
    errors.TimeoutError,
    errors.BusyLoadingError,
    errors.ReadOnlyError,
    errors.OutOfMemoryError,
)


# Errors for a rejected user. They are retried too, because passwords and permissions change while processes run.
_DENIED = (errors.AuthenticationError, errors.AuthorizationError, Denied)


def reason(error: Exception) -> str:
    """Why Redis does not serve, as text that is safe to log: a refusal's text quotes none of our data."""
    return str(error) if isinstance(error, Refused) else type(error).__name__


class Backoff:
    """Pauses between tries: 40 ms, doubled each time, at most 1 s. Logs the first failure and the recovery."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._tries = 0

    def pause(self, error: Exception) -> float:
        """Seconds to wait before the next try."""
        self._tries += 1
        if self._tries == 1:
            log.warning("%s: Redis is not reachable (%s); retrying until it is", self._what, reason(error))
        return float(min(1.0, 0.02 * 2 ** min(self._tries, 6)))

    def recovered(self) -> bool:
        """Records a success; True if it ended a series of failures."""
        if not self._tries:
            return False
        log.warning("%s: Redis is reachable again after %d failed tries", self._what, self._tries)
        self._tries = 0
        return True


def no_answer(settings: Settings, within_s: float, error: Exception) -> BrokerUnavailable:
    """The error for a caller that gives up after `within_s` seconds; 0 = at once."""
    outage = f"did not answer for {within_s:g} s" if within_s else "does not answer"
    return BrokerUnavailable(
        f"Redis at {shown_url(settings.url())} {outage} ({reason(error)}). "
        "Start everything with `rsm up`, or set RSM_REDIS_URL or --redis to a running server."
    )


@contextmanager
def explained(settings: Settings) -> Iterator[None]:
    """Turns the errors of an unreachable Redis, or of a rejected user, into a clear error message.

    Raises:
        BrokerUnavailable, AccessDenied: the message says which server was tried, and what to do.
    """
    try:
        yield
    except OUTAGES as e:
        require_access(e)
        raise no_answer(settings, 0, e) from None


def require_access(error: Exception) -> None:
    """Stops a caller from retrying forever with a wrong password.

    Raises:
        AccessDenied: Redis rejected this user.
    """
    # redis-py's asyncio client wraps the errors of connecting.
    error = error.__cause__ if isinstance(error.__cause__, _DENIED) else error
    if isinstance(error, Denied):
        raise AccessDenied(
            f"Redis denies this user a command: {error}. Give the user the permissions of its role; "
            "`rsm acl` prints them."
        ) from None
    if isinstance(error, _DENIED):
        raise AccessDenied(
            "Redis rejects this user name or password. Check RSM_REDIS_URL or --redis; `rsm acl` creates users."
        ) from None


def persist(
    action: Callable[[], T],
    what: str,
    stopped: Callable[[], bool],
    timeout_s: float | None = None,
    *,
    denial_is_final: bool = False,
) -> T | None:
    """Repeats `action` until Redis answers. Returns None if `stopped()` becomes true first.

    Raises:
        AccessDenied: `denial_is_final` is set, and Redis rejects this user.
        redis.ConnectionError and the other errors in `OUTAGES`: `timeout_s` seconds have passed.
    """
    backoff = Backoff(what)
    until = None if timeout_s is None else time.monotonic() + timeout_s
    while not stopped():
        try:
            result = action()
        except OUTAGES as e:
            if denial_is_final:
                require_access(e)
            if until is not None and time.monotonic() > until:
                raise
            time.sleep(backoff.pause(e))
        else:
            backoff.recovered()
            return result
    return None
