"""A modelled engine, for tests, for planning and for machines without a GPU. Many fit into one process.

Answers are a function of the prompt, so an attempt that resumes on another engine gives the same answer as an
undisturbed one. With `SimTimes.zero()` a call is a no-op: it never waits, takes no slot and has no KV cache.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rsm.workers.backends.base import Backend, Chunk, EngineDied, EngineError, EngineFacts, EngineLoad, Job, Outcome
from rsm.workers.backends.sim.call import Phase, SimCall
from rsm.workers.backends.sim.config import SimConfig
from rsm.workers.backends.sim.engine import SimEngine
from rsm.workers.backends.sim.request import Request, Shape, read, replay, usage
from rsm.workers.meters.rate import RateMeter
from rsm.workers.meters.speed import SpeedMeter

Emit = Callable[[Chunk], None]
# How far, in real seconds, the model may lag behind the clock and still catch up. A busy event loop must not slow the
# modelled engine down, but after a hang it must not race.
_MAX_LAG_S = 0.25
_HANG_S = 86_400.0


class SimBackend(Backend):
    """One modelled engine."""

    def __init__(self, config: SimConfig | None = None) -> None:
        self.config = config or SimConfig()
        self._instant = self.config.instant
        self._engine = SimEngine(self.config)
        self._live: dict[str, _Live] = {}
        self._rate = RateMeter()
        self._meter = SpeedMeter()
        self._wake = asyncio.Event()
        self._death = asyncio.Event()
        self._steps_done = 0
        self._stalled = False
        self._gone = "The engine was not started."  # why no call can run; "" while it can
        self._driver: asyncio.Task[None] | None = None

    async def start(self) -> EngineFacts:
        """Starts the model."""
        time.sleep(self.config.load_s)  # noqa: ASYNC251
        self._gone, self._stalled = "", False
        self._death.clear()
        self._driver = asyncio.create_task(self._drive(), name="sim-engine")
        c = self.config
        return EngineFacts(c.model, c.max_num_seqs, c.num_blocks * c.block_size, "sim")

    async def run(self, job: Job, emit: Emit) -> Outcome:
        """Runs one call. `ttft_ms` is the real time until its first new token."""
        began = time.perf_counter()
        if self._gone:
            raise EngineDied(self._gone)
        request = read(job, self.config)
        self._inject(request)
        live = _Live(job, request, _publisher(job, request, emit, self.config.model), began, request.published)
        if self._instant:
            if request.fatal:
                self._die()
                raise EngineDied(self._gone)
            live.finish()
            self._rate.add(live.done - request.published, began)
        else:
            await self._in_batch(live)
        return live.outcome()

    def abort(self, key: str) -> None:
        """Stops a call at once. The output of the step in progress is lost."""
        if (live := self._live.get(key)) is not None and not self._stalled:
            live.aborted = True
            live.settle()

    def load(self) -> EngineLoad:
        """`tokens_per_s` counts output tokens in real time."""
        speed = self._meter.speed if self._meter.measured else None
        return EngineLoad(self._engine.kv_usage, self._rate.per_s(time.perf_counter()), speed)

    def preemption_threshold(self) -> tuple[int, int] | None:
        return self._engine.preemption_threshold()

    def progress(self) -> int:
        """Steps of the modelled engine."""
        return self._steps_done

    @property
    def gone(self) -> str:
        """Why no call can run; "" while it can."""
        return self._gone

    @property
    def running(self) -> int:
        """Calls in the batch."""
        return len(self._engine.running)

    @property
    def waiting(self) -> int:
        """Calls that wait for a slot or for KV blocks."""
        return self._engine.waiting

    async def died(self) -> str:
        """Waits until the engine dies."""
        await self._death.wait()
        return self._gone

    def kill(self, reason: str) -> None:
        """Failure injection: kills the engine with all of its calls."""
        self._lose(reason)
        self._death.set()

    def _die(self) -> None:
        if self.config.die_hard:
            os.kill(os.getpid(), signal.SIGKILL)
        self.kill("The prompt of a call had the text of die_on.")

    async def stop(self, grace_s: float) -> None:
        """Takes no more calls, gives running ones `grace_s` seconds, then ends the rest with EngineDied."""
        self._gone = self._gone or "The engine was stopped."
        if futures := [live.future for live in self._live.values()]:
            await asyncio.wait(futures, timeout=grace_s)
        self._lose(self._gone)
        if self._driver is not None:
            self._driver.cancel()
            await asyncio.wait([self._driver])
            self._driver = None

    def _lose(self, reason: str) -> None:
        self._gone = reason
        for live in self._live.values():
            live.settle(EngineDied(reason))

    def _inject(self, request: Request) -> None:
        c, text = self.config, request.prompt.text
        if c.stall_on and c.stall_on in text:
            self._stalled = True
        if c.hang_on and c.hang_on in text:
            time.sleep(_HANG_S)

    async def _in_batch(self, live: _Live) -> None:
        if not live.left:
            live.finish()  # an earlier attempt published all tokens, if not all text
            return
        key = live.job.key
        if key in self._live:
            raise EngineError(f"A job with the key {key} is already running.")
        call = live.enter(self._engine, self._now())
        self._live[key] = live
        self._wake.set()
        try:
            await live.future
        finally:
            del self._live[key]
            self._engine.remove(call)

    def _now(self) -> float:
        """The model's clock, in modelled seconds."""
        return time.perf_counter() * self.config.speed

    async def _drive(self) -> None:
        try:
            await self._steps()
        except Exception as e:  # otherwise all calls would hang without an error
            self.kill(f"The modelled engine failed: {type(e).__name__}: {e}")

    async def _steps(self) -> None:
        speed, now = self.config.speed, self._now()
        while True:
            step = self._engine.begin(now)
            if step is None:
                self._wake.clear()
                await self._wake.wait()
                now = self._now()
                continue
            await asyncio.sleep(max(0.0, (step.ends_at - self._now()) / speed))
            if self._stalled:
                await asyncio.Event().wait()
            self._steps_done += 1
            ended = self._engine.end(step)
            produced = [*ended, *(call for call in self._engine.running if call.phase is Phase.DECODE)]
            self._meter.add((step.ends_at - step.starts_at) / speed, step.ticks, step.prefill_tokens, len(produced))
            self._deliver(produced)
            now = max(step.ends_at, self._now() - _MAX_LAG_S * speed)

    def _deliver(self, produced: list[SimCall]) -> None:
        self._rate.add(len(produced), time.perf_counter())
        for call in produced:
            if (live := self._live.get(call.key)) is None:
                continue
            if live.request.fatal:
                self._die()
            live.advance()


@dataclass(slots=True, eq=False)
class _Live:
    """A job in the engine. `done` counts its output tokens, including those of earlier attempts."""

    job: Job
    request: Request
    publisher: _Silent
    began: float
    done: int
    first: float | None = None
    aborted: bool = False
    call: SimCall | None = None
    _future: asyncio.Future[None] | None = field(default=None, repr=False)

    @property
    def future(self) -> asyncio.Future[None]:
        if self._future is None:
            self._future = asyncio.get_running_loop().create_future()
        return self._future

    @property
    def left(self) -> int:
        return max(0, len(self.request.answer.ids) - self.done)

    def enter(self, engine: SimEngine, now: float) -> SimCall:
        """Joins the engine's queue. What earlier attempts published is computed again, as part of the prompt."""
        ids, prompt = self.request.answer.ids, self.request.prompt.tokens()
        job = self.job
        prompt, output = prompt + ids[: self.done], ids[self.done :]
        call = SimCall.of_ids(
            job.key,
            prompt,
            output,
            engine.config.block_size,
            priority=job.priority,
            level=job.level,
            program=job.program or job.session,
            inherited=job.inherited,
            waited_s=job.waited_ms / 1000,
            ran_s=job.ran_ms / 1000,
        )
        engine.add(call, now)
        self.call = call
        return call

    def advance(self) -> None:
        """Publishes one more token."""
        if self.future.done():  # aborted, but `run` has not left the engine yet
            return
        if self.first is None:
            self.first = time.perf_counter()
        self.done += 1
        try:
            self.publisher.token(self.done)
            if not self.left:
                self.publisher.end(self.counts())
        except Exception as e:  # an error of the caller's emit goes to the caller, not to the engine
            self.settle(e)
        if not self.left:
            self.settle()

    def finish(self) -> None:
        """Publishes all that is left, without the engine."""
        if self.left and self.first is None:
            self.first = time.perf_counter()
        total = len(self.request.answer.ids)
        self.publisher.tokens(self.done, total)
        self.done = max(self.done, total)
        self.publisher.end(self.counts())

    def settle(self, error: Exception | None = None) -> None:
        """Lets `run` return or raise."""
        if self.future.done():
            return
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)

    def counts(self) -> tuple[int, int, int]:
        """Prompt tokens, output tokens, and how many of the prompt tokens were cached."""
        prompt, total = self.request.prompt_tokens, len(self.request.answer.ids)
        cached = self.call.cached if self.call is not None else 0
        return prompt, min(self.done, total), max(0, min(cached, prompt))

    def outcome(self) -> Outcome:
        answer, counts = self.request.answer, self.counts()
        done = counts[1]
        whole = not self.aborted or not self.left
        reason = answer.finish_reason if whole else "abort"
        text, ids = (answer.text, answer.ids) if whole else (answer.text[: answer.chars(done)], answer.ids[:done])
        ttft = None if self.first is None else (self.first - self.began) * 1000
        return Outcome(reason, text, ids, *counts, ttft, self.publisher.response(text, reason, counts))


def _publisher(job: Job, request: Request, emit: Emit, model: str) -> _Silent:
    if job.kind != "generate":
        shape = Shape.of(job, model, request.created or int(time.time()))
        return _Chunks(request, emit, shape) if job.stream else _Document(request, emit, shape)
    return _Text(request, emit) if job.stream else _Silent(request, emit)


class _Silent:
    """Publishes a job's output while it runs; this base class publishes nothing."""

    __slots__ = ("answer", "emit", "request", "sent")

    def __init__(self, request: Request, emit: Emit) -> None:
        self.request = request
        self.answer = request.answer
        self.emit = emit
        self.sent = request.sent

    def token(self, done: int) -> None:
        """Publishes token number `done`, from 1."""

    def tokens(self, done: int, total: int) -> None:
        """Publishes all tokens after the first `done`."""

    def end(self, counts: tuple[int, int, int]) -> None:
        """Publishes what follows the last token."""

    def response(self, text: str, reason: str, counts: tuple[int, int, int]) -> dict[str, Any] | None:
        """The response body, for the OpenAI kinds."""
        return None

    def _new_text(self, done: int) -> str:
        upto = self.answer.released(done)
        text = self.answer.text[self.sent : upto]
        self.sent = upto
        return text


class _Text(_Silent):
    """`generate`, streamed."""

    __slots__ = ()

    def token(self, done: int) -> None:
        self.emit(Chunk(self._new_text(done), [self.answer.ids[done - 1]]))

    def tokens(self, done: int, total: int) -> None:
        for n in range(done + 1, total + 1):
            self.token(n)

    def end(self, counts: tuple[int, int, int]) -> None:
        if text := self._new_text(counts[1]):
            self.emit(Chunk(text))


class _Document(_Silent):
    """An OpenAI kind that does not stream."""

    __slots__ = ("shape",)

    def __init__(self, request: Request, emit: Emit, shape: Shape) -> None:
        super().__init__(request, emit)
        self.shape = shape

    def response(self, text: str, reason: str, counts: tuple[int, int, int]) -> dict[str, Any] | None:
        return self.shape.response(text, reason, usage(*counts))


class _Chunks(_Document):
    """An OpenAI kind, streamed. Each chunk's replay has the tokens and characters published so far."""

    __slots__ = ("opened",)

    def __init__(self, request: Request, emit: Emit, shape: Shape) -> None:
        super().__init__(request, emit, shape)
        self.opened = bool(request.created) or not shape.chat

    def token(self, done: int) -> None:
        if not self.opened:
            self.opened = True
            self._chunk(self.shape.role_chunk(), 0)
        text, last = self._new_text(done), done == len(self.answer.ids)
        if text or last:
            self._chunk(self.shape.text_chunk(text, self.answer.finish_reason if last else None), done)

    def tokens(self, done: int, total: int) -> None:
        for n in range(done + 1, total + 1):
            self.token(n)

    def end(self, counts: tuple[int, int, int]) -> None:
        # More published tokens than the answer has mean that an earlier attempt has sent this chunk, too.
        total = len(self.answer.ids)
        if self.shape.usage_wanted and self.request.published <= total:
            self._chunk(self.shape.usage_chunk(usage(*counts)), total + 1)

    def _chunk(self, chunk: str, tokens: int) -> None:
        self.emit(Chunk(document=chunk, replay=replay(tokens, self.sent, self.shape.created)))
