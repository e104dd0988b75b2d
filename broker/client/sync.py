"""The synchronous client of a producer.

1. `submit` pushes a call with one script: the body into the record, the routing fields onto the router stream.
2. One thread reads this client's inbox: one blocking read for the ends of all its calls.
3. A timer checks the records of open calls, in case an end was missed (a trimmed inbox, a Redis restart).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from rsm.broker.client.backpressure import OnOverload
from rsm.broker.client.core import CLOSED, CLOSED_WHILE_AWAITED, OPEN_STATES, ClientCore, checked, epoch_ms, took_effect
from rsm.broker.client.handles import CallHandle, call_back
from rsm.broker.client.inbox import READ_MANY, Entries, Inbox
from rsm.broker.client.request import Prompt
from rsm.broker.client.session_tree import TreeCancel
from rsm.broker.client.stream import BEGIN, FORGET, LogReader
from rsm.broker.connection import execute
from rsm.broker.connection.dedicated import DedicatedConnection
from rsm.broker.connection.factory import connect
from rsm.broker.connection.retry import OUTAGES, Backoff, no_answer, persist
from rsm.broker.errors import BrokerUnavailable, Overloaded
from rsm.broker.protocol import codec
from rsm.broker.protocol.events import is_end
from rsm.broker.protocol.messages import Submission, Submitted
from rsm.broker.protocol.models import CallRecord, CallResult, Delta, OnEngineLoss
from rsm.broker.protocol.scripts import Command, T
from rsm.broker.settings import Settings

# Calls per push. Small, so that router and worker process the first calls while the next ones are pushed.
PUSH_MANY = 32
_BLOCK_S = 2.0


class Client(ClientCore):
    """Pushes calls and waits for them. Threads may share a client; one per process is enough.

    A client that was created before a fork works in both processes: the child opens its own connections.

    Args:
        redis_url: see docs/operations.md for its forms. Default: RSM_REDIS_URL, else the embedded server of this user.
        namespace: the namespace of the fleet. Default: RSM_NAMESPACE, else "rsm".
        redis_timeout: for how many seconds a command is retried while Redis does not answer.
        on_overload: what `submit` does when the broker is overloaded: "raise" `Overloaded`, or "wait".
        overload_timeout: for how many seconds "wait" waits before it raises `Overloaded`. Default: until `close`.
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
        self._closed = threading.Event()
        self._open_resources()

    def _open_resources(self) -> None:
        super()._open_resources()
        self.redis = connect(self.settings)
        self._connection, self._connection_lock = DedicatedConnection(self.settings), threading.Lock()
        self._open: dict[str, CallHandle] = {}
        self._changed = threading.Condition()
        self._reader: Inbox | None = None

    # -- submitting

    def submit(
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
    ) -> CallHandle:
        """Pushes one call, and returns without waiting for its result.

        Args:
            prompt: text or token ids; the request body for OpenAI kinds (`kind="chat.completions"`, …).
            session: the session that this call belongs to. Default: a session of its own.
            id: an id of your choice makes it safe to repeat the push. Default: a new id.
            priority: from -128 to 127; lower runs earlier.
            timeout: seconds from now after which an unfinished call fails with `deadline_exceeded`.
            deadline_ms: the same deadline as epoch milliseconds on Redis's clock.
            stream: whether chunks are published and kept.
            on_engine_loss: what happens if the call's engine process dies. "continue": another engine resumes after
                the chunks already delivered. "restart": the call starts over, and its stream says so (`Delta.restart`).
                "fail": the call fails at once with `engine_lost`.
            parent_session: the session that this session works for as a sub-agent. The parent's program is charged for
                its calls, and a cancel of the parent includes it. Name it with a session's first call, or with all.
            on_overload: "raise" or "wait" when the broker is overloaded. Default: the client's choice.
            params: fields of the body, such as `max_tokens` and other sampling parameters.

        Raises:
            InvalidRequest: the call can never run.
            Conflict: the id already belongs to a different call.
            Overloaded: a limit on open calls is reached, and the call was not to wait, or waited too long.
            NotReplicated: the call is pushed, but fewer replicas than `RSM_WAIT_REPLICAS` confirmed it.
            BrokerUnavailable: Redis did not answer in time. The call may have been pushed: repeat it with its id.
        """
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
        return self.submit_many([call], on_overload=on_overload)[0]

    def submit_many(self, calls: Sequence[Submission], *, on_overload: OnOverload | None = None) -> list[CallHandle]:
        """Pushes many calls in few round trips.

        Raises the errors of `submit`. Calls before a conflict stay pushed. An Overloaded error has the handles of the
        accepted calls (`accepted`) and the calls to submit again (`refused`).
        """
        self._ensure_reader()
        patience = self._patience(on_overload)
        handles: dict[int, CallHandle] = {}
        waiting = list(range(len(calls)))
        while waiting:
            batch, rest = waiting[:PUSH_MANY], waiting[PUSH_MANY:]
            pushed, refusal = self._push([calls[i] for i in batch])
            handles |= {i: h for i, h in zip(batch, pushed, strict=True) if h._pushed}
            waiting = [i for i in batch if i not in handles] + rest
            if refusal is not None:
                accepted = [handles[i] for i in sorted(handles)]
                error = Overloaded(refusal.bound, refusal.retry_ms / 1000, accepted, [calls[i] for i in waiting])
                self._closed.wait(patience.pause(error))
        return [handles[i] for i in range(len(calls))]

    def _push(self, calls: Sequence[Submission]) -> tuple[list[CallHandle], Submitted | None]:
        """The handles, and the first reply that refuses a call as overloaded, if any."""
        with self._changed:  # before the push, so that no event is missed
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
            if refusal := self._refusal(handle.id, reply):
                raise refusal
        if too_few := self._too_few([h.id for h in handles if h._pushed], acks):
            raise too_few
        return handles, next((r for r in replies if r.code == "overloaded"), None)

    def _submit(self, calls: Sequence[Submission]) -> tuple[list[Submitted], int]:
        """The replies, and how many replicas have the calls; 0 if `RSM_WAIT_REPLICAS` is 0."""
        wait = self.settings.wait_command()

        def push(server: execute.Server) -> tuple[list[Submitted], int]:
            command = self.transitions.submit(calls)  # built for each try, because the timeouts keep running
            return (execute.run(server, command), 0) if wait is None else execute.run_replicated(server, command, wait)

        result: tuple[list[Submitted], int] = self._retry(lambda: self._send(push))
        return result

    def _new_handle(self, call: Submission) -> CallHandle:
        return CallHandle(self, call.request.id, call.request.session, call.request.stream)

    def _forget(self, handles: Sequence[CallHandle]) -> None:
        with self._changed:
            for handle in handles:
                if not handle._pushed:  # else the call of an earlier push with this id is still awaited
                    self._open.pop(handle.id, None)

    # -- results, streams, cancels

    def result(self, call_id: str, timeout: float | None = None) -> CallResult:
        """Waits for any call by its id, even if another process pushed it. Errors are those of `CallHandle.result`."""
        return self.handle(call_id).result(timeout)

    def handle(self, call_id: str) -> CallHandle:
        """A handle for any call by its id.

        Raises:
            UnknownCall: there is no record with this id.
        """
        record = self.record(call_id)
        with self._changed:
            handle = self._open.get(call_id)
        if handle is None:
            handle = CallHandle(self, call_id, record.session_id, record.stream)
            handle._pushed = True
        if record.state.terminal:
            handle._record = record
        else:
            self._follow(handle)
        return handle

    def _follow(self, handle: CallHandle) -> None:
        """Receives the call's events from now on. If the call has just ended, reads its record."""
        with self._changed:
            self._open.setdefault(handle.id, handle)
        self._ensure_reader()
        if self._run(self.transitions.listen(handle.id, self._inbox)) not in ("PENDING", "RUNNING"):
            self._settle({handle.id: self._hash(handle.id)})

    def record(self, call_id: str) -> CallRecord:
        """The current record of a call.

        Raises:
            UnknownCall: there is none, or it has expired.
        """
        return self._record(call_id, self._hash(checked(call_id)))

    def stream(self, call_id: str, last_event_id: str = BEGIN) -> Iterator[Delta]:
        """The chunks of a streamed call after `last_event_id`, to its end.

        Reads the call's durable log, so any process can resume the stream with the `event_id` of the last chunk that it
        has seen. No chunk is lost or repeated. Survives Redis restarts: if Redis has lost chunks that were read, a
        `Delta.restart` says so, and the whole stream follows from the beginning.

        Raises:
            CallCancelled, CallFailed: the call ended this way, after its last chunk.
            UnknownCall: there is no record with this id, or the call was submitted without stream=True.
        """
        self._require_stream(self.record(call_id))
        reader = connect(self.settings, _BLOCK_S)
        try:
            key, at = self.keys.events(call_id), last_event_id
            if at != BEGIN and not self._retry(lambda: self.redis.xrange(key, at, at)):
                yield FORGET  # the log no longer has the last chunk that was read
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
            except OUTAGES as e:
                time.sleep(backoff.pause(e))
                continue
            backoff.recovered()
            if not reply and ended:
                return  # the log has expired
            # Only a read that started after the end proves that nothing follows.
            ended = not reply and self.record(call_id).state.terminal
            yield from log_reader.take(reply[0][1] if reply else ())

    def deadline_in(self, seconds: float) -> int:
        """The `deadline_ms` that is `seconds` from now on Redis's clock, the only clock that counts."""
        return epoch_ms(self._retry(self.redis.time), seconds)

    def cancel(self, call_id: str, reason: str = "") -> bool:
        """Cancels a call. True if the cancel took effect: the call is CANCELLED, or will be in a moment."""
        return took_effect(self._run(self.transitions.cancel(checked(call_id), reason)))

    def cancel_session(self, session: str, reason: str = "", *, descendants: bool = True) -> int:
        """Cancels all calls of a session and of its descendants on all engines. Returns how many it ended.

        Calls from a bare XADD that no router has read yet are cancelled when a router reads them, and are not counted.

        Args:
            descendants: whether to cancel the calls of its sub-agents (`parent_session`), too.
        """
        tree = TreeCancel(self.transitions, session, reason, descendants)
        while command := tree.command():
            tree.take(self._run(command))
        return tree.ended

    def close(self) -> None:
        """Ends the inbox thread. The client's calls continue."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        if self._reader is not None:
            self._reader.wake(self.redis)
        self._connection.close()
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
        """Checks the records of all open calls: their events may have been trimmed, or lost in a Redis restart."""
        with self._changed:
            ids = [h.id for h in self._open.values() if h._pushed]
        if ids:
            self.redis.pexpire(self.keys.inbox(self._inbox), self.settings.result_ttl_s * 1000)
        for at in range(0, len(ids), self.settings.batch):
            batch = ids[at : at + self.settings.batch]
            server: Any = self.redis  # without retries: the reader's loop has them
            pipe = server.pipeline(transaction=False)
            for call_id in batch:
                pipe.hget(self.keys.call(call_id), "state")
            for call_id, state in zip(batch, pipe.execute(), strict=True):
                if state not in OPEN_STATES:
                    self._settle({call_id: server.hgetall(self.keys.call(call_id))})

    def _settle(self, ends: Mapping[str, Mapping[bytes, bytes]]) -> None:
        """Records ends and wakes waiters, then runs callbacks outside the lock."""
        with self._changed:
            settled = [(h, end) for call_id, end in ends.items() if (h := self._open.pop(call_id, None))]
            for handle, end in settled:
                handle._end = end
            self._changed.notify_all()
        for handle, _ in settled:
            for callback in handle._callbacks:
                call_back(callback, handle)

    def _ended(self, call_id: str, end: Mapping[bytes, bytes]) -> CallRecord:
        return self._record_of_end(call_id, end) or self.record(call_id)

    def _when_done(self, handle: CallHandle, callback: Callable[[CallHandle], None]) -> bool:
        """Stores a callback for later. True if the call has ended, so that the caller must run it."""
        with self._changed:
            if not handle.done:
                handle._callbacks.append(callback)
            return handle.done

    def _await(self, handle: CallHandle, timeout: float | None) -> None:
        with self._changed:
            unfollowed = not handle.done and handle.id not in self._open
        if unfollowed and not self._closed.is_set():
            self._follow(handle)  # the parent of this forked process pushed it
        with self._changed:
            if not self._changed.wait_for(lambda: handle.done or self._closed.is_set(), timeout):
                raise TimeoutError(f"Call {handle.id} has not ended after {timeout} s. It continues; wait again.")
        if not handle.done:
            raise BrokerUnavailable(CLOSED_WHILE_AWAITED)

    # -- Redis

    def _hash(self, call_id: str) -> Mapping[bytes, bytes]:
        found: Mapping[bytes, bytes] = self._retry(lambda: self.redis.hgetall(self.keys.call(call_id)))
        return found

    def _run(self, command: Command[T]) -> T:
        result: T = self._retry(lambda: self._send(lambda server: execute.run(server, command)))
        return result

    def _send(self, action: Callable[[execute.Server], T]) -> T:
        """Uses the client's dedicated connection if no other thread is using it, else the pool."""
        if not self._connection_lock.acquire(blocking=False):
            return action(self.redis)
        try:
            return action(self._connection)
        finally:
            self._connection_lock.release()

    def _retry(self, action: Any) -> Any:
        try:
            result = persist(action, "client", self._closed.is_set, self._redis_timeout, denial_is_final=True)
        except OUTAGES as e:
            raise no_answer(self.settings, self._redis_timeout, e) from None
        if result is None and self._closed.is_set():
            raise BrokerUnavailable(CLOSED)
        return result
