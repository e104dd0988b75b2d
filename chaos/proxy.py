"""A proxy between one process and Redis, on unix sockets, whose line can be made bad in every way a line goes bad.

Each process under test gets a proxy of its own, so a fault of the line hits it alone. All proxies share one thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_CHUNK = 1 << 16
# A request that comes late may block; nobody waits for its reply.
_LATE_REPLY_S = 5.0


class Proxy:
    """One listener. What is set here works from the next chunk of bytes on, in connections old and new.

    Attributes:
        delay_s: seconds that each chunk is held up, both ways.
        swallow: how many replies are still to be lost: the request has reached Redis, its reply does not come back,
            and the connection ends.
        tear: how many requests are still to be cut in half: Redis gets the first half, then the connection ends.
        late: seconds by which the next requests are to be overtaken: the connection ends at once, so the request is
            sent again over another one, and the first comes to Redis as well, so much later.
    """

    def __init__(self, listen: Path, server: Path) -> None:
        self.listen = listen
        self._server = server
        self.delay_s = 0.0
        self.swallow = 0
        self.tear = 0
        self.late: list[float] = []
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"unix://{self.listen}"

    async def start(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self._serve, str(self.listen))

    def cut(self) -> None:
        """Ends all connections now."""
        for writer in list(self._writers):
            writer.transport.abort()

    def stall(self) -> None:
        """Holds everything back, without a sign, until `flow`: a partition, after which all of it arrives late."""
        self._flowing.clear()

    def flow(self) -> None:
        """A good line again."""
        self.delay_s, self.swallow, self.tear, self.late = 0.0, 0, 0, []
        self._flowing.set()

    async def close(self) -> None:
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._track(task)
        try:
            upstream_reader, upstream = await asyncio.open_unix_connection(str(self._server))
        except OSError:  # Redis is down; so is the line
            writer.transport.abort()
            return
        ends = {writer, upstream}
        self._writers |= ends
        try:
            await _first_of(self._requests(reader, upstream), self._replies(upstream_reader, writer))
        finally:
            self._writers -= ends
            for end in ends:
                end.transport.abort()

    def _track(self, task: asyncio.Task[None]) -> None:
        """Keeps a task until it has ended."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _requests(self, reader: asyncio.StreamReader, upstream: asyncio.StreamWriter) -> None:
        while data := await self._next(reader):
            if self.late:
                self._track(asyncio.ensure_future(self._deliver(data, self.late.pop())))
                return
            torn = self.tear > 0
            if torn:
                self.tear -= 1
                data = data[: len(data) // 2]
            upstream.write(data)
            await upstream.drain()
            if torn:
                return

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await self._next(reader):
            if self.swallow > 0:
                self.swallow -= 1
                return
            writer.write(data)
            await writer.drain()

    async def _deliver(self, data: bytes, late_s: float) -> None:
        await asyncio.sleep(late_s)
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_unix_connection(str(self._server))
            writer.write(data)
            await writer.drain()
            writer.write_eof()
            async with asyncio.timeout(_LATE_REPLY_S):
                while await reader.read(_CHUNK):  # until Redis has done all of it
                    pass
            writer.close()

    async def _next(self, reader: asyncio.StreamReader) -> bytes:
        data = await reader.read(_CHUNK)
        await self._flowing.wait()
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        return data


async def _first_of(*ways: object) -> None:
    """Runs both ways of a connection until one has ended."""
    tasks = [asyncio.ensure_future(way) for way in ways]  # type: ignore[call-overload]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, OSError):
                raise result


class Lines:
    """The proxies of a stage, in a thread of their own. Its methods may be called from any other thread."""

    def __init__(self, server: Path) -> None:
        self._server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-lines", daemon=True)
        self._thread.start()
        self._open: list[tuple[Proxy, asyncio.Server]] = []

    def open(self, name: str) -> Proxy:
        """A new line, good until told otherwise."""

        async def make() -> tuple[Proxy, asyncio.Server]:
            proxy = Proxy(self._server.with_name(f"{name}.sock"), self._server)
            return proxy, await proxy.start()

        self._open.append(self._run(make))
        return self._open[-1][0]

    def do(self, action: Callable[[], object]) -> None:
        """Runs something in the lines' thread, where it disturbs no chunk."""

        async def run() -> None:
            action()

        self._run(run)

    def close(self) -> None:
        async def close_all() -> None:
            for proxy, server in self._open:
                server.close()
                await proxy.close()

        self._run(close_all)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for proxy, _ in self._open:
            with contextlib.suppress(FileNotFoundError):
                proxy.listen.unlink()

    def _run(self, make: Callable[[], object]) -> T:  # type: ignore[type-var]
        return asyncio.run_coroutine_threadsafe(make(), self._loop).result()  # type: ignore[arg-type]
