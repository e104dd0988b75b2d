"""The OpenAI kinds, through vLLM's own HTTP application: templates, tools, grammars and errors are vLLM's.

The application uses a proxy of the engine. The proxy sets a call's priority and program, counts its tokens and keeps
its partial text. For a stream that an earlier attempt began, it first yields the outputs of that attempt.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from functools import partial
from typing import Any

from rsm.workers.backends.base import CallRejected, Chunk, EngineDied, EngineError, Job, Outcome
from rsm.workers.backends.openai.wire import Assembler, SseParser, choice_text, document, error_inside, single_line
from rsm.workers.backends.vllm.asgi import post
from rsm.workers.backends.vllm.engine import CANNOT_RESUME, PROCESS_ENDED, Engine, explained, program_args
from rsm.workers.backends.vllm.reply import Counts, Replay, refusal, request
from rsm.workers.backends.vllm.resume import Outputs, resumed_outputs
from rsm.workers.scheduling.service import Used

PATHS = {
    "chat.completions": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
}
_current: ContextVar[OpenAICall | None] = ContextVar("rsm_openai_call", default=None)
_DONE = "[DONE]"
_ABORT_S = 1.0  # how long to wait for the partial output of an aborted request
_LEAVE_S = 5.0


class ProxyEngineClient:
    """The engine for vLLM's application. A context variable identifies the call."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **more: Any) -> Outputs:
        call = _current.get()
        if call is None:
            outputs: Outputs = self._llm.generate(prompt, sampling_params, request_id, **more)
            return outputs
        return call.generate(prompt, sampling_params, **more)

    def encode(self, prompt: Any, pooling_params: Any, request_id: str, **more: Any) -> AsyncGenerator[Any, None]:
        call = _current.get()
        if call is not None:
            request_id, more["priority"] = call.new_request_id(several=False), call.priority
        outputs: AsyncGenerator[Any, None] = self._llm.encode(prompt, pooling_params, request_id, **more)
        return outputs


class OpenAICall:
    """One call. `abort` may be called at any time."""

    def __init__(self, engine: Engine, job: Job, emit: Callable[[Chunk], None]) -> None:
        self._engine = engine
        self._job = job
        self._emit = emit
        self.priority = engine.priority(job)
        self._counts = Counts(time.perf_counter())
        self._replay = Replay.of(job)
        self._disconnected = asyncio.Event()
        self._ids: list[str] = []
        self._several = False
        self._aborted = False  # by `abort`
        self._cut = False  # its output ended with an abort, for any reason
        self._aborting: asyncio.Task[Any] | None = None
        self._failure: Exception | None = None
        self._status = 0
        self._streams = False
        self._body = bytearray()
        self._events = SseParser()
        self._assembler = Assembler()
        self._chunks = 0

    # -- from the backend

    async def run(self) -> Outcome:
        """Runs the call to its end.

        Raises:
            CallRejected, EngineError, EngineDied: see there.
        """
        if self._job.resumed is not None and self._job.resumed.chunks and not self._replay.published:
            raise CallRejected(CANNOT_RESUME)
        body = request(self._job, self._engine.model)
        task = asyncio.create_task(self._exchange(body))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._disconnected.set()
            await asyncio.wait([task], timeout=_LEAVE_S)
            raise
        except Exception as e:
            self._failure = self._failure or explained(e, self._engine.dead)
        return self._outcome()

    def used(self) -> Used:
        """What it has used so far."""
        return self._counts.used()

    def abort(self) -> None:
        if self._aborted:
            return
        self._aborted = True
        if not self._ids or self._several:
            # Several choices share one request, which vLLM does not clean up if it is aborted by its id.
            self._disconnected.set()
            return
        # An abort by id returns the partial output; a disconnect returns nothing.
        self._aborting = asyncio.ensure_future(self._engine.llm.abort(self._ids))
        asyncio.get_running_loop().call_later(_ABORT_S, self._disconnected.set)

    # -- from vLLM's application, through the proxy

    def new_request_id(self, several: bool) -> str:
        """An id for one more request in the engine. It is unique even if an older attempt still runs."""
        if self._aborted:
            self._disconnected.set()
        self._several = self._several or several
        self._ids.append(f"{self._job.key}#{len(self._ids)}")
        return self._ids[-1]

    def generate(self, prompt: Any, params: Any, **more: Any) -> Outputs:
        number = len(self._ids)
        name = self.new_request_id(params.n != 1 or number > 0)
        params.extra_args = program_args(self._job, params.extra_args)
        more["priority"] = self.priority
        start = partial(self._start, name, more)
        if not self._replay.published:
            return self._watched(start(prompt, params), number)
        if number or "prompt_token_ids" not in prompt:
            raise self._failed(CallRejected(CANNOT_RESUME))
        engine, replay = self._engine, self._replay
        outputs = resumed_outputs(
            start, engine.tokenizer, prompt, params, replay.published, engine.max_len, replay.cached_tokens
        )
        return self._watched(outputs, number)

    def _start(self, name: str, more: dict[str, Any], prompt: Any, params: Any) -> Outputs:
        outputs: Outputs = self._engine.llm.generate(prompt, params, name, **more)
        return outputs

    async def _watched(self, outputs: Outputs, number: int) -> Outputs:
        async with aclosing(outputs):
            try:
                async for output in outputs:
                    self._counts.add(output, number)
                    self._cut = self._cut or any(one.finish_reason == "abort" for one in output.outputs)
                    if not self._several and self._job.stream:
                        self._replay.record(output)
                    yield output
            except CallRejected as e:
                raise self._failed(e) from e

    def _failed(self, e: Exception) -> Exception:
        """Keeps an error, because vLLM's application would turn it into an HTTP status."""
        self._failure = self._failure or e
        return e

    # -- the exchange

    async def _exchange(self, body: bytes) -> None:
        _current.set(self)
        job = self._job
        headers = [(b"x-request-id", job.call_id.encode("ascii", "replace"))]  # the same for every attempt
        if self._engine.trace_headers(job):
            headers.append((b"traceparent", job.traceparent.encode("ascii", "replace")))
        await post(self._engine.app, PATHS[job.kind], body, headers, self._on_start, self._on_body, self._disconnected)

    def _on_start(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status = status
        self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")

    def _on_body(self, data: bytes) -> None:
        if not self._streams:
            self._body += data
            return
        try:
            for event in self._events.feed(data):
                self._on_event(event)
        except EngineError as e:
            self._failed(e)

    def _on_event(self, data: str) -> None:
        # After an abort vLLM sends the end of the stream. It must not be published, because the call may be resumed.
        if data == _DONE or self._failure is not None or self._cut:
            return
        doc = document(data)
        if error_inside(doc) is not None:
            code = doc["error"].get("code") if isinstance(doc.get("error"), dict) else None
            self._failed(refusal(code if isinstance(code, int) else 500, data.encode(), self._job.kind))
            return
        if self._replay.created:
            doc["created"] = self._replay.created
            data = json.dumps(doc, separators=(",", ":"), ensure_ascii=False)
        self._assembler.add(doc)
        self._counts.note_usage(doc)
        self._chunks += 1
        if self._chunks > self._replay.chunks:
            self._emit(Chunk(document=single_line(data), replay=self._replay.line(doc, self._counts.cached_tokens)))

    # -- the end

    def _outcome(self) -> Outcome:
        if self._aborted and (self._cut or self._failure is not None or not self._complete()):
            return self._partial()
        if self._failure is None and self._status != 200:
            self._failure = refusal(self._status, bytes(self._body), self._job.kind)
        if self._engine.dead and (self._cut or isinstance(self._failure, EngineError)):
            raise EngineDied(PROCESS_ENDED) from self._failure
        if self._failure is not None:
            raise self._failure
        if self._cut:
            self._engine.ending = True
            return self._partial()
        return self._streamed() if self._streams else self._whole()

    def _partial(self) -> Outcome:
        """The outcome of an aborted call. For a stream it has the published text, which may lack the text that arrived
        with the abort."""
        return self._counts.outcome("abort", self._assembler.text if self._streams else self._counts.text)

    def _complete(self) -> bool:
        """Whether the answer is complete. After a disconnect the application answers `null`."""
        if self._streams:
            return self._assembler.finished
        return self._status == 200 and bytes(self._body) != b"null"

    def _streamed(self) -> Outcome:
        if not self._assembler.finished:
            raise EngineError("vLLM ended a stream before its answer was complete.")
        response = self._assembler.response(self._counts.usage())
        return self._counts.outcome(self._assembler.finish_reason, self._assembler.text, response)

    def _whole(self) -> Outcome:
        response = document(bytes(self._body))
        self._counts.note_usage(response)
        choice: dict[str, Any] = next(iter(response.get("choices") or ()), {})
        return self._counts.outcome(choice.get("finish_reason") or "stop", choice_text(choice), response)
