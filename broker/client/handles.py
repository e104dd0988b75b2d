"""The handles that `submit` returns: a call to wait for, to stream, to cancel."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from typing import Any, Protocol

from rsm.broker.errors import UnknownCall
from rsm.broker.protocol.events import End
from rsm.broker.protocol.models import CallRecord, CallResult, Delta

log = logging.getLogger("rsm.client")

End_ = Mapping[bytes, bytes]


class _Client(Protocol):
    """What a handle needs from its client."""

    def record(self, call_id: str) -> CallRecord: ...
    def stream(self, call_id: str, last_event_id: str = ...) -> Iterator[Delta]: ...
    def cancel(self, call_id: str, reason: str = ...) -> bool: ...
    def _await(self, handle: CallHandle, timeout: float | None) -> None: ...
    def _ended(self, call_id: str, end: End_) -> CallRecord: ...
    def _when_done(self, handle: CallHandle, callback: Callable[[CallHandle], None]) -> bool: ...


class _AsyncClient(Protocol):
    """What an asynchronous handle needs from its client."""

    def record(self, call_id: str) -> Awaitable[CallRecord]: ...
    def stream(self, call_id: str, last_event_id: str = ...) -> AsyncIterator[Delta]: ...
    def cancel(self, call_id: str, reason: str = ...) -> Awaitable[bool]: ...
    def _live(
        self, call_id: str, events: asyncio.Queue[Delta | End], ended: asyncio.Future[End_]
    ) -> AsyncIterator[Delta]: ...
    def _ended(self, call_id: str, end: End_) -> Awaitable[CallRecord]: ...


class CallHandle:
    """A submitted call. Threads may share it."""

    def __init__(self, client: _Client, call_id: str, session: str, stream: bool) -> None:
        self._client = client
        self.id = call_id
        self.session = session
        self.streamed = stream
        self._pushed = False
        self._callbacks: list[Callable[[CallHandle], None]] = []
        self._end: End_ | None = None
        self._record: CallRecord | None = None

    def __repr__(self) -> str:
        return f"CallHandle(id={self.id!r}, session={self.session!r}, done={self.done})"

    @property
    def done(self) -> bool:
        return self._end is not None or self._record is not None

    def result(self, timeout: float | None = None) -> CallResult:
        """Waits for the end of the call, at most `timeout` seconds.

        Raises:
            CallCancelled, CallFailed: it ended without a result.
            CallLost: Redis has lost it.
            TimeoutError: it has not ended. It continues, and can be waited for again.
        """
        return self.wait(timeout).outcome()

    def wait(self, timeout: float | None = None) -> CallRecord:
        """Like `result`, but returns the record, however the call ended."""
        self._client._await(self, timeout)
        if self._record is None:
            self._record = self._client._ended(self.id, self._end or {})
        return self._record

    def add_done_callback(self, callback: Callable[[CallHandle], None]) -> None:
        """Calls `callback` from the client's thread when the call ends; at once if it has ended. It must not block."""
        if self._client._when_done(self, callback):
            callback(self)

    def stream(self, last_event_id: str = "0-0") -> Iterator[Delta]:
        """The chunks of the call after `last_event_id`, to its end; see `Client.stream`."""
        return self._client.stream(self.id, last_event_id)

    def cancel(self, reason: str = "") -> bool:
        """See `Client.cancel`."""
        return self._client.cancel(self.id, reason)

    def record(self) -> CallRecord:
        """The current record."""
        return self._client.record(self.id)


class AsyncCall:
    """A submitted call. Awaiting it returns the result."""

    def __init__(self, client: _AsyncClient, call_id: str, session: str, stream: bool, live: bool = True) -> None:
        """`live`: whether this client receives the call's events from the first chunk on."""
        self._client = client
        self.id = call_id
        self.session = session
        self.streamed = stream
        self._ended: asyncio.Future[End_] = asyncio.get_running_loop().create_future()
        self._pushed = False
        self._record: CallRecord | None = None
        # Live chunks, for the first iteration only.
        self._events: asyncio.Queue[Delta | End] | None = asyncio.Queue() if stream and live else None
        self._streaming = False

    def __repr__(self) -> str:
        return f"AsyncCall(id={self.id!r}, session={self.session!r}, done={self.done})"

    def __await__(self) -> Generator[Any, None, CallResult]:
        return self.result().__await__()

    @property
    def done(self) -> bool:
        return self._ended.done()

    async def result(self, timeout: float | None = None) -> CallResult:
        """Waits for the end of the call, at most `timeout` seconds.

        Raises:
            CallCancelled, CallFailed: it ended without a result.
            CallLost: Redis has lost it.
            TimeoutError: it has not ended. It continues, and can be awaited again.
        """
        return (await self.wait(timeout)).outcome()

    async def wait(self, timeout: float | None = None) -> CallRecord:
        """Like `result`, but returns the record, however the call ended."""
        if self._record is None:
            async with asyncio.timeout(timeout):  # not wait_for: before Python 3.12 it can swallow a cancel
                end = await asyncio.shield(self._ended)
            self._record = await self._client._ended(self.id, end)
        return self._record

    def add_done_callback(self, callback: Callable[[AsyncCall], None]) -> None:
        """Calls `callback` from the event loop when the call ends; soon if it has ended. It must not block."""
        self._ended.add_done_callback(lambda _: call_back(callback, self))

    def stream(self, last_event_id: str = "0-0") -> AsyncIterator[Delta]:
        """The chunks of the call after `last_event_id`, to its end; see `AsyncClient.stream`.

        The first iteration from the beginning gets live chunks. Other iterations read the durable log.
        """
        if not self.streamed:
            raise UnknownCall(f"Call {self.id} was submitted without stream=True, so it has no chunks.")
        if self._events is None or self._streaming or last_event_id != "0-0":
            return self._client.stream(self.id, last_event_id)
        self._streaming = True
        return self._client._live(self.id, self._events, self._ended)

    def _receive(self, event: Delta | End) -> None:
        """Takes an event of this call from the client."""
        if self._events is not None:
            self._events.put_nowait(event)

    async def cancel(self, reason: str = "") -> bool:
        """See `AsyncClient.cancel`."""
        return await self._client.cancel(self.id, reason)

    async def record(self) -> CallRecord:
        """The current record."""
        return await self._client.record(self.id)


def call_back(callback: Callable[[Any], None], handle: CallHandle | AsyncCall) -> None:
    """Runs a user's callback. Logs its errors, because the ends of other calls must still be delivered."""
    try:
        callback(handle)
    except Exception:
        log.exception("a done callback of call %s raised an error", handle.id)
