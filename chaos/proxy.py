"""A proxy between one process and Redis, on unix sockets, that can inject every kind of network fault.

Each process under test has its own proxy (its line), so a fault of the line affects only that process. All proxies
share one thread.
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
# A late request may block, but nobody waits for its reply.
_LATE_REPLY_S = 5.0


class Proxy:
    """One listener. Its settings apply from the next read on, to existing and new connections.

    Attributes:
        delay_s: delay of each read, in both directions.
        swallow: number of replies still to be dropped. The request reaches Redis, its reply does not come back, and
            the connection ends.
        tear: number of requests still to be cut in half. Redis gets the first half, then the connection ends.
        late: delays, in seconds, of the next requests. The connection ends at once, so the client sends the request
            again over another connection. The first request still reaches Redis after its delay.
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
        """Ends all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    def stall(self) -> None:
        """Silently holds everything back until `restore`: a partition after which all data arrives late."""
        self._flowing.clear()

    def restore(self) -> None:
        """Ends all faults."""
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
        except OSError:  # Redis is down
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
        """Keeps a reference to a task until it has ended."""
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


async def _first_of(*directions: object) -> None:
    """Runs both directions of a connection until one has ended."""
    tasks = [asyncio.ensure_future(one) for one in directions]  # type: ignore[call-overload]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, OSError):
                raise result


class Lines:
    """The proxies of a stage, in their own thread. Its methods may be called from any other thread."""

    def __init__(self, server: Path) -> None:
        self._server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chaos-lines", daemon=True)
        self._thread.start()
        self._open: list[tuple[Proxy, asyncio.Server]] = []

    def open(self, name: str) -> Proxy:
        """Opens a new line, without faults."""

        async def make() -> tuple[Proxy, asyncio.Server]:
            proxy = Proxy(self._server.with_name(f"{name}.sock"), self._server)
            return proxy, await proxy.start()

        self._open.append(self._run(make))
        return self._open[-1][0]

    def do(self, action: Callable[[], object]) -> None:
        """Runs an action in the lines' thread, where it cannot interrupt a read or write."""

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
