"""The calls in an engine, from claim to publisher. Each call is one task and ends with at most one message.

The message is a finish (a result, an error or a partial text) or a release. A call that another worker owns by now
gets none.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from rsm.broker.errors import InvalidRequest
from rsm.broker.protocol import codec
from rsm.broker.protocol.codec import text
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.messages import Claimed, Fault, Fence, Finish, Release
from rsm.broker.protocol.models import ErrorCode, RequestState
from rsm.workers.backends.base import Backend, CallRejected, Chunk, EngineDied, EngineError, Job, Outcome, Resumed
from rsm.workers.meters.calls import Begun, CallMeter
from rsm.workers.meters.kv_cache import CacheMeter
from rsm.workers.runtime.blocking import until_answered
from rsm.workers.runtime.publisher import Ended, Item, Output, release_after_gap
from rsm.workers.scheduling.service import ServiceUnit, Tokens, Used, charge

log = logging.getLogger("rsm.worker")

_CLAIM_LOST = "Redis lost the claim of the call, so the call runs again."
_DEADLINE = "The deadline passed while the call was running."
# Calls that read their earlier attempts' logs at the same time.
_READERS = 8

# How many cancels of unknown calls are remembered. The reply to a claim in progress may still bring such a call.
_EARLY_MAX = 4096


@dataclass(slots=True)
class Running:
    """A call in the engine. `numbers`: the next event number, shared with the publisher; `engaged_s`: seconds in it."""

    claimed: Claimed
    numbers: list[int]
    cancelled: bool = False
    expired: bool = False  # its deadline has passed
    dropped: bool = False  # no longer this worker's: publish nothing more for it
    gap: bool = False  # Redis lost some of its events: another attempt has to publish them again
    returned: bool = False  # it goes back to the router
    engaged_s: float = 0.0
    begun: Begun | None = None
    task: asyncio.Task[None] | None = None

    def unwanted(self) -> bool:
        return self.cancelled or self.expired or self.dropped or self.gap or self.returned


def key_of(fence: Fence) -> str:
    """The key of one attempt of one call, unique in the engine."""
    return f"{fence.call_id}/{fence}"


class Calls:
    """Runs claimed calls in a backend. All methods run in the worker's event loop.

    Args:
        put: takes the items to write, in order; never blocks.
        left: called when a call has left the engine.
        died: called with the reason when a call finds the engine dead.
        unit: the unit in which calls are charged.
    """

    def __init__(
        self,
        backend: Backend,
        server: redis.Redis,
        keys: Keys,
        put: Callable[[Item], None],
        left: Callable[[], None],
        died: Callable[[str], None],
        unit: ServiceUnit | None = None,
    ) -> None:
        self._backend = backend
        self._redis = server
        self._keys = keys
        self._put = put
        self._left = left
        self._died = died
        self._unit = unit or Tokens()
        self._refusal = ""  # why new calls are refused; "" while they are accepted
        self._readers = asyncio.Semaphore(_READERS)
        self._running: dict[str, Running] = {}
        self.engaged = 0  # calls that the backend has
        self.meter = CallMeter()
        self.cache = CacheMeter()  # until the cache's size is known
        self._early: dict[str, None] = {}  # calls cancelled before they arrived, oldest first

    def __len__(self) -> int:
        return len(self._running)

    def start(self, claimed: Sequence[Claimed]) -> None:
        loop = asyncio.get_running_loop()
        for call in claimed:
            if self._refusal:
                self._put(Release(call.fence, "", ErrorCode.ENGINE_ERROR.value, self._refusal))
                self._left()
                continue
            key = key_of(call.fence)
            if key in self._running:
                self._claimed_again(self._running[key])
                continue
            running = Running(call, [call.events], cancelled=call.cancelled or key in self._early)
            self._running[key] = running
            running.task = loop.create_task(self._run(running))

    def _claimed_again(self, running: Running) -> None:
        """Redis lost a claim, and the call arrived again under the same fence while it runs here.

        The running copy continues. If that copy is being dropped, no fence could tell the two apart, so the call is
        released to return under a new fence.
        """
        if running.dropped:
            self._put(Release(running.claimed.fence, "", "", _CLAIM_LOST))
        self._left()

    def cancel(self, fence: Fence) -> None:
        """Stops a call at its user's request. The record keeps the partial text."""
        key = key_of(fence)
        running = self._running.get(key)
        if running is not None:
            running.cancelled = True
            self._backend.abort(key)
            return
        # It has ended, or the cancel overtook the claim's reply: they arrive on two connections.
        self._early[key] = None
        if len(self._early) > _EARLY_MAX:
            del self._early[next(iter(self._early))]

    def refuse(self, why: str) -> None:
        """From now on, new calls from the claimer go back to the router. That does not count as a death."""
        self._refusal = why

    def drop(self, fences: Sequence[Fence]) -> None:
        """Stops calls that another worker owns by now, and publishes nothing more for them."""
        for fence in fences:
            key = key_of(fence)
            running = self._running.get(key)
            if running is not None:
                running.dropped = True
                self._backend.abort(key)

    def give_up(self, fences: Sequence[Fence]) -> None:
        """Stops calls of which Redis lost events. Their next attempts resume after the remaining log."""
        for fence in fences:
            key = key_of(fence)
            running = self._running.get(key)
            if running is not None:
                running.gap = True
                self._backend.abort(key)

    def owned(self) -> list[Fence]:
        """The calls in the engine that, as far as is known, this worker owns."""
        return [r.claimed.fence for r in self._running.values() if not r.dropped]

    def drop_all(self) -> None:
        self.drop([r.claimed.fence for r in self._running.values()])

    def give_back(self) -> None:
        """Stops all calls. Those that have not ended go back to the router."""
        for key, running in list(self._running.items()):
            running.returned = True  # for a call that the engine has not received yet
            self._backend.abort(key)

    def abandon(self, fault: Fault, why: str) -> None:
        """Releases the calls that a hanging engine did not stop, and publishes nothing more for them."""
        for running in self._running.values():
            if not running.dropped:
                self._put(Release(running.claimed.fence, fault, ErrorCode.ATTEMPTS_EXHAUSTED.value, why))
                running.dropped = True
            if running.task is not None:
                running.task.cancel()

    async def settle(self, timeout_s: float) -> None:
        """Waits until no call is running, at most `timeout_s` seconds."""
        until = time.monotonic() + timeout_s
        while self._running and time.monotonic() < until:
            tasks = [r.task for r in self._running.values() if r.task is not None]
            await asyncio.wait(tasks, timeout=max(0.0, until - time.monotonic()))

    async def _run(self, running: Running) -> None:
        try:
            message = await self._message(running)
            if not running.dropped:
                self._put(Ended(message, running.numbers) if isinstance(message, Finish) else message)
        finally:
            del self._running[key_of(running.claimed.fence)]
            self._left()

    async def _message(self, running: Running) -> Finish | Release:
        fence = running.claimed.fence
        message: Finish | Release
        try:
            message = await self._outcome(running)
        except (CallRejected, InvalidRequest) as e:
            code = ErrorCode.INVALID_REQUEST.value
            message = Finish(fence, RequestState.FAILED, code, str(e), b"", 0, 0, 0, 0)
        except EngineDied as e:
            error = f"The engine died while the call was running: {e}"
            message = Release(fence, "death", ErrorCode.ATTEMPTS_EXHAUSTED.value, error)
            self._died(str(e))
        except EngineError as e:
            message = Release(fence, "error", ErrorCode.ENGINE_ERROR.value, f"The engine failed: {e}")
        except Exception as e:
            # The type and the traceback, never the message, which may quote the prompt.
            name = type(e).__name__
            log.error("call %s: %s in the backend", fence.call_id, name)
            log.debug("%s", "".join(traceback.format_tb(e.__traceback__)))
            message = Release(fence, "error", ErrorCode.ENGINE_ERROR.value, f"The engine failed: {name}.")
        return release_after_gap(fence) if running.gap else message

    async def _outcome(self, running: Running) -> Finish | Release:
        c = running.claimed
        outcome = await self._run_in_time(running)
        if running.cancelled:
            return self._finish(running, RequestState.CANCELLED, outcome)
        if running.expired:
            end = self._finish(running, RequestState.FAILED, outcome)
            return end._replace(error_code=ErrorCode.DEADLINE_EXCEEDED.value, error=_DEADLINE)
        if outcome.finish_reason == "abort":  # not cancelled, so its engine is shutting down
            return Release(c.fence, "", ErrorCode.ENGINE_ERROR.value, "The engine was stopped.")
        return self._finish(running, RequestState.COMPLETED, outcome)

    def _finish(self, running: Running, state: RequestState, outcome: Outcome) -> Finish:
        service = charge(self._unit, _used(outcome, running.engaged_s))
        return _finish(running.claimed, state, outcome)._replace(service=service)

    async def _run_in_time(self, running: Running) -> Outcome:
        """Enforces the deadline with a timer. A router would send a cancel, but there may be no router."""
        left_ms = running.claimed.left_ms
        if left_ms is None:
            return await self._run_in_backend(running)
        timer = asyncio.get_running_loop().call_later(left_ms / 1000, self._expire, running)
        try:
            return await self._run_in_backend(running)
        finally:
            timer.cancel()

    def _expire(self, running: Running) -> None:
        running.expired = True
        self._backend.abort(key_of(running.claimed.fence))

    async def _run_in_backend(self, running: Running) -> Outcome:
        if running.unwanted():  # stopped before it began
            return Outcome("abort")
        job = await self._job(running.claimed)
        if running.unwanted():
            return Outcome("abort")
        self.engaged += 1
        began = time.perf_counter()
        begun = running.begun = self.meter.begin(began)
        outcome = Outcome("abort")
        try:
            outcome = await self._backend.run(job, lambda chunk: self._emit(running, chunk))
            return outcome
        finally:
            self.engaged -= 1
            now = time.perf_counter()
            running.engaged_s = now - began
            computed = outcome.prompt_tokens - outcome.cached_tokens
            begun.end(now, computed, outcome.completion_tokens, outcome.finish_reason != "abort")
            self.cache.add(computed + outcome.completion_tokens, now)
            if outcome.prompt_tokens:
                self.cache.found(running.claimed.reuse, outcome.cached_tokens)

    def _emit(self, running: Running, chunk: Chunk) -> None:
        if running.begun is not None:
            claimed = running.claimed
            running.begun.first(time.perf_counter(), claimed.prompt_tokens - claimed.reuse)
        if running.claimed.stream and not running.dropped and not running.gap:
            self._put(Output(running.claimed.fence, running.numbers, chunk))

    async def _job(self, c: Claimed) -> Job:
        return Job(
            key=key_of(c.fence),
            call_id=c.fence.call_id,
            session=c.session,
            kind=c.kind,
            body=codec.decode(c.body, c.body_field),
            stream=c.stream,
            priority=c.priority,
            level=c.level,
            traceparent=c.traceparent,
            resumed=await self._resumed(c.fence.call_id) if c.events > c.begins else None,
            on_engine_loss=c.on_engine_loss,
            program=c.program,
            inherited=c.inherited,
            waited_ms=c.waited_ms,
            ran_ms=c.ran_ms,
        )

    async def _resumed(self, call_id: str) -> Resumed:
        """What earlier attempts published, from the call's log."""
        key = self._keys.events(call_id)
        async with self._readers:
            entries: Any = await until_answered(lambda: self._redis.xrange(key))
        fields = [f for _, f in entries]
        published = [line for f in fields for line in _lines(f, b"chunk")]
        return Resumed(
            text="".join(text(f.get(b"text")) for f in fields),
            token_ids=[int(i) for f in fields for i in text(f.get(b"token_ids")).split()],
            replays=[line for f in fields for line in _lines(f, b"replay")],
            chunks=len(published),
            published=published,
        )


def _lines(fields: dict[bytes, bytes], name: bytes) -> list[str]:
    value = text(fields.get(name))
    return value.split("\n") if value else []


def _used(o: Outcome, engaged_s: float) -> Used:
    """What the call used. `engaged_s`: seconds in the engine; those beyond the reported run time count as waiting."""
    ran_s = engaged_s if o.running_ms is None else o.running_ms / 1000
    first_s = None if o.ttft_ms is None else max(0.0, o.ttft_ms / 1000 - (engaged_s - ran_s))
    return Used(o.prompt_tokens, o.completion_tokens, o.cached_tokens, ran_s, first_s)


def _finish(c: Claimed, state: RequestState, o: Outcome) -> Finish:
    result: dict[str, Any] = {
        "text": o.text,
        "token_ids": o.token_ids,
        "finish_reason": o.finish_reason,
        "ttft_ms": o.ttft_ms,
    }
    if o.response is not None:
        result["response"] = o.response
    return Finish(
        fence=c.fence,
        state=state,
        error_code="",
        error="",
        result=codec.encode(result, c.body_field),
        prompt_tokens=o.prompt_tokens,
        completion_tokens=o.completion_tokens,
        cached_tokens=o.cached_tokens,
        resident_tokens=o.prompt_tokens + o.completion_tokens,
    )
