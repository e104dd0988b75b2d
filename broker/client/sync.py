"""The synchronous client of a producer.

1. `submit` pushes a call in one script: body into the record, routing fields onto the router stream.
2. One thread reads this client's inbox: a single blocking read for the ends of all its calls.
3. A call whose news was missed (a trimmed inbox, a Redis restart) is found again in its record, on a timer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from rsm.broker.client.backpressure import OnOverload, Patience
from rsm.broker.client.handles import CallHandle as CallHandle
from rsm.broker.client.inbox import READ_MANY, Entries, Inbox
from rsm.broker.client.request import Prompt, build
from rsm.broker.client.session_tree import TreeCancel
from rsm.broker.client.stream import BEGIN, FORGET, LogReader
from rsm.broker.connection import execute
from rsm.broker.connection.dedicated import Line
from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import BLIPS, Backoff, no_answer, persist
from rsm.broker.errors import (
    BrokerUnavailable,
    CallLost,
    Conflict,
    InvalidRequest,
    NotReplicated,
    Overloaded,
    UnknownCall,
)
from rsm.broker.protocol import codec
from rsm.broker.protocol.events import end_record, is_end
from rsm.broker.protocol.ids import check_id, new_id
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.messages import Submission, Submitted
from rsm.broker.protocol.models import CallRecord, CallResult, Delta, OnEngineLoss
from rsm.broker.protocol.scripts import Command, T
from rsm.broker.protocol.transitions import Transitions
from rsm.broker.settings import Settings

log = logging.getLogger("rsm.client")

# Calls per push. Small, so that router and worker are at work on the first while the next are on their way.
PUSH_MANY = 32
_BLOCK_S = 2.0


class Client:
    """Pushes calls and waits for them. Threads may share one; a process should have one.

    Args:
        redis_url: see docs/operations.md for its forms; none = RSM_REDIS_URL, else the embedded server of this user.
        namespace: none = RSM_NAMESPACE, else "rsm".
        timeout_s: how long a command may keep trying while Redis does not answer.
        on_overload: what `submit` does when there is no room for more calls: "raise" `Overloaded`, or "wait" for it.
        overload_timeout_s: how long it waits for room before it raises after all; none = until `close`.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        namespace: str | None = None,
        settings: Settings | None = None,
        timeout_s: float = 30.0,
        on_overload: OnOverload = "raise",
        overload_timeout_s: float | None = None,
    ) -> None:
        self.settings = (settings or Settings()).with_redis(redis_url, namespace)
        self.keys = Keys(self.settings.namespace)
        self.transitions = Transitions(self.keys, self.settings)
        self.redis = connect(self.settings)
        self._line, self._line_free = Line(self.settings), threading.Lock()
        self._timeout_s = timeout_s
        self._on_overload, self._overload_timeout_s = on_overload, overload_timeout_s
        self._inbox = new_id()
        self._open: dict[str, CallHandle] = {}
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._reader: Inbox | None = None

    # -- submitting

    def submit(
        self,
        prompt: Prompt,
        *,
        session: str | None = None,
        kind: str = "generate",
        id: str | None = None,  # noqa: A002
        model: str = "",
        priority: int = 0,
        deadline_ms: int | None = None,
        stream: bool = False,
        prompt_tokens: int | None = None,
        traceparent: str = "",
        on_engine_loss: OnEngineLoss = "continue",
        parent_session: str | None = None,
        on_overload: OnOverload | None = None,
        **params: Any,
    ) -> CallHandle:
        """Pushes one call; returns at once.

        Args:
            prompt: text or token ids; for OpenAI kinds (`kind="chat.completions"`, …) the request body.
            session: the program this call belongs to; none = a program of its own.
            id: chosen by you, it makes a repeated push safe; none = a new one.
            priority: lower is earlier, from -128 to 127.
            deadline_ms: epoch milliseconds on Redis's clock; not finished by then, the call fails.
            stream: whether pieces are kept as they come.
            on_engine_loss: what if its engine process dies: "continue" = another engine goes on behind the pieces that
                are out; "restart" = it begins anew, and a stream says so (`Delta.restart`); "fail" = it fails at once
                with `engine_lost`.
            parent_session: the session that this one works for, as its sub-agent: what it costs is its program's, and
                it is cancelled with it. Told with the first call of a session, or with all of them.
            on_overload: "raise" or "wait" if there is no room; none = as the client was told.
            params: fields of the body, such as `max_tokens` and other sampling parameters.

        Raises:
            InvalidRequest: the call can never run.
            Conflict: another call with another body has this id.
            Overloaded: there is no room for more calls now, and it was not to wait, or not for so long.
            NotReplicated: the call is pushed, but fewer replicas have it than `RSM_WAIT_REPLICAS` says.
            BrokerUnavailable: Redis did not answer in time. The call may have been pushed: repeat it with its id.
        """
        call = self.prepare(
            prompt,
            id=id,
            session=session,
            kind=kind,
            model=model,
            priority=priority,
            deadline_ms=deadline_ms,
            stream=stream,
            prompt_tokens=prompt_tokens,
            traceparent=traceparent,
            on_engine_loss=on_engine_loss,
            parent_session=parent_session,
            params=params,
        )
        return self.submit_many([call], on_overload=on_overload)[0]

    def prepare(self, prompt: Prompt, **options: Any) -> Submission:
        """A checked and encoded call for `submit_many`; takes what `submit` takes, body fields as `params={…}`.

        Raises:
            InvalidRequest: the call can never run.
        """
        return build(prompt, max_body_bytes=self.settings.max_body_bytes, inbox=self._inbox, **options)

    def submit_many(self, calls: Sequence[Submission], *, on_overload: OnOverload | None = None) -> list[CallHandle]:
        """Pushes many calls in few round trips.

        Raises what `submit` raises. Calls before a conflict stay pushed; of an overload, the error tells the handles of
        the calls that are in (`accepted`) and those to submit again (`refused`).
        """
        self._ensure_reader()
        patience = Patience(on_overload or self._on_overload, self._overload_timeout_s)
        handles: dict[int, CallHandle] = {}
        waiting = list(range(len(calls)))
        while waiting:
            some, rest = waiting[:PUSH_MANY], waiting[PUSH_MANY:]
            pushed, refusal = self._push([calls[i] for i in some])
            handles |= {i: h for i, h in zip(some, pushed, strict=True) if h._pushed}
            waiting = [i for i in some if i not in handles] + rest
            if refusal is not None:
                accepted = [handles[i] for i in sorted(handles)]
                error = Overloaded(refusal.bound, refusal.retry_ms / 1000, accepted, [calls[i] for i in waiting])
                self._closed.wait(patience.pause(error))
        return [handles[i] for i in range(len(calls))]

    def _push(self, calls: Sequence[Submission]) -> tuple[list[CallHandle], Submitted | None]:
        """The handles, and the first refusal for want of room, if any."""
        with self._changed:  # listening begins before the push, so no news can slip through
            handles = [self._open.setdefault(h.id, h) for h in (self._new_handle(c) for c in calls)]
        try:
            replies, acks = self._submit(calls)
        except Exception:
            self._forget(handles)
            raise
        for handle, reply in zip(handles, replies, strict=True):
            if reply.code in ("new", "duplicate"):
                handle._pushed = True
            if reply.code == "duplicate" and reply.ended:
                self._settle({handle.id: self._hash(handle.id)})
        self._forget(handles)
        for handle, reply in zip(handles, replies, strict=True):
            if reply.code == "conflict":
                raise Conflict(f"The id {handle.id} belongs to another call with another body; choose a new id.")
            if reply.code == "invalid":
                raise InvalidRequest(reply.error)
        if acks < self.settings.wait_replicas:
            ids = [h.id for h in handles if h._pushed]
            if ids:
                raise NotReplicated(ids, acks, self.settings.wait_replicas)
        return handles, next((r for r in replies if r.code == "overloaded"), None)

    def _submit(self, calls: Sequence[Submission]) -> tuple[list[Submitted], int]:
        """The replies, and how many replicas have what they say; that is not asked unless it was set."""
        command, wait = self.transitions.submit(calls), self.settings.wait_command()
        if wait is None:
            return self._run(command), 0
        result: tuple[list[Submitted], int] = self._retry(
            lambda: self._over_line(lambda server: execute.run_replicated(server, command, wait))
        )
        return result

    def _new_handle(self, call: Submission) -> CallHandle:
        return CallHandle(self, call.request.id, call.request.session, call.request.stream)

    def _forget(self, handles: Sequence[CallHandle]) -> None:
        with self._changed:
            for handle in handles:
                if not handle._pushed:  # else an earlier push of this very id is still awaited
                    self._open.pop(handle.id, None)

    # -- everything else a producer does

    def result(self, call_id: str, timeout: float | None = None) -> CallResult:
        """Waits for any call by its id, also one that another process pushed. Raises as `CallHandle.result`."""
        return self.handle(call_id).result(timeout)

    def handle(self, call_id: str) -> CallHandle:
        """A handle on any call by its id.

        Raises:
            UnknownCall: there is no record with this id.
        """
        record = self.record(call_id)
        with self._changed:
            handle = self._open.get(call_id)
            if handle is None:
                handle = CallHandle(self, call_id, record.session, record.stream)
                handle._pushed = True
                if not record.state.terminal:
                    self._open[call_id] = handle
        if record.state.terminal:
            handle._record = record
        else:
            self._ensure_reader()
            # From now on this client is told; if the call ended just before, the reconciler finds it.
            if self._run(self.transitions.listen(call_id, self._inbox)) not in ("PENDING", "RUNNING"):
                self._settle({call_id: self._hash(call_id)})
        return handle

    def record(self, call_id: str) -> CallRecord:
        """The record of a call as it stands now.

        Raises:
            UnknownCall: there is none, or it has expired.
        """
        found = self._hash(check_id(call_id, "id"))
        if b"state" not in found:
            raise UnknownCall(f"There is no call {call_id}; records expire after {self.settings.result_ttl_s} s.")
        return CallRecord.from_hash(call_id, found)

    def stream(self, call_id: str, last_event_id: str = BEGIN) -> Iterator[Delta]:
        """The pieces of a streamed call from behind `last_event_id` on, to its end.

        Reads the call's durable log, so it may be called again, by any process, with the `event_id` of the last piece
        seen: nothing is lost and nothing repeated. Survives Redis restarts; where Redis has lost pieces that were
        read, a `Delta.restart` says so, and all of it follows from the beginning.

        Raises:
            CallCancelled, CallFailed: the call ended so, after its last piece.
            UnknownCall: there is no record with this id.
        """
        if not self.record(call_id).stream:
            raise UnknownCall(f"Call {call_id} was submitted without stream=True, so it keeps no pieces.")
        reader = connect(self.settings, _BLOCK_S)
        try:
            key, at = self.keys.events(call_id), last_event_id
            if at != BEGIN and not self._retry(lambda: self.redis.xrange(key, at, at)):
                yield FORGET  # the piece that was read last is not in the log any more
                at = BEGIN
            yield from self._read_log(reader, call_id, at)
        finally:
            reader.close()
        self.record(call_id).outcome()

    def _read_log(self, reader: Any, call_id: str, last: str) -> Iterator[Delta]:
        key, backoff, ended = self.keys.events(call_id), Backoff("stream"), False
        log_reader = LogReader(call_id, last)
        while not (log_reader.over or self._closed.is_set()):
            try:
                reply = reader.xread({key: log_reader.last}, count=READ_MANY, block=int(_BLOCK_S * 1000))
            except BLIPS as e:
                time.sleep(backoff.pause(e))
                continue
            backoff.recovered()
            if not reply and ended:
                return  # its log has expired
            # Only a read that began after the end proves that nothing follows.
            ended = not reply and self.record(call_id).state.terminal
            yield from log_reader.take(reply[0][1] if reply else ())

    def deadline_in(self, seconds: float) -> int:
        """The `deadline_ms` that is so many seconds away on Redis's clock, the only one that counts."""
        now, micros = self._retry(self.redis.time)
        return int(now * 1000 + micros // 1000 + seconds * 1000)

    def cancel(self, call_id: str, reason: str = "") -> bool:
        """Cancels a call. True if that took effect: it is, or will at once be, CANCELLED."""
        done = self._run(self.transitions.cancel(check_id(call_id, "id"), reason))
        return done in ("cancelled", "cancelling", "noted")

    def cancel_session(self, session: str, reason: str = "", *, descendants: bool = True) -> int:
        """Cancels all calls of a session and of its descendants on all engines; returns how many it ended.

        Calls that were pushed by a bare XADD and that no router has read yet end on arrival and are not counted.

        Args:
            descendants: whether those of its sub-agents (`parent_session`) end, too.
        """
        tree = TreeCancel(self.transitions, session, reason, descendants)
        while command := tree.command():
            tree.take(self._run(command))
        return tree.ended

    def close(self) -> None:
        """Ends the inbox thread. Calls go on without this client."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        if self._reader is not None:
            self._reader.wake(self.redis)
        self._line.close()
        self.redis.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- the inbox

    def _ensure_reader(self) -> None:
        with self._changed:
            if self._reader is None:
                key = self.keys.inbox(self._inbox)
                self._reader = Inbox(key, self.settings, self._closed, self._deliver, self._reconcile)
                self._reader.start()

    def _deliver(self, entries: Entries) -> None:
        self._settle({codec.text(f[b"call"]): f for _, f in entries if is_end(f)})

    def _reconcile(self) -> None:
        """Asks the records of all open calls: news may have been trimmed, or lost with a Redis that restarted."""
        with self._changed:
            ids = [h.id for h in self._open.values() if h._pushed]
        if ids:
            self.redis.pexpire(self.keys.inbox(self._inbox), self.settings.result_ttl_s * 1000)
        for at in range(0, len(ids), self.settings.batch):
            some = ids[at : at + self.settings.batch]
            server: Any = self.redis  # without patience of its own: the reader's loop has it
            pipe = server.pipeline(transaction=False)
            for call_id in some:
                pipe.hget(self.keys.call(call_id), "state")
            for call_id, state in zip(some, pipe.execute(), strict=True):
                if state not in (b"PENDING", b"RUNNING"):
                    self._settle({call_id: server.hgetall(self.keys.call(call_id))})

    def _settle(self, ends: Mapping[str, Mapping[bytes, bytes]]) -> None:
        """Notes ends, wakes waiters, and calls back outside the lock."""
        with self._changed:
            settled = [(h, news) for call_id, news in ends.items() if (h := self._open.pop(call_id, None))]
            for handle, news in settled:
                handle._news = news
            self._changed.notify_all()
        for handle, _ in settled:
            for callback in handle._callbacks:
                try:
                    callback(handle)
                except Exception:  # of the user's; the inbox must be read on
                    log.exception("a callback of call %s raised", handle.id)

    def _ended(self, call_id: str, news: Mapping[bytes, bytes]) -> CallRecord:
        if not news:  # the reconciler found no record
            raise CallLost(call_id)
        return end_record(call_id, news) or self.record(call_id)

    def _await(self, done: Any, timeout: float | None, call_id: str) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: done() or self._closed.is_set(), timeout):
                raise TimeoutError(f"Call {call_id} has not ended after {timeout} s; it goes on.")
        if not done():
            raise BrokerUnavailable("The client was closed while the call was awaited; the call goes on.")

    # -- Redis

    def _hash(self, call_id: str) -> Mapping[bytes, bytes]:
        found: Mapping[bytes, bytes] = self._retry(lambda: self.redis.hgetall(self.keys.call(call_id)))
        return found

    def _run(self, command: Command[T]) -> T:
        result: T = self._retry(lambda: self._over_line(lambda server: execute.run(server, command)))
        return result

    def _over_line(self, action: Callable[[execute.Server], T]) -> T:
        """Over the client's own line if no other thread is using it, else over the pool."""
        if not self._line_free.acquire(blocking=False):
            return action(self.redis)
        try:
            return action(self._line)
        finally:
            self._line_free.release()

    def _retry(self, action: Any) -> Any:
        try:
            result = persist(action, "client", self._closed.is_set, self._timeout_s, denial_is_final=True)
        except BLIPS as e:
            raise no_answer(self._timeout_s, e) from None
        if result is None and self._closed.is_set():
            raise BrokerUnavailable("The client is closed; the calls it pushed go on.")
        return result
