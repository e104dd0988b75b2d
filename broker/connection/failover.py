"""redis-py connections that find their master, and to which a refusal that passes is a lost connection.

A server that is full, demoted, starting, or no longer the owner of a slot answers, but cannot serve. redis-py makes
ordinary errors of such answers, a different class for each and for some none. Here, at the lowest place where a reply
is read, each becomes a `Refused`, which is a ConnectionError: so it looks the same from a command, a pipeline, asyncio
and a `DedicatedConnection`; the connection is dropped, and the next one goes wherever the master is then.
"""

from __future__ import annotations

from typing import Any

import redis.asyncio.connection as aio
import redis.connection as sync
from redis import exceptions as errors

from rsm.broker.connection.topology import Address, Finder

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
_IN_SCRIPT = "ACL failure in script"  # how Valkey says NOPERM of a script's command
_DEMOTED = "UNBLOCKED force unblock"


class Refused(errors.ConnectionError):
    """Redis answers but cannot serve now; the same command may be taken later, or by another node."""


class Denied(Refused):
    """Redis does not let this user do that; it may once its rights are set right."""


def refusal(error: errors.ResponseError) -> Refused | None:
    """The passing refusal that an error stands for, None if it is an error of ours."""
    said = str(error)
    code = said.partition(" ")[0]
    if isinstance(error, errors.NoPermissionError) or _IN_SCRIPT in said:
        return Denied(said)
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


class _Seeking(_Link, sync.Connection):
    """Connects to wherever the finder's seeds say the master is, each time anew."""

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
        complaints = []
        for seed in self._finder.seeds():
            try:
                found = self._finder.read(self._ask(seed), seed)
            except errors.RedisError as e:
                complaints.append(e)
            else:
                if found:
                    return found
        raise _lost(self._finder, complaints)

    def _ask(self, seed: Address) -> Any:
        link: Any = self._seed(host=seed[0], port=seed[1], **self._finder.options)
        try:
            link.send_command(*self._finder.question)
            return link.read_response()
        finally:
            link.disconnect()


class _AsyncSeeking(_AsyncLink, aio.Connection):
    """The same for asyncio."""

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
        complaints = []
        for seed in self._finder.seeds():
            try:
                found = self._finder.read(await self._ask(seed), seed)
            except errors.RedisError as e:
                complaints.append(e)
            else:
                if found:
                    return found
        raise _lost(self._finder, complaints)

    async def _ask(self, seed: Address) -> Any:
        link: Any = self._seed(host=seed[0], port=seed[1], **self._finder.options)
        try:
            await link.send_command(*self._finder.question)
            return await link.read_response()
        finally:
            await link.disconnect(nowait=True)


def _require_master(hello: Any) -> None:
    """What was named a moment ago may be demoted, or not be promoted yet. HELLO, as ROLE is for administrators."""
    role = dict(zip(hello[::2], hello[1::2], strict=True))[b"role"].decode()
    if role != "master":
        raise Refused(f"The node that was named as the master says that it is a {role}.")


def _lost(finder: Finder, complaints: list[errors.RedisError]) -> errors.RedisError:
    """A wrong password must look like one, not like a master that may yet come."""
    for complaint in complaints:
        if isinstance(complaint, (errors.AuthenticationError, errors.NoPermissionError)):
            return complaint
    said = "; ".join(str(e) for e in complaints) or "all answer that they know none"
    return Refused(f"No master found by {finder.question[0]} ({said})")


class Link(_Link, sync.Connection):
    """Over TCP."""


class TlsLink(_Link, sync.SSLConnection):
    """Over TLS."""


class UnixLink(_Link, sync.UnixDomainSocketConnection):
    """Over a unix socket."""


class SeekingLink(_Seeking):
    """Over TCP, to the master of the moment."""


class SeekingTlsLink(_Seeking, sync.SSLConnection):
    """Over TLS, to the master of the moment."""

    _seed = sync.SSLConnection


class AsyncLink(_AsyncLink, aio.Connection):
    """Over TCP, for asyncio."""


class AsyncTlsLink(_AsyncLink, aio.SSLConnection):
    """Over TLS, for asyncio."""


class AsyncUnixLink(_AsyncLink, aio.UnixDomainSocketConnection):
    """Over a unix socket, for asyncio."""


class AsyncSeekingLink(_AsyncSeeking):
    """Over TCP, to the master of the moment, for asyncio."""


class AsyncSeekingTlsLink(_AsyncSeeking, aio.SSLConnection):
    """Over TLS, to the master of the moment, for asyncio."""

    _seed = aio.SSLConnection


# By the URL's scheme, and whether the master has to be found first.
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
