"""The thread that writes an engine's output: chunks, ends and releases, for many calls in one round trip.

Each batch has what arrived during the last round trip, so a busy engine makes larger batches, not longer queues. Chunks
of one call in the same batch become one event.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from rsm.broker.connection import execute
from rsm.broker.connection.dedicated import DedicatedConnection
from rsm.broker.connection.retry import persist
from rsm.broker.protocol.messages import Event, Fence, Finish, Release
from rsm.broker.protocol.scripts import Arg, Command
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings
from rsm.workers.backends.base import Chunk


@dataclass(slots=True)
class Output:
    """A chunk of a streamed call, to be published. `numbers` counts the call's events across attempts."""

    fence: Fence
    numbers: list[int]
    chunk: Chunk


@dataclass(slots=True)
class Ended:
    """A call's end, to be published after all of its chunks."""

    finish: Finish
    numbers: list[int]


@dataclass(frozen=True, slots=True)
class Wake:
    """Wakes the engine's own claimer after the items put before it, because a slot is free."""


@dataclass(slots=True)
class _Gathered:
    chunks: dict[Fence, Event] = field(default_factory=dict)
    finishes: list[Finish] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    wake: bool = False

    def leaving(self) -> list[Fence]:
        return [*(f.fence for f in self.finishes), *(r.fence for r in self.releases)]


Item = Output | Ended | Release | Wake
_GAP = "Redis lost some of the call's published events, so the call runs again."
_CLOSE = None


class Publisher(threading.Thread):
    """Publishes for one engine.

    Args:
        stale: called from this thread with the fences of calls that this worker no longer owns.
        gap: called from this thread with the fences of calls whose events Redis has lost in part.
    """

    def __init__(
        self,
        engine: str,
        settings: Settings,
        transitions: Transitions,
        stale: Callable[[list[Fence]], None],
        gap: Callable[[list[Fence]], None],
    ) -> None:
        super().__init__(name="rsm-publish", daemon=True)
        self._engine = engine
        self._batch = settings.batch
        self._wait = settings.wait_command()
        self._transitions = transitions
        self._stale = stale
        self._gap = gap
        self._leaving: dict[Fence, None] = {}
        self._connection = DedicatedConnection(settings)
        self._queue: SimpleQueue[Item | None] = SimpleQueue()
        self._abandoned = threading.Event()

    def put(self, item: Item) -> None:
        """Queues one item; never blocks. Items of one call keep their order."""
        if isinstance(item, Ended):
            self._leaving[item.finish.fence] = None
        elif isinstance(item, Release):
            self._leaving[item.fence] = None
        self._queue.put(item)

    def leaving(self) -> list[Fence]:
        """Calls whose end or release is not in Redis yet."""
        return list(self._leaving)

    def close(self, timeout_s: float) -> None:
        """Writes what is queued, for at most `timeout_s` seconds, and ends the thread."""
        self._queue.put(_CLOSE)
        self.join(timeout_s)
        self._abandoned.set()
        self._connection.close()

    def run(self) -> None:
        more = True
        while more:
            items, more = self._take()
            gathered = _gather(items)
            commands = self._commands(gathered)
            if commands:
                self._report(gathered, self._send(commands, self._wait if gathered.finishes else None))
            for fence in gathered.leaving():
                self._leaving.pop(fence, None)

    def _send(self, commands: Sequence[Command[Any]], wait: Sequence[Arg] | None = None) -> list[list[str]]:
        """Writes a batch. With `wait` it also waits for replicas: if the master dies first, the batch is rewritten."""
        action = partial(execute.run_all, self._connection, commands, wait)
        return persist(action, "publisher", self._abandoned.is_set) or []

    def _take(self) -> tuple[list[Item], bool]:
        item = self._queue.get()
        items: list[Item] = []
        while item is not _CLOSE:
            items.append(item)
            if len(items) >= self._batch:
                return items, True
            try:
                item = self._queue.get_nowait()
            except Empty:
                return items, True
        return items, False

    def _commands(self, g: _Gathered) -> list[Command[Any]]:
        commands: list[Command[Any]] = []
        if g.chunks:
            commands.append(self._transitions.publish(self._engine, list(g.chunks.values())))
        if g.finishes:
            commands.append(self._transitions.finish(self._engine, g.finishes))
        if g.releases:
            commands.append(self._transitions.release(self._engine, g.releases))
        if g.wake:
            commands.append(self._transitions.wake(self._engine))
        return commands

    def _report(self, g: _Gathered, replies: Sequence[list[str]]) -> None:
        rows = iter(replies)
        if g.chunks and replies:
            chunks = list(zip(g.chunks, next(rows), strict=True))
            if stale := [fence for fence, reply in chunks if reply == "stale"]:
                self._stale(stale)
            if gaps := [fence for fence, reply in chunks if reply == "gap"]:
                self._gap(gaps)
        if g.finishes and replies:
            ends = zip(g.finishes, next(rows), strict=True)
            if gaps := [end.fence for end, reply in ends if reply == "gap"]:
                self._send([self._transitions.release(self._engine, [release_after_gap(fence) for fence in gaps])])


def release_after_gap(fence: Fence) -> Release:
    """Ends an attempt whose events Redis has lost in part. It counts as no failure; the next resumes after the log."""
    return Release(fence, "", "", _GAP)


def _gather(items: Sequence[Item]) -> _Gathered:
    g = _Gathered()
    for item in items:
        if isinstance(item, Ended):
            g.finishes.append(item.finish._replace(events=item.numbers[0]))
        elif isinstance(item, Release):
            g.releases.append(item)
        elif isinstance(item, Wake):
            g.wake = True
        else:
            _append(g.chunks, item)
    return g


def _append(chunks: dict[Fence, Event], out: Output) -> None:
    p = out.chunk
    known = chunks.get(out.fence)
    if known is None:
        n, out.numbers[0] = out.numbers[0], out.numbers[0] + 1
        chunks[out.fence] = Event(out.fence, n, p.text, p.token_ids, p.document, p.replay)
        return
    chunks[out.fence] = known._replace(
        text=known.text + p.text,
        token_ids=[*known.token_ids, *p.token_ids],
        chunk=_lines(known.chunk, p.document),
        replay=_lines(known.replay, p.replay),
    )


def _lines(before: str, after: str) -> str:
    return f"{before}\n{after}" if before and after else before or after
