"""What `submit` gives: a call to wait for, to read, to cancel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rsm.broker.errors import UnknownCall
from rsm.broker.protocol.events import End
from rsm.broker.protocol.models import CallRecord, CallResult, Delta

if TYPE_CHECKING:
    from rsm.broker.client.aio import AsyncClient
    from rsm.broker.client.sync import Client


class CallHandle:
    """A submitted call. Threads may share it."""

    def __init__(self, client: Client, call_id: str, session: str, stream: bool) -> None:
        self._client = client
        self.id = call_id
        self.session = session
        self.streamed = stream
        self._pushed = False
        self._callbacks: list[Callable[[CallHandle], None]] = []
        self._news: Mapping[bytes, bytes] | None = None
        self._record: CallRecord | None = None

    def __repr__(self) -> str:
        return f"CallHandle(id={self.id!r}, session={self.session!r}, done={self.done})"

    @property
    def done(self) -> bool:
        return self._news is not None or self._record is not None

    def result(self, timeout: float | None = None) -> CallResult:
        """Waits for the end of the call, at most `timeout` seconds.

        Raises:
            CallCancelled, CallFailed: it ended without a result.
            CallLost: Redis has lost it.
            TimeoutError: it has not ended; it goes on, and may be waited for again.
        """
        return self.wait(timeout).outcome()

    def wait(self, timeout: float | None = None) -> CallRecord:
        """Like `result`, but gives the record however the call ended."""
        self._client._await(lambda: self.done, timeout, self.id)
        if self._record is None:
            self._record = self._client._ended(self.id, self._news or {})
        return self._record

    def add_done_callback(self, callback: Callable[[CallHandle], None]) -> None:
        """Calls `callback` once the call has ended, from the client's thread; at once if it has. It must not block."""
        with self._client._changed:
            if not self.done:
                self._callbacks.append(callback)
                return
        callback(self)

    def stream(self, last_event_id: str = "0-0") -> Iterator[Delta]:
        """The pieces of the call from behind `last_event_id` on, to its end; see `Client.stream`."""
        return self._client.stream(self.id, last_event_id)

    def cancel(self, reason: str = "") -> bool:
        """See `Client.cancel`."""
        return self._client.cancel(self.id, reason)

    def record(self) -> CallRecord:
        """The record as it stands now."""
        return self._client.record(self.id)


class AsyncCall:
    """A submitted call. Awaiting it gives the result."""

    def __init__(self, client: AsyncClient, call_id: str, session: str, stream: bool) -> None:
        self._client = client
        self.id = call_id
        self.session = session
        self.streamed = stream
        self._ended: asyncio.Future[Mapping[bytes, bytes]] = asyncio.get_running_loop().create_future()
        self._pushed = False
        self._record: CallRecord | None = None
        self._pieces: asyncio.Queue[Delta | End] | None = asyncio.Queue() if stream else None

    def __repr__(self) -> str:
        return f"AsyncCall(id={self.id!r}, session={self.session!r}, done={self.done})"

    def __await__(self) -> Any:
        return self.result().__await__()

    @property
    def done(self) -> bool:
        return self._ended.done()

    async def result(self, timeout: float | None = None) -> CallResult:
        """Waits for the end of the call, at most `timeout` seconds.

        Raises:
            CallCancelled, CallFailed: it ended without a result.
            CallLost: Redis has lost it.
            TimeoutError: it has not ended; it goes on, and may be awaited again.
        """
        return (await self.wait(timeout)).outcome()

    async def wait(self, timeout: float | None = None) -> CallRecord:
        """Like `result`, but gives the record however the call ended."""
        if self._record is None:
            async with asyncio.timeout(timeout):  # not wait_for: before Python 3.12 it can swallow a cancel
                news = await asyncio.shield(self._ended)
            self._record = await self._client._ended(self.id, news)
        return self._record

    def stream(self) -> AsyncIterator[Delta]:
        """The pieces of the call from its first on, to its end; may be iterated once. See `AsyncClient.stream`."""
        if self._pieces is None:
            raise UnknownCall(f"Call {self.id} was submitted without stream=True, so it keeps no pieces.")
        return self._client._live(self)

    async def cancel(self, reason: str = "") -> bool:
        """See `AsyncClient.cancel`."""
        return await self._client.cancel(self.id, reason)
