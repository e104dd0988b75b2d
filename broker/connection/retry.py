"""Trying again: what passes for a blip, how long to pause, and when to give up."""

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


def no_answer(settings: Settings, within_s: float, error: Exception) -> BrokerUnavailable:
    """The error for whoever has no more patience after so many seconds; 0 = at once."""
    tried = f"did not answer for {within_s:g} s" if within_s else "does not answer"
    return BrokerUnavailable(
        f"Redis at {shown_url(settings.url())} {tried} ({reason(error)}). "
        "Start everything with `rsm up`, or name a running server by RSM_REDIS_URL or --redis."
    )


@contextmanager
def explained(settings: Settings) -> Iterator[None]:
    """Turns a Redis that is away, or that refuses this user, into one sentence.

    Raises:
        BrokerUnavailable, AccessDenied: what says where it was looked for, and what to do.
    """
    try:
        yield
    except BLIPS as e:
        require_access(e)
        raise no_answer(settings, 0, e) from None


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
