"""redis-py connections that find their master, and that treat a temporary refusal as a lost connection.

A server that is full, demoted, starting, or no longer the owner of a slot answers, but cannot serve. redis-py turns
such answers into ordinary errors, with a different class for each, and for some with none. Here, where the reply is
read, each becomes a `Refused`, which is a ConnectionError. So it looks the same from a command, a pipeline, asyncio and
a `DedicatedConnection`. The connection is dropped, and the next one goes to the current master.
"""

from __future__ import annotations

from typing import Any

import redis.asyncio.connection as aio
import redis.connection as sync
from redis import exceptions as errors

from rsm.broker.connection.topology import Address, Finder

_REFUSALS = (
    errors.ReadOnlyError,  # demoted to a replica
    errors.AskError,  # and MovedError: another node has the slot
    errors.TryAgainError,  # the slot is being migrated
    errors.ClusterDownError,  # and MasterDownError: no node serves the slot, or the replica is cut off
)
# Errors that redis-py has no class for. _DEMOTED is the reply to a blocking read when its master is demoted.
_CODES = {
    "MISCONF": "its disk is full or broken",
    "NOREPLICAS": "too few replicas are connected (min-replicas-to-write)",
    "BUSY": "a script has been running for too long",
}
_IN_SCRIPT = "ACL failure in script"  # Valkey's form of NOPERM for a command inside a script
_DEMOTED = "UNBLOCKED force unblock"


class Refused(errors.ConnectionError):
    """Redis answers but cannot serve now. The same command may succeed later, or on another node."""


class Denied(Refused):
    """Redis denies this user the command. It may succeed once the user's permissions are fixed."""


def refusal(error: errors.ResponseError) -> Refused | None:
    """The temporary refusal behind an error; None if the command itself is wrong."""
    message = str(error)
    code = message.partition(" ")[0]
    if isinstance(error, errors.NoPermissionError) or _IN_SCRIPT in message:
        return Denied(message)
    if isinstance(error, _REFUSALS):
        return Refused(f"{type(error).__name__.removesuffix('Error')}: {message}")
    if code in _CODES:
        return Refused(f"{code}: {_CODES[code]}")
    return Refused(message) if message.startswith(_DEMOTED) else None


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


class _Seeking(_Link, sync.Connection):
    """Asks the finder's seeds for the master each time it connects."""

    _seed: type[sync.Connection] = sync.Connection

    def __init__(self, *, finder: Finder, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._finder = finder

    def connect_check_health(self, *args: Any, **options: Any) -> None:
        if self._sock is None:
            self.host, self.port = self._find()
        super().connect_check_health(*args, **options)

    def on_connect_check_health(self, *args: Any, **options: Any) -> None:
        super().on_connect_check_health(*args, **options)
        self.send_command("HELLO", check_health=False)  # type: ignore[no-untyped-call]
        _require_master(self.read_response())

    def _find(self) -> Address:
        failures = []
        for seed in self._finder.seeds():
            try:
                found = self._finder.read(self._ask(seed), seed)
            except errors.RedisError as e:
                failures.append(e)
            else:
                if found:
                    return found
        raise _no_master(self._finder, failures)

    def _ask(self, seed: Address) -> Any:
        link: Any = self._seed(host=seed[0], port=seed[1], **self._finder.options)
        try:
            link.send_command(*self._finder.question)
            return link.read_response()
        finally:
            link.disconnect()


class _AsyncSeeking(_AsyncLink, aio.Connection):
    """Like `_Seeking`, for asyncio."""

    _seed: type[aio.Connection] = aio.Connection

    def __init__(self, *, finder: Finder, **options: Any) -> None:
        super().__init__(**options)
        self._finder = finder

    async def connect_check_health(self, *args: Any, **options: Any) -> None:
        if not self.is_connected:
            self.host, self.port = await self._find()
        await super().connect_check_health(*args, **options)

    async def on_connect_check_health(self, *args: Any, **options: Any) -> None:
        await super().on_connect_check_health(*args, **options)
        await self.send_command("HELLO", check_health=False)
        _require_master(await self.read_response())

    async def _find(self) -> Address:
        failures = []
        for seed in self._finder.seeds():
            try:
                found = self._finder.read(await self._ask(seed), seed)
            except errors.RedisError as e:
                failures.append(e)
            else:
                if found:
                    return found
        raise _no_master(self._finder, failures)

    async def _ask(self, seed: Address) -> Any:
        link: Any = self._seed(host=seed[0], port=seed[1], **self._finder.options)
        try:
            await link.send_command(*self._finder.question)
            return await link.read_response()
        finally:
            await link.disconnect(nowait=True)


def _require_master(hello: Any) -> None:
    """Raises Refused if the node was demoted meanwhile, or is not promoted yet. Uses HELLO, as ROLE is for admins."""
    role = dict(zip(hello[::2], hello[1::2], strict=True))[b"role"].decode()
    if role != "master":
        raise Refused(f"The node that was found as the master has the role {role}.")


def _no_master(finder: Finder, failures: list[errors.RedisError]) -> errors.RedisError:
    """The error to raise. A wrong password must look like one, not like a master that may still appear."""
    for failure in failures:
        if isinstance(failure, (errors.AuthenticationError, errors.NoPermissionError)):
            return failure
    reasons = "; ".join(str(e) for e in failures) or "no node knows one"
    return Refused(f"No master found with {finder.question[0]} ({reasons})")


class Link(_Link, sync.Connection):
    """Over TCP."""


class TlsLink(_Link, sync.SSLConnection):
    """Over TLS."""


class UnixLink(_Link, sync.UnixDomainSocketConnection):
    """Over a unix socket."""


class SeekingLink(_Seeking):
    """Over TCP, to the current master."""


class SeekingTlsLink(_Seeking, sync.SSLConnection):
    """Over TLS, to the current master."""

    _seed = sync.SSLConnection


class AsyncLink(_AsyncLink, aio.Connection):
    """Over TCP, for asyncio."""


class AsyncTlsLink(_AsyncLink, aio.SSLConnection):
    """Over TLS, for asyncio."""


class AsyncUnixLink(_AsyncLink, aio.UnixDomainSocketConnection):
    """Over a unix socket, for asyncio."""


class AsyncSeekingLink(_AsyncSeeking):
    """Over TCP, to the current master, for asyncio."""


class AsyncSeekingTlsLink(_AsyncSeeking, aio.SSLConnection):
    """Over TLS, to the current master, for asyncio."""

    _seed = aio.SSLConnection


# By the URL's scheme, and whether the master must be found first.
LINKS = {
    ("redis", False): Link,
    ("rediss", False): TlsLink,
    ("unix", False): UnixLink,
    ("redis", True): SeekingLink,
    ("rediss", True): SeekingTlsLink,
}
ASYNC_LINKS = {
    ("redis", False): AsyncLink,
    ("rediss", False): AsyncTlsLink,
    ("unix", False): AsyncUnixLink,
    ("redis", True): AsyncSeekingLink,
    ("rediss", True): AsyncSeekingTlsLink,
}
