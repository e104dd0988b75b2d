"""The asyncio client of a producer. It has the calls, scripts and guarantees of the synchronous client, and no threads.

1. Submissions that concurrent tasks make during a push are batched into the next push.
2. One task reads this client's inbox: the chunks and ends of all its calls, with one blocking read.
3. A stream that misses a chunk (a trimmed inbox, a Redis restart) reads it from the call's durable log.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rsm.broker.client import inbox
from rsm.broker.client.backpressure import OnOverload
from rsm.broker.client.core import CLOSED, CLOSED_WHILE_AWAITED, OPEN_STATES, ClientCore, checked, epoch_ms, took_effect
from rsm.broker.client.handles import AsyncCall
from rsm.broker.client.request import Prompt
from rsm.broker.client.session_tree import TreeCancel
from rsm.broker.client.stream import BEGIN, FORGET, LogReader, live
from rsm.broker.connection import execute
from rsm.broker.connection.factory import connect_async
from rsm.broker.connection.retry import OUTAGES, Backoff, no_answer, require_access
from rsm.broker.errors import BrokerUnavailable, NotReplicated, Overloaded
from rsm.broker.protocol import codec
from rsm.broker.protocol.events import End, is_end, read_event
from rsm.broker.protocol.messages import Submission, Submitted
from rsm.broker.protocol.models import CallRecord, CallResult, Delta, OnEngineLoss
from rsm.broker.protocol.scripts import Command, T
from rsm.broker.settings import Settings

_BLOCK_S = 2.0


class AsyncClient(ClientCore):
    """Pushes calls and awaits them. Belongs to one event loop. Takes the same arguments as `rsm.Client`.

    A client that was created before a fork, and not used yet, can be used in the child.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        namespace: str | None = None,
        settings: Settings | None = None,
        redis_timeout: float = 30.0,
        on_overload: OnOverload = "raise",
        overload_timeout: float | None = None,
    ) -> None:
        super().__init__(redis_url, namespace, settings, redis_timeout, on_overload, overload_timeout)
        self._open_resources()

    def _open_resources(self) -> None:
        super()._open_resources()
        self.redis = connect_async(self.settings)
        self._open: dict[str, AsyncCall] = {}
        self._outbox: list[tuple[Submission, asyncio.Future[None]]] = []
        self._pusher: asyncio.Task[None] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._closed = False
        self._closing = asyncio.Event()

    # -- submitting

    async def submit(
        self,
        /,
        prompt: Prompt,
        *,
        session: str | None = None,
        kind: str = "generate",
        id: str | None = None,  # noqa: A002
        model: str = "",
        priority: int = 0,
        timeout: float | None = None,
        deadline_ms: int | None = None,
        stream: bool = False,
        prompt_tokens: int | None = None,
        traceparent: str = "",
        on_engine_loss: OnEngineLoss = "continue",
        parent_session: str | None = None,
        on_overload: OnOverload | None = None,
        **params: Any,
    ) -> AsyncCall:
        """Pushes one call; returns when Redis has it. Arguments and errors are those of `rsm.Client.submit`."""
        call = self.prepare(
            prompt,
            id=id,
            session=session,
            kind=kind,
            model=model,
            priority=priority,
            timeout=timeout,
            deadline_ms=deadline_ms,
            stream=stream,
            prompt_tokens=prompt_tokens,
            traceparent=traceparent,
            on_engine_loss=on_engine_loss,
            parent_session=parent_session,
            **params,
        )
        patience = self._patience(on_overload)
        while True:
            try:
                return await self._push(call)
            except Overloaded as refusal:
                await self._pause(patience.pause(refusal))

    async def submit_many(
        self, calls: Sequence[Submission], *, on_overload: OnOverload | None = None
    ) -> list[AsyncCall]:
        """Pushes many calls in few round trips. Errors are those of `rsm.Client.submit_many`."""
        patience = self._patience(on_overload)
        handles: dict[int, AsyncCall] = {}
        waiting = list(range(len(calls)))
        while waiting:
            outcomes = await asyncio.gather(*(self._push(calls[i]) for i in waiting), return_exceptions=True)
            handles |= {i: made for i, made in zip(waiting, outcomes, strict=True) if isinstance(made, AsyncCall)}
            refusal = _worst([error for error in outcomes if isinstance(error, BaseException)])
            waiting = [i for i in waiting if i not in handles]
            if refusal is not None:
                accepted = [handles[i] for i in sorted(handles)]
                error = Overloaded(refusal.bound, refusal.retry_after, accepted, [calls[i] for i in waiting])
                await self._pause(patience.pause(error))
        return [handles[i] for i in range(len(calls))]

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()

    async def _push(self, call: Submission) -> AsyncCall:
        if self._closed:
            raise BrokerUnavailable(CLOSED)
        self._ensure_reader()
        r = call.request
        handle = self._open.setdefault(r.id, AsyncCall(self, r.id, r.session, r.stream))
        pushed = asyncio.get_running_loop().create_future()
        self._outbox.append((call, pushed))
        if self._pusher is None or self._pusher.done():
            self._pusher = asyncio.create_task(self._push_all(), name="rsm-push")
        try:
            await pushed
        except NotReplicated:
            handle._pushed = True
            raise
        except Exception:
            if not handle._pushed:  # else the call of an earlier push with this id is still awaited
                self._open.pop(r.id, None)
            raise
        handle._pushed = True
        return handle

    async def _push_all(self) -> None:
        while self._outbox:
            batch, self._outbox = self._outbox[: self.settings.batch], self._outbox[self.settings.batch :]
            try:
                replies, acks = await self._submit([call for call, _ in batch])
            except asyncio.CancelledError:
                self._outbox = batch + self._outbox  # `close` fails all of them
                raise
            except Exception as e:
                _fail(batch, e)
                continue
            for (call, pushed), reply in zip(batch, replies, strict=True):
                if not pushed.done():
                    await self._acknowledge(call, pushed, reply, acks)

    async def _submit(self, calls: Sequence[Submission]) -> tuple[list[Submitted], int]:
        """The replies, and how many replicas have the calls; 0 if `RSM_WAIT_REPLICAS` is 0."""
        wait = self.settings.wait_command()

        async def push() -> tuple[list[Submitted], int]:
            command = self.transitions.submit(calls)  # built for each try, because the timeouts keep running
            if wait is None:
                return await execute.arun(self.redis, command), 0
            return await execute.arun_replicated(self.redis, command, wait)

        result: tuple[list[Submitted], int] = await self._retry(push)
        return result

    async def _acknowledge(self, call: Submission, pushed: asyncio.Future[None], reply: Submitted, acks: int) -> None:
        call_id = call.request.id
        if reply.code == "overloaded":
            pushed.set_exception(Overloaded(reply.bound, reply.retry_ms / 1000, refused=[call]))
            return
        if refusal := self._refusal(call_id, reply):
            pushed.set_exception(refusal)
            return
        if too_few := self._too_few([call_id], acks):
            pushed.set_exception(too_few)
        else:
            pushed.set_result(None)
        if reply.ended:
            with contextlib.suppress(BrokerUnavailable):  # the reconciler will find the end
                self._settle(call_id, await self._hash(call_id))

    # -- results, streams, cancels

    async def result(self, call_id: str, timeout: float | None = None) -> CallResult:
        """Waits for any call by its id, even if another process pushed it. Errors are those of `AsyncCall.result`."""
        return await (await self.handle(call_id)).result(timeout)

    async def handle(self, call_id: str) -> AsyncCall:
        """A handle for any call by its id.

        Raises:
            UnknownCall: there is no record with this id.
        """
        record = await self.record(call_id)
        call = self._open.get(call_id)
        if call is None:
            call = AsyncCall(self, call_id, record.session_id, record.stream, live=False)
            call._pushed = True
        if record.state.terminal:
            call._record = record
            if not call.done:
                call._ended.set_result({})
            return call
        self._open.setdefault(call_id, call)
        self._ensure_reader()
        # From now on this client receives the call's events. If the call has just ended, its record is read here.
        if await self._run(self.transitions.listen(call_id, self._inbox)) not in ("PENDING", "RUNNING"):
            self._settle(call_id, await self._hash(call_id))
        return call

    async def record(self, call_id: str) -> CallRecord:
        """The current record of a call.

        Raises:
            UnknownCall: there is none, or it has expired.
        """
        return self._record(call_id, await self._hash(checked(call_id)))

    async def stream(self, call_id: str, last_event_id: str = BEGIN) -> AsyncIterator[Delta]:
        """The chunks of any streamed call after `last_event_id`, to its end.

        Reads the call's durable log. See `rsm.Client.stream` for details and errors.
        """
        self._require_stream(await self.record(call_id))
        reader = connect_async(self.settings, _BLOCK_S)
        try:
            key = self.keys.events(call_id)
            at = last_event_id
            if at != BEGIN and not await self._retry(lambda: self.redis.xrange(key, at, at)):
                yield FORGET  # the log no longer has the last chunk that was read
                at = BEGIN
            async for delta in self._read_log(reader, call_id, at):
                yield delta
        finally:
            await reader.aclose()
        (await self.record(call_id)).outcome()

    async def _read_log(self, reader: Any, call_id: str, last: str) -> AsyncIterator[Delta]:
        key, backoff, ended = self.keys.events(call_id), Backoff("stream"), False
        log_reader = LogReader(call_id, last)
        while not (log_reader.over or self._closed):
            try:
                reply = await reader.xread({key: log_reader.last}, count=inbox.READ_MANY, block=int(_BLOCK_S * 1000))
            except OUTAGES as e:
                await asyncio.sleep(backoff.pause(e))
                continue
            backoff.recovered()
            if not reply and ended:
                return  # the log has expired
            # Only a read that started after the end proves that nothing follows.
            ended = not reply and (await self.record(call_id)).state.terminal
            for delta in log_reader.take(reply[0][1] if reply else ()):
                yield delta

    async def _live(
        self, call_id: str, events: asyncio.Queue[Delta | End], ended: asyncio.Future[Mapping[bytes, bytes]]
    ) -> AsyncIterator[Delta]:
        """Chunks from the inbox, and from the log if the inbox lacks some."""
        async for delta in live(events, lambda last: self._log(call_id, last), ended.done):
            yield delta
        (await self._ended(call_id, await asyncio.shield(ended))).outcome()

    async def _log(self, call_id: str, last: str) -> list[Delta]:
        entries = await self._retry(lambda: self.redis.xrange(self.keys.events(call_id), min=f"({last}"))
        events = [read_event(call_id, fields, codec.text(eid)) for eid, fields in entries]
        return [event for event in events if isinstance(event, Delta)]

    async def deadline_in(self, seconds: float) -> int:
        """The `deadline_ms` that is `seconds` from now on Redis's clock, the only clock that counts."""
        return epoch_ms(await self._retry(self.redis.time), seconds)

    async def cancel(self, call_id: str, reason: str = "") -> bool:
        """Cancels a call. True if the cancel took effect: the call is CANCELLED, or will be in a moment."""
        return took_effect(await self._run(self.transitions.cancel(checked(call_id), reason)))

    async def cancel_session(self, session: str, reason: str = "", *, descendants: bool = True) -> int:
        """Cancels all calls of a session and its descendants on all engines. Returns how many. See `rsm.Client`."""
        tree = TreeCancel(self.transitions, session, reason, descendants)
        while command := tree.command():
            tree.take(await self._run(command))
        return tree.ended

    async def close(self) -> None:
        """Ends the client's tasks. Its calls continue."""
        self._closed = True
        self._closing.set()
        for task in (self._reader, self._pusher):
            if task is not None:
                await _end(task)
        _fail(self._outbox, BrokerUnavailable(CLOSED))
        error = BrokerUnavailable(CLOSED_WHILE_AWAITED)
        for call in self._open.values():
            if not call._ended.done():
                call._ended.set_exception(error)
                call._ended.exception()  # marks it as retrieved, in case nobody awaits it
            call._receive(End(0, None))
        await self.redis.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    # -- the inbox

    def _ensure_reader(self) -> None:
        if self._reader is None:
            self._reader = asyncio.create_task(self._read_inbox(), name="rsm-inbox")

    async def _read_inbox(self) -> None:
        reader = connect_async(self.settings, _BLOCK_S)
        key, last, backoff = self.keys.inbox(self._inbox), "0-0", Backoff("inbox")
        reconciled, read = time.monotonic(), 0
        try:
            while True:
                try:
                    if read >= inbox.TRIM_MANY:
                        await reader.xtrim(key, minid=last, approximate=False)
                        read = 0
                    reply: Any = await reader.xread({key: last}, count=inbox.READ_MANY, block=int(_BLOCK_S * 1000))
                    if backoff.recovered() or time.monotonic() - reconciled > inbox.RECONCILE_S:
                        reconciled = time.monotonic()
                        await self._reconcile(reader)
                except OUTAGES as e:
                    await asyncio.sleep(backoff.pause(e))
                    continue
                if reply:
                    last, read = codec.text(reply[0][1][-1][0]), read + len(reply[0][1])
                    self._deliver(reply[0][1])
        finally:
            await reader.aclose()

    def _deliver(self, entries: Sequence[tuple[bytes, Mapping[bytes, bytes]]]) -> None:
        for _, fields in entries:
            call_id = codec.text(fields.get(b"call"))
            call = self._open.get(call_id)
            if call is None:
                continue
            if is_end(fields):
                self._settle(call_id, fields)
            elif call.streamed:
                event = read_event(call_id, fields, codec.text(fields.get(b"eid")))
                if isinstance(event, Delta):
                    call._receive(event)

    def _settle(self, call_id: str, end: Mapping[bytes, bytes]) -> None:
        call = self._open.pop(call_id, None)
        if call is None or call._ended.done():
            return
        call._ended.set_result(end)
        call._receive(End(codec.number(end.get(b"n") or end.get(b"events")), None))

    async def _reconcile(self, reader: Any) -> None:
        """Checks the records of all open calls: their events may have been trimmed, or lost in a Redis restart."""
        ids = [call.id for call in self._open.values() if call._pushed]
        if ids:
            await reader.pexpire(self.keys.inbox(self._inbox), self.settings.result_ttl_s * 1000)
        for at in range(0, len(ids), self.settings.batch):
            batch = ids[at : at + self.settings.batch]
            pipe = reader.pipeline(transaction=False)
            for call_id in batch:
                pipe.hget(self.keys.call(call_id), "state")
            for call_id, state in zip(batch, await pipe.execute(), strict=True):
                if state not in OPEN_STATES:
                    self._settle(call_id, await reader.hgetall(self.keys.call(call_id)))

    async def _ended(self, call_id: str, end: Mapping[bytes, bytes]) -> CallRecord:
        return self._record_of_end(call_id, end) or await self.record(call_id)

    # -- Redis

    async def _hash(self, call_id: str) -> Mapping[bytes, bytes]:
        found: Mapping[bytes, bytes] = await self._retry(lambda: self.redis.hgetall(self.keys.call(call_id)))
        return found

    async def _run(self, command: Command[T]) -> T:
        result: T = await self._retry(lambda: execute.arun(self.redis, command))
        return result

    async def _retry(self, action: Callable[[], Awaitable[Any]]) -> Any:
        backoff, until = Backoff("client"), time.monotonic() + self._redis_timeout
        while not self._closed:
            try:
                result = await action()
            except OUTAGES as e:
                require_access(e)
                if time.monotonic() > until:
                    raise no_answer(self.settings, self._redis_timeout, e) from None
                await asyncio.sleep(backoff.pause(e))
            else:
                backoff.recovered()
                return result
        raise BrokerUnavailable(CLOSED)


async def _end(task: asyncio.Task[None]) -> None:
    """Cancels a task until it has ended: redis-py uses wait_for, which before Python 3.12 can swallow a cancel."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)
    await asyncio.gather(task, return_exceptions=True)


def _fail(calls: Sequence[tuple[Submission, asyncio.Future[None]]], error: Exception) -> None:
    for _, pushed in calls:
        if not pushed.done():
            pushed.set_exception(error)


def _worst(errors: Sequence[BaseException]) -> Overloaded | None:
    """The first Overloaded error. Raises any other error, the most serious one first."""
    unreplicated = [e for e in errors if isinstance(e, NotReplicated)]
    for error in errors:
        if not isinstance(error, Overloaded | NotReplicated):
            raise error
    if unreplicated:
        first = unreplicated[0]
        raise NotReplicated([i for e in unreplicated for i in e.call_ids], first.replicas, first.wanted)
    return next((e for e in errors if isinstance(e, Overloaded)), None)
