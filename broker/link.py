"""redis-py connections to which a refusal that passes is a lost connection.

A server that is full, demoted, starting, or no longer the owner of a slot answers, but cannot serve. redis-py makes
ordinary errors of such answers, a different class for each and for some none. Here, at the lowest place where a reply
is read, each becomes a `Refused`, which is a ConnectionError: so it looks the same from a command, a pipeline, asyncio
and a `Line`; the connection is dropped, and the next one goes wherever the master is then.
"""

from __future__ import annotations

from typing import Any

import redis.asyncio.connection as aio
import redis.connection as sync
from redis import exceptions as errors

_REFUSALS = (
    errors.ReadOnlyError,  # demoted to a replica
    errors.AskError,  # and MovedError: the slot is elsewhere
    errors.TryAgainError,  # the slot is on its way
    errors.ClusterDownError,  # and MasterDownError: nobody serves the slot, or the replica is cut off
)
# Those that redis-py has no class for. _DEMOTED is what a read that was blocking hears when its master is demoted.
_CODES = {
    "MISCONF": "its disk is full or broken",
    "NOREPLICAS": "too few replicas are connected (min-replicas-to-write)",
    "BUSY": "a script runs for too long",
}
_DEMOTED = "UNBLOCKED force unblock"


class Refused(errors.ConnectionError):
    """Redis answers but cannot serve now; the same command may be taken later, or by another node."""


def refusal(error: errors.ResponseError) -> Refused | None:
    """The passing refusal that an error stands for, None if it is an error of ours."""
    said = str(error)
    code = said.partition(" ")[0]
    if isinstance(error, _REFUSALS):
        return Refused(f"{type(error).__name__.removesuffix('Error')}: {said}")
    if code in _CODES:
        return Refused(f"{code}: {_CODES[code]}")
    return Refused(said) if said.startswith(_DEMOTED) else None


class _Link(sync.AbstractConnection):
    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)
        except errors.ResponseError as e:
            refused = refusal(e)
            if refused is None:
                raise
            self.disconnect()  # type: ignore[no-untyped-call]
            raise refused from None


class _AsyncLink(aio.AbstractConnection):
    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)
        except errors.ResponseError as e:
            refused = refusal(e)
            if refused is None:
                raise
            await self.disconnect(nowait=True)
            raise refused from None


class Link(_Link, sync.Connection):
    """Over TCP."""


class TlsLink(_Link, sync.SSLConnection):
    """Over TLS."""


class UnixLink(_Link, sync.UnixDomainSocketConnection):
    """Over a unix socket."""


class AsyncLink(_AsyncLink, aio.Connection):
    """Over TCP, for asyncio."""


class AsyncTlsLink(_AsyncLink, aio.SSLConnection):
    """Over TLS, for asyncio."""


class AsyncUnixLink(_AsyncLink, aio.UnixDomainSocketConnection):
    """Over a unix socket, for asyncio."""


LINKS = {"redis": Link, "rediss": TlsLink, "unix": UnixLink}
ASYNC_LINKS = {"redis": AsyncLink, "rediss": AsyncTlsLink, "unix": AsyncUnixLink}
