"""Several namespaces as one: each session has its own, chosen by rendezvous hashing.

A namespace has one master, on a Redis Cluster too, and so the throughput of one core. Sessions are independent of each
other, so they may be spread over several namespaces, each with routers and workers of its own; on a Cluster these lie
on different masters. Sessions move only to a namespace that is added, or from one that is taken away: about one in N.

Source: Thaler, Ravishankar: Using name-based mappings to increase hit rates, IEEE/ACM Transactions on Networking 6(1),
1998 ("highest random weight").
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rsm.broker.client.aio import AsyncCall, AsyncClient
from rsm.broker.client.request import Prompt
from rsm.broker.client.sync import CallHandle, Client
from rsm.broker.errors import InvalidRequest
from rsm.broker.protocol.ids import check_id, new_id


def namespace_of(session: str, namespaces: Sequence[str]) -> str:
    """The namespace of a session: the one with the highest weight for it, the same in every process and language.

    The weight is the first 8 bytes of BLAKE2b over "NAMESPACE\\0SESSION", as a big-endian number.

    Raises:
        InvalidRequest: there is no namespace.
    """
    if not namespaces:
        raise InvalidRequest("At least one namespace is needed.")
    return max(namespaces, key=lambda namespace: (_weight(namespace, session), namespace))


def _weight(namespace: str, session: str) -> bytes:
    return hashlib.blake2b(f"{namespace}\0{session}".encode(), digest_size=8).digest()


class ShardedClient:
    """A `Client` for each namespace; a session's calls go by the one that is its own.

    Args:
        namespaces: the same in all producers, in any order.
        options: as for `Client`, but for the namespace.
    """

    def __init__(self, namespaces: Sequence[str], redis_url: str | None = None, **options: Any) -> None:
        self.namespaces = _checked(namespaces)
        self._clients = {n: Client(redis_url, namespace=n, **options) for n in self.namespaces}

    def client(self, session: str) -> Client:
        """The client of a session's namespace: for everything that a `Client` can do."""
        return self._clients[namespace_of(session, self.namespaces)]

    def submit(
        self,
        prompt: Prompt,
        *,
        session: str | None = None,
        id: str | None = None,  # noqa: A002
        parent_session: str | None = None,
        **options: Any,
    ) -> CallHandle:
        """As `Client.submit`. A call without a session is a session of its own, named by its id.

        A sub-agent's calls go where its parent's go, so each names it; a sub-agent's own sub-agents name that one, too.
        """
        call_id = id or new_id()
        client = self.client(parent_session or session or call_id)
        return client.submit(prompt, session=session, id=call_id, parent_session=parent_session, **options)

    def cancel_session(self, session: str, reason: str = "", *, descendants: bool = True) -> int:
        """As `Client.cancel_session`; of a sub-agent alone: `client(its parent).cancel_session`."""
        return self.client(session).cancel_session(session, reason, descendants=descendants)

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def __enter__(self) -> ShardedClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class AsyncShardedClient:
    """The same for asyncio, with an `AsyncClient` for each namespace."""

    def __init__(self, namespaces: Sequence[str], redis_url: str | None = None, **options: Any) -> None:
        self.namespaces = _checked(namespaces)
        self._clients = {n: AsyncClient(redis_url, namespace=n, **options) for n in self.namespaces}

    def client(self, session: str) -> AsyncClient:
        """The client of a session's namespace."""
        return self._clients[namespace_of(session, self.namespaces)]

    async def submit(
        self,
        prompt: Prompt,
        *,
        session: str | None = None,
        id: str | None = None,  # noqa: A002
        parent_session: str | None = None,
        **options: Any,
    ) -> AsyncCall:
        """As `AsyncClient.submit`, and as `ShardedClient.submit` of its sessions."""
        call_id = id or new_id()
        client = self.client(parent_session or session or call_id)
        return await client.submit(prompt, session=session, id=call_id, parent_session=parent_session, **options)

    async def cancel_session(self, session: str, reason: str = "", *, descendants: bool = True) -> int:
        """As `AsyncClient.cancel_session`; of a sub-agent alone: `client(its parent).cancel_session`."""
        return await self.client(session).cancel_session(session, reason, descendants=descendants)

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def __aenter__(self) -> AsyncShardedClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


def _checked(namespaces: Sequence[str]) -> tuple[str, ...]:
    if isinstance(namespaces, str) or not namespaces or len(set(namespaces)) < len(namespaces):
        raise InvalidRequest("Give a list of different namespaces.")
    return tuple(check_id(namespace, "namespace") for namespace in namespaces)
