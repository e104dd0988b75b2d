"""Several namespaces as one: rendezvous hashing assigns each session to a namespace.

A namespace has one master, on a Redis Cluster too, and so has the throughput of one core. Sessions are independent of
each other, so they can be spread over several namespaces, each with its own routers and workers. On a Cluster, the
namespaces are on different masters. If one of N namespaces is added or removed, only about one in N sessions moves.

A call's id does not say which namespace it is in. A request by id searches each namespace and remembers the answer.

Source: Thaler, Ravishankar: Using name-based mappings to increase hit rates, IEEE/ACM Transactions on Networking 6(1),
1998 ("highest random weight").
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any

from rsm.broker.client.aio import AsyncClient
from rsm.broker.client.backpressure import OnOverload
from rsm.broker.client.handles import AsyncCall, CallHandle
from rsm.broker.client.request import Prompt
from rsm.broker.client.signature import like
from rsm.broker.client.stream import BEGIN
from rsm.broker.client.sync import Client
from rsm.broker.errors import InvalidRequest, Overloaded, UnknownCall
from rsm.broker.protocol.ids import check_id, new_id
from rsm.broker.protocol.messages import Submission
from rsm.broker.protocol.models import CallRecord, CallResult, Delta

# How many calls' namespaces are remembered.
_REMEMBERED = 10_000


def namespace_of(session: str, namespaces: Sequence[str]) -> str:
    """The namespace of a session: the one with the highest weight. It is the same in every process and language.

    The weight is the first 8 bytes of BLAKE2b over "NAMESPACE\\0SESSION", as a big-endian number.

    Raises:
        InvalidRequest: `namespaces` is empty.
    """
    if not namespaces:
        raise InvalidRequest("Give at least one namespace.")
    return max(namespaces, key=lambda namespace: (_weight(namespace, session), namespace))


def _weight(namespace: str, session: str) -> bytes:
    return hashlib.blake2b(f"{namespace}\0{session}".encode(), digest_size=8).digest()


class _Shards:
    """Maps sessions and calls to namespaces."""

    def __init__(self, namespaces: Sequence[str]) -> None:
        if isinstance(namespaces, str) or not namespaces or len(set(namespaces)) < len(namespaces):
            raise InvalidRequest("Give a non-empty list of different namespaces.")
        self.namespaces = tuple(check_id(namespace, "namespace") for namespace in namespaces)
        self._known: OrderedDict[str, str] = OrderedDict()

    def of_session(self, session: str) -> str:
        return namespace_of(session, self.namespaces)

    def of_submission(self, call: Submission) -> str:
        """A sub-agent's calls go to its parent's namespace."""
        return self.of_session(call.request.parent_session or call.request.session)

    def remember(self, call_id: str, namespace: str) -> None:
        self._known[call_id] = namespace
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def candidates(self, call_id: str) -> list[str]:
        """The namespaces that may have a call, the likeliest first. The session of a call without one is its id."""
        first = self._known.get(call_id) or self.of_session(call_id)
        return [first, *(n for n in self.namespaces if n != first)]


def _unknown(call_id: str) -> UnknownCall:
    return UnknownCall(f"There is no call {call_id} in any of the namespaces.")


class ShardedClient:
    """Distributes sessions over several namespaces, with one `Client` for each.

    Args:
        namespaces: the same in all producers, in any order.
        options: the arguments of `Client` other than the namespace.
    """

    def __init__(self, namespaces: Sequence[str], redis_url: str | None = None, **options: Any) -> None:
        self._shards = _Shards(namespaces)
        self.namespaces = self._shards.namespaces
        self._clients = {n: Client(redis_url, namespace=n, **options) for n in self.namespaces}

    def client(self, session: str) -> Client:
        """The client of a session's namespace."""
        return self._clients[self._shards.of_session(session)]

    @like(Client.submit)
    def submit(self, prompt: Prompt, *, on_overload: OnOverload | None = None, **options: Any) -> CallHandle:
        """Like `Client.submit`. A call without a session is its own session, named by its id.

        A sub-agent's calls go to its parent's namespace, so each of them must name `parent_session`. Its own sub-agents
        must name the same parent.
        """
        return self.submit_many([self.prepare(prompt, **options)], on_overload=on_overload)[0]

    @like(Client.prepare)
    def prepare(self, prompt: Prompt, **options: Any) -> Submission:
        """Like `Client.prepare`."""
        options["id"] = call_id = options.get("id") or new_id()
        session = options.get("parent_session") or options.get("session") or call_id
        return self.client(session).prepare(prompt, **options)

    def submit_many(self, calls: Sequence[Submission], *, on_overload: OnOverload | None = None) -> list[CallHandle]:
        """Like `Client.submit_many`, namespace by namespace."""
        handles: dict[int, CallHandle] = {}
        groups = _groups(self._shards, calls)
        for namespace, indices in groups.items():
            try:
                made = self._clients[namespace].submit_many([calls[i] for i in indices], on_overload=on_overload)
            except Overloaded as e:
                taken = {h.id for h in [*handles.values(), *e.accepted]}
                refused = [c for c in calls if c.request.id not in taken]
                raise Overloaded(e.bound, e.retry_after, [*handles.values(), *e.accepted], refused) from None
            for i, handle in zip(indices, made, strict=True):
                handles[i] = handle
                self._shards.remember(handle.id, namespace)
        return [handles[i] for i in range(len(calls))]

    def _client_of(self, call_id: str) -> Client:
        """Raises UnknownCall if no namespace has a record of the call."""
        for namespace in self._shards.candidates(check_id(call_id, "id")):
            try:
                self._clients[namespace].record(call_id)
            except UnknownCall:
                continue
            self._shards.remember(call_id, namespace)
            return self._clients[namespace]
        raise _unknown(call_id)

    def result(self, call_id: str, timeout: float | None = None) -> CallResult:
        """Like `Client.result`."""
        return self._client_of(call_id).result(call_id, timeout)

    def handle(self, call_id: str) -> CallHandle:
        """Like `Client.handle`."""
        return self._client_of(call_id).handle(call_id)

    def record(self, call_id: str) -> CallRecord:
        """Like `Client.record`."""
        return self._client_of(call_id).record(call_id)

    def stream(self, call_id: str, last_event_id: str = BEGIN) -> Iterator[Delta]:
        """Like `Client.stream`."""
        return self._client_of(call_id).stream(call_id, last_event_id)

    def deadline_in(self, seconds: float) -> int:
        """Like `Client.deadline_in`, on the clock of the first namespace's Redis."""
        return self._clients[self.namespaces[0]].deadline_in(seconds)

    def cancel(self, call_id: str, reason: str = "") -> bool:
        """Like `Client.cancel`. The cancel of a call that is still unknown is noted in the namespace of its id."""
        try:
            client = self._client_of(call_id)
        except UnknownCall:
            client = self._clients[self._shards.candidates(call_id)[0]]
        return client.cancel(call_id, reason)

    def cancel_session(self, session: str, reason: str = "", *, descendants: bool = True) -> int:
        """Like `Client.cancel_session`. To cancel only a sub-agent, use `client(its parent).cancel_session`."""
        return self.client(session).cancel_session(session, reason, descendants=descendants)

    def close(self) -> None:
        """Like `Client.close`."""
        for client in self._clients.values():
            client.close()

    def __enter__(self) -> ShardedClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class AsyncShardedClient:
    """Like `ShardedClient`, for asyncio, with one `AsyncClient` for each namespace."""

    def __init__(self, namespaces: Sequence[str], redis_url: str | None = None, **options: Any) -> None:
        self._shards = _Shards(namespaces)
        self.namespaces = self._shards.namespaces
        self._clients = {n: AsyncClient(redis_url, namespace=n, **options) for n in self.namespaces}

    def client(self, session: str) -> AsyncClient:
        """The client of a session's namespace."""
        return self._clients[self._shards.of_session(session)]

    @like(AsyncClient.submit)
    async def submit(self, prompt: Prompt, *, on_overload: OnOverload | None = None, **options: Any) -> AsyncCall:
        """Like `AsyncClient.submit`; treats sessions like `ShardedClient.submit`."""
        return (await self.submit_many([self.prepare(prompt, **options)], on_overload=on_overload))[0]

    @like(AsyncClient.prepare)
    def prepare(self, prompt: Prompt, **options: Any) -> Submission:
        """Like `AsyncClient.prepare`."""
        options["id"] = call_id = options.get("id") or new_id()
        session = options.get("parent_session") or options.get("session") or call_id
        return self.client(session).prepare(prompt, **options)

    async def submit_many(
        self, calls: Sequence[Submission], *, on_overload: OnOverload | None = None
    ) -> list[AsyncCall]:
        """Like `AsyncClient.submit_many`, namespace by namespace."""
        handles: dict[int, AsyncCall] = {}
        for namespace, indices in _groups(self._shards, calls).items():
            try:
                made = await self._clients[namespace].submit_many([calls[i] for i in indices], on_overload=on_overload)
            except Overloaded as e:
                taken = {h.id for h in [*handles.values(), *e.accepted]}
                refused = [c for c in calls if c.request.id not in taken]
                raise Overloaded(e.bound, e.retry_after, [*handles.values(), *e.accepted], refused) from None
            for i, call in zip(indices, made, strict=True):
                handles[i] = call
                self._shards.remember(call.id, namespace)
        return [handles[i] for i in range(len(calls))]

    async def _client_of(self, call_id: str) -> AsyncClient:
        """Raises UnknownCall if no namespace has a record of the call."""
        for namespace in self._shards.candidates(check_id(call_id, "id")):
            try:
                await self._clients[namespace].record(call_id)
            except UnknownCall:
                continue
            self._shards.remember(call_id, namespace)
            return self._clients[namespace]
        raise _unknown(call_id)

    async def result(self, call_id: str, timeout: float | None = None) -> CallResult:
        """Like `AsyncClient.result`."""
        return await (await self._client_of(call_id)).result(call_id, timeout)

    async def handle(self, call_id: str) -> AsyncCall:
        """Like `AsyncClient.handle`."""
        return await (await self._client_of(call_id)).handle(call_id)

    async def record(self, call_id: str) -> CallRecord:
        """Like `AsyncClient.record`."""
        return await (await self._client_of(call_id)).record(call_id)

    async def stream(self, call_id: str, last_event_id: str = BEGIN) -> AsyncIterator[Delta]:
        """Like `AsyncClient.stream`."""
        async for delta in (await self._client_of(call_id)).stream(call_id, last_event_id):
            yield delta

    async def deadline_in(self, seconds: float) -> int:
        """Like `AsyncClient.deadline_in`, on the clock of the first namespace's Redis."""
        return await self._clients[self.namespaces[0]].deadline_in(seconds)

    async def cancel(self, call_id: str, reason: str = "") -> bool:
        """Like `AsyncClient.cancel`. The cancel of a call that is still unknown is noted in the namespace of its id."""
        try:
            client = await self._client_of(call_id)
        except UnknownCall:
            client = self._clients[self._shards.candidates(call_id)[0]]
        return await client.cancel(call_id, reason)

    async def cancel_session(self, session: str, reason: str = "", *, descendants: bool = True) -> int:
        """Like `AsyncClient.cancel_session`. To cancel only a sub-agent, use `client(its parent).cancel_session`."""
        return await self.client(session).cancel_session(session, reason, descendants=descendants)

    async def close(self) -> None:
        """Like `AsyncClient.close`."""
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def __aenter__(self) -> AsyncShardedClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


def _groups(shards: _Shards, calls: Sequence[Submission]) -> dict[str, list[int]]:
    """The positions of the calls in the list, by namespace."""
    groups: dict[str, list[int]] = {}
    for i, call in enumerate(calls):
        groups.setdefault(shards.of_submission(call), []).append(i)
    return groups
