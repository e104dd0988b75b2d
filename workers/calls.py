"""The calls in an engine, from claim to publisher: each is one task, and each leaves with exactly one message.

That message is an end (with a result, a refusal or a partial text), a give-back, or silence for a call that is
somebody else's by now.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from broker import codec
from broker.codec import text
from broker.connection import persist
from broker.errors import InvalidRequest
from broker.keys import Keys
from broker.models import ErrorCode, RequestState
from broker.transitions import Claimed, Fence, Finish, Release
from workers.backend import Backend, CallRejected, EngineDied, EngineError, Job, Outcome, Piece, Resumed
from workers.publisher import Ended, Item, Output, given_up

log = logging.getLogger("rsm.worker")


_FORGOTTEN = "Redis had forgotten that the call was taken."

# How many cancels of calls that are not here are remembered: those that a claim on its way may still bring, and more.
_EARLY_MAX = 4096


@dataclass(slots=True)
class Running:
    """A call in the engine. `numbers`: the next event number, shared with the publisher."""

    claimed: Claimed
    numbers: list[int]
    cancelled: bool = False
    dropped: bool = False  # no longer ours: say nothing more of it
    gap: bool = False  # Redis lost some of its events: another attempt has to say them again
    task: asyncio.Task[None] | None = None


def key_of(fence: Fence) -> str:
    """A name for one attempt of one call, unique in the engine."""
    return f"{fence.call_id}/{fence}"


class Calls:
    """Runs claimed calls in a backend. Everything here happens in the worker's event loop.

    Args:
        put: takes what has to be written, in order; never blocks.
        left: called when a call has left the engine.
        died: called with the reason when a call finds the engine gone.
    """

    def __init__(
        self,
        backend: Backend,
        server: redis.Redis,
        keys: Keys,
        put: Callable[[Item], None],
        left: Callable[[], None],
        died: Callable[[str], None],
    ) -> None:
        self._backend = backend
        self._redis = server
        self._keys = keys
        self._put = put
        self._left = left
        self._died = died
        self._refusing = False
        self._running: dict[str, Running] = {}
        self._early: dict[str, None] = {}  # cancelled before they came, oldest first

    def __len__(self) -> int:
        return len(self._running)

    def start(self, claimed: Sequence[Claimed]) -> None:
        loop = asyncio.get_running_loop()
        for call in claimed:
            if self._refusing:
                self._put(Release(call.fence, "", ErrorCode.ENGINE_ERROR.value, "The engine had died before."))
                self._left()
                continue
            key = key_of(call.fence)
            if key in self._running:
                self._take_again(self._running[key])
                continue
            running = Running(call, [call.events], cancelled=call.cancelled or key in self._early)
            self._running[key] = running
            running.task = loop.create_task(self._run(running))

    def _take_again(self, running: Running) -> None:
        """Redis forgot a claim, and the call came again under the very same fence while it is here.

        The copy that runs goes on. One that is being dropped already cannot be told from its heir by any fence, so
        that one is to come under a new one.
        """
        if running.dropped:
            self._put(Release(running.claimed.fence, "", "", _FORGOTTEN))
        self._left()

    def cancel(self, fence: Fence) -> None:
        """The call's user wants it stopped; its partial text stays with the record."""
        key = key_of(fence)
        running = self._running.get(key)
        if running is not None:
            running.cancelled = True
            self._backend.abort(key)
            return
        # It has ended; or it is claimed, and the order overtook the claim's reply: they come by two connections.
        self._early[key] = None
        if len(self._early) > _EARLY_MAX:
            del self._early[next(iter(self._early))]

    def refuse(self) -> None:
        """The engine is gone: what the claimer still brings goes back, and that is no attempt lost to a death."""
        self._refusing = True

    def drop(self, fences: Sequence[Fence]) -> None:
        """These calls are somebody else's by now: stop them and say nothing more of them."""
        for fence in fences:
            key = key_of(fence)
            running = self._running.get(key)
            if running is not None:
                running.dropped = True
                self._backend.abort(key)

    def give_up(self, fences: Sequence[Fence]) -> None:
        """Redis has lost events of these calls: their next attempts go on behind what is left of the log."""
        for fence in fences:
            key = key_of(fence)
            running = self._running.get(key)
            if running is not None:
                running.gap = True
                self._backend.abort(key)

    def held(self) -> list[Fence]:
        """The calls in the engine that are ours as far as we know."""
        return [r.claimed.fence for r in self._running.values() if not r.dropped]

    def drop_all(self) -> None:
        self.drop([r.claimed.fence for r in self._running.values()])

    def give_back(self) -> None:
        """Stops all calls; what has not ended by itself goes back to the router."""
        for key in list(self._running):
            self._backend.abort(key)

    async def settle(self, timeout_s: float) -> None:
        """Waits until no call is running, at most so many seconds."""
        until = time.monotonic() + timeout_s
        while self._running and time.monotonic() < until:
            tasks = [r.task for r in self._running.values() if r.task is not None]
            await asyncio.wait(tasks, timeout=max(0.0, until - time.monotonic()))

    async def _run(self, running: Running) -> None:
        fence = running.claimed.fence
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
            # The type, never the message: it may quote the prompt.
            name = type(e).__name__
            log.error("call %s: %s in the backend", fence.call_id, name, exc_info=log.isEnabledFor(logging.DEBUG))
            message = Release(fence, "error", ErrorCode.ENGINE_ERROR.value, f"The engine failed: {name}.")
        if running.gap:
            message = given_up(fence)
        if not running.dropped:
            self._put(Ended(message, running.numbers) if isinstance(message, Finish) else message)
        del self._running[key_of(fence)]
        self._left()

    async def _outcome(self, running: Running) -> Finish | Release:
        c = running.claimed
        if running.cancelled:  # flagged before it could begin
            outcome = Outcome("abort")
        else:
            outcome = await self._backend.run(await self._job(c), lambda piece: self._emit(running, piece))
        if running.cancelled:
            return _finish(c, RequestState.CANCELLED, outcome)
        if outcome.finish_reason == "abort":  # nobody asked the call to stop: its engine is going down
            return Release(c.fence, "", ErrorCode.ENGINE_ERROR.value, "The engine was stopped.")
        return _finish(c, RequestState.COMPLETED, outcome)

    def _emit(self, running: Running, piece: Piece) -> None:
        if running.claimed.stream and not running.dropped and not running.gap:
            self._put(Output(running.claimed.fence, running.numbers, piece))

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
        )

    async def _resumed(self, call_id: str) -> Resumed:
        """What the reader has already, from the durable log of the call."""
        key = self._keys.events(call_id)
        log_: Any = await asyncio.to_thread(persist, lambda: self._redis.xrange(key), "worker", lambda: False)
        fields = [f for _, f in log_]
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
