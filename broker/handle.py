"""What `Client.submit` gives: a call to wait for, to read, to cancel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from broker.models import CallRecord, CallResult, Delta

if TYPE_CHECKING:
    from broker.client import Client


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
