"""A stream as its reader sees it: chunks in order, each once; and what if Redis has lost some that were read.

Chunks are numbered without a gap, across attempts. A number that was read before and comes again as another entry of
the log says that a fail-over, or a restart, has lost chunks behind it: they are said anew, perhaps in other words. Then
the reader is told to forget what it has (`Delta.restart`), and gets all of it from the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

from rsm.broker.protocol.codec import text
from rsm.broker.protocol.events import End, read_event
from rsm.broker.protocol.models import Delta

# How long a stream waits for its next chunk before it looks into the log by itself.
_PATIENCE_S = 5.0
BEGIN = "0-0"
# Not an entry of the log: what follows is read from the log's begin.
FORGET = Delta(n=-1, event_id=BEGIN, restart=True)


class LogReader:
    """Where a reader of a call's log stands. `last`: the entry behind which to read; `over`: its end was read."""

    def __init__(self, call_id: str, last: str) -> None:
        self.last = last
        self.over = False
        self._call_id = call_id
        self._expected = 0

    def take(self, entries: Sequence[tuple[bytes, Mapping[bytes, bytes]]]) -> Iterator[Delta]:
        """The chunks in what was read behind `last`. If a chunk comes again, the reader starts over."""
        for entry, fields in entries:
            self.last = text(entry)
            event = read_event(self._call_id, fields, self.last)
            if isinstance(event, End):
                self.over = True
                return
            if event is not None and event.n < self._expected:
                self.last, self._expected = BEGIN, 0
                yield FORGET
                return
            if event is not None:
                self._expected = event.n + 1
                yield event


async def live(
    events: asyncio.Queue[Delta | End],
    log: Callable[[str], Awaitable[list[Delta]]],
    done: Callable[[], bool],
) -> AsyncIterator[Delta]:
    """The chunks of one call from its first to its end.

    Args:
        events: chunks and the end as they come, some perhaps twice, some perhaps not at all.
        log: reads the chunks behind an entry of the durable log.
        done: whether the call has ended, for an end that was not among the events.
    """
    seen: list[str] = []  # by number, the log's entries
    while True:
        event = await _next(events)
        if event is None or isinstance(event, End) or event.n >= len(seen) or seen[event.n] != event.event_id:
            for delta in await _behind(seen, event, log):
                if delta is FORGET:
                    seen.clear()
                else:
                    seen.append(delta.event_id)
                yield delta
        if isinstance(event, End) or (event is None and done() and events.empty()):
            return


async def _next(events: asyncio.Queue[Delta | End]) -> Delta | End | None:
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return await events.get()
    except TimeoutError:
        return None


async def _behind(
    seen: list[str], event: Delta | End | None, log: Callable[[str], Awaitable[list[Delta]]]
) -> list[Delta]:
    """What is to be told of what stands behind the chunks seen."""
    if isinstance(event, Delta) and event.n == len(seen):
        return [event]
    if isinstance(event, End) and event.n <= len(seen):
        return []
    deltas = await log(seen[-1] if seen else BEGIN)
    lost = (isinstance(event, Delta) and event.n < len(seen)) or any(d.n < len(seen) for d in deltas)
    return [FORGET, *await log(BEGIN)] if lost else deltas
