"""The reader's side of a stream: delivers each chunk once, in order, even if Redis has lost chunks that were read.

Chunks are numbered without gaps, across attempts. If a number comes again as another entry of the log, a failover or a
restart has lost that chunk and those after it. They are generated again, perhaps with another text. Then the reader
gets a `Delta.restart`, which means that it must forget what it has, and the whole stream follows from the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

from rsm.broker.protocol.codec import text
from rsm.broker.protocol.events import End, read_event
from rsm.broker.protocol.models import Delta

# How long a stream waits for its next chunk before it checks the log.
_PATIENCE_S = 5.0
BEGIN = "0-0"
# Not an entry of the log: the chunks that follow are read from the log's beginning.
FORGET = Delta(n=-1, event_id=BEGIN, restart=True)


class LogReader:
    """The position of a reader in a call's log. `last`: read the entries after this one. `over`: the end was read."""

    def __init__(self, call_id: str, last: str) -> None:
        self.last = last
        self.over = False
        self._call_id = call_id
        self._expected = 0

    def take(self, entries: Sequence[tuple[bytes, Mapping[bytes, bytes]]]) -> Iterator[Delta]:
        """The chunks among the entries after `last`. If a chunk comes again, the reader starts over."""
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
    """The chunks of one call, from the first to the end.

    Args:
        events: live chunks and the end. Some may come twice, some may be missing.
        log: reads the chunks after an entry of the durable log.
        done: whether the call has ended, in case the end is missing from the events.
    """
    seen: list[str] = []  # the entries of the chunks delivered so far, by number
    while True:
        event = await _next(events)
        if event is None or isinstance(event, End) or event.n >= len(seen) or seen[event.n] != event.event_id:
            for delta in await _new_chunks(seen, event, log):
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


async def _new_chunks(
    seen: list[str], event: Delta | End | None, log: Callable[[str], Awaitable[list[Delta]]]
) -> list[Delta]:
    """The chunks to deliver after those seen."""
    if isinstance(event, Delta) and event.n == len(seen):
        return [event]
    if isinstance(event, End) and event.n <= len(seen):
        return []
    deltas = await log(seen[-1] if seen else BEGIN)
    lost = (isinstance(event, Delta) and event.n < len(seen)) or any(d.n < len(seen) for d in deltas)
    return [FORGET, *await log(BEGIN)] if lost else deltas
