"""Chunks of streamed calls, for tests of backends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from rsm.workers.backends.base import Chunk, Resumed


class Heard(list[Chunk]):
    """Chunks as they arrive, for tests that act in the middle of a stream."""

    def __init__(self, chunks: Iterable[Chunk] = ()) -> None:
        super().__init__(chunks)
        self._more = asyncio.Event()

    def hear(self, chunk: Chunk) -> None:
        self.append(chunk)
        self._more.set()

    async def first(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self) < count:
                self._more.clear()
                await self._more.wait()

    def resumed(self) -> Resumed:
        """What the worker would read back from the call's log."""
        return Resumed(
            text="".join(p.text for p in self),
            token_ids=[i for p in self for i in p.token_ids],
            replays=[p.replay for p in self if p.replay],
            chunks=sum(bool(p.document) for p in self),
            published=[p.document for p in self if p.document],
        )
