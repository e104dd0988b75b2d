"""A modelled engine behind OpenAI's HTTP API, like `vllm serve`, for tests and benchmarks on a machine without a GPU.

GET /health, /v1/models, /metrics (with vLLM's names); POST /v1/chat/completions, /v1/completions, /tokenize.
When a client disconnects, its call is aborted.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rsm.broker.errors import InvalidRequest
from rsm.broker.protocol.ids import new_id
from rsm.workers.backends.base import CallRejected, Chunk, EngineDied, EngineError, Job, Outcome
from rsm.workers.backends.sim.backend import SimBackend
from rsm.workers.backends.sim.request import read_prompt

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

MISSING = "The server of a modelled engine needs starlette and uvicorn: pip install 'rsm-engine[server]'"
_KINDS = {"/v1/chat/completions": "chat.completions", "/v1/completions": "completions"}
_BACKLOG = 2048

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(slots=True)
class Totals:
    """The engine's totals since its start; the counters of /metrics."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.prompt_tokens += outcome.prompt_tokens
        self.generation_tokens += outcome.completion_tokens
        self.cached_tokens += outcome.cached_tokens
        self.finished[outcome.finish_reason] += 1


class SimServer:
    """The HTTP API of one modelled engine. `app` is an ASGI application. Start the backend first."""

    def __init__(self, backend: SimBackend) -> None:
        self.backend = backend
        self.model = backend.config.model
        self.totals = Totals()
        self.app = self._application()

    def _application(self) -> Starlette:
        from starlette.applications import Starlette
        from starlette.routing import Route

        routes = [Route(path, self._call, methods=["POST"]) for path in _KINDS]
        routes.append(Route("/tokenize", self._tokenize, methods=["POST"]))
        routes += [Route("/health", self._health), Route("/v1/models", self._models), Route("/metrics", self._metrics)]
        return Starlette(routes=routes)

    async def _health(self, _: Request) -> Any:
        from starlette.responses import Response

        return Response(status_code=503 if self.backend.gone else 200)

    async def _models(self, _: Request) -> Any:
        from starlette.responses import JSONResponse

        card = {"id": self.model, "object": "model", "created": int(time.time()), "owned_by": "rsm-engine"}
        card["max_model_len"] = self.backend.config.max_len
        return JSONResponse({"object": "list", "data": [card]})

    async def _metrics(self, _: Request) -> Any:
        from starlette.responses import PlainTextResponse

        return PlainTextResponse(metrics(self), media_type="text/plain; version=0.0.4")

    async def _tokenize(self, request: Request) -> Any:
        """vLLM's tokenize API, which routers that schedule by size use."""
        from starlette.responses import JSONResponse

        try:
            job = read_job("", await request.body(), self.model)
            kind = "chat.completions" if "messages" in job.body else "completions"
            tokens = read_prompt(replace(job, kind=kind)).tokens()
        except (CallRejected, UnknownModel) as e:
            return refusal(e)
        return JSONResponse({"count": len(tokens), "max_model_len": self.backend.config.max_len, "tokens": tokens})

    async def _call(self, request: Request) -> Any:
        try:
            return _Reply(self, read_job(_KINDS[request.url.path], await request.body(), self.model))
        except (CallRejected, UnknownModel) as e:
            return refusal(e)


@dataclass(slots=True)
class _Reply:
    """The response to one call, as an ASGI application, so that it notices a disconnect, streaming or not."""

    server: SimServer
    job: Job

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        backend, key = self.server.backend, self.job.key
        chunks: asyncio.Queue[Chunk | None] = asyncio.Queue()
        run = asyncio.create_task(backend.run(self.job, chunks.put_nowait))
        run.add_done_callback(lambda _: chunks.put_nowait(None))
        disconnected = asyncio.create_task(_disconnected(receive))
        disconnected.add_done_callback(lambda _: backend.abort(key))
        try:
            response = await (self._stream(chunks, run, send) if self.job.stream else self._whole(run))
            if response is not None:
                await response(scope, receive, send)
        finally:
            disconnected.cancel()  # which aborts the call if it still runs
            await asyncio.wait([run])

    async def _whole(self, run: asyncio.Task[Outcome]) -> Any:
        from starlette.responses import JSONResponse

        try:
            outcome = await run
        except (CallRejected, EngineError, EngineDied) as e:
            return refusal(e)
        self.server.totals.add(outcome)
        return JSONResponse(outcome.response)

    async def _stream(self, chunks: asyncio.Queue[Chunk | None], run: asyncio.Task[Outcome], send: Send) -> Any:
        """Sends the stream; returns the response to send instead if the call failed before its first chunk."""
        began = False
        while (chunk := await chunks.get()) is not None:
            if not began:
                began = True
                await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
            await _event(send, chunk.document)
        try:
            outcome = await run
        except (CallRejected, EngineError, EngineDied) as e:
            if not began:
                return refusal(e)
            await _event(send, json.dumps(error_object(500, str(e), "InternalServerError")))
        else:
            self.server.totals.add(outcome)
            if not began:  # the client disconnected before the first chunk
                return None
            await _event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return None


_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


async def _event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def _disconnected(receive: Receive) -> None:
    """Waits until the client disconnects. The request's body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


# -- requests and errors


class UnknownModel(Exception):
    """The call names a model that this server does not serve."""


def read_job(kind: str, content: bytes, model: str) -> Job:
    """Reads the job from a request's body.

    Raises:
        CallRejected: it is not a JSON object.
        UnknownModel: see there.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise CallRejected("The body is not JSON.") from e
    if not isinstance(body, dict):
        raise CallRejected("The body must be a JSON object.")
    if body.get("model") not in (None, "", model):
        raise UnknownModel(f"The model {str(body['model'])[:100]!r} does not exist; this server serves {model!r}.")
    call_id = new_id()
    return Job(call_id, call_id, call_id, kind, body, stream=bool(body.get("stream")))


def refusal(error: Exception) -> Any:
    """The response to a call that did not run."""
    if isinstance(error, CallRejected):
        return failure(400, str(error), "BadRequestError")
    if isinstance(error, UnknownModel):
        return failure(404, str(error), "NotFoundError")
    return failure(503 if isinstance(error, EngineDied) else 500, str(error), "InternalServerError")


def failure(status: int, message: str, kind: str) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(error_object(status, message, kind), status)


def error_object(status: int, message: str, kind: str) -> dict[str, Any]:
    """OpenAI's error object, with the fields that vLLM sets."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


# -- metrics


def metrics(server: SimServer) -> str:
    """Prometheus text with the vLLM metrics that routers and dashboards read."""
    backend, totals, config = server.backend, server.totals, server.backend.config
    blocks = f'block_size="{config.block_size}",num_gpu_blocks="{config.num_blocks}"'
    finished: list[tuple[str, float]] = [
        (f'finished_reason="{reason}"', n) for reason, n in sorted(totals.finished.items())
    ]
    families: list[tuple[str, str, list[tuple[str, float]]]] = [
        ("num_requests_running", "gauge", [("", backend.running)]),
        ("num_requests_waiting", "gauge", [("", backend.waiting)]),
        ("kv_cache_usage_perc", "gauge", [("", backend.load().kv_usage)]),
        ("prompt_tokens_total", "counter", [("", totals.prompt_tokens)]),
        ("generation_tokens_total", "counter", [("", totals.generation_tokens)]),
        ("prefix_cache_queries_total", "counter", [("", totals.prompt_tokens)]),
        ("prefix_cache_hits_total", "counter", [("", totals.cached_tokens)]),
        ("request_success_total", "counter", finished),
        ("cache_config_info", "gauge", [(blocks, 1)]),
    ]
    common = f'engine="0",model_name="{_escaped(server.model)}"'
    lines = []
    for name, kind, samples in families:
        lines.append(f"# TYPE vllm:{name} {kind}")
        lines += [f"vllm:{name}{{{common}{',' * bool(more)}{more}}} {value}" for more, value in samples]
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# -- the process


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket; port 0 = any free one.

    Raises:
        InvalidRequest: it cannot listen on this address.
    """
    try:
        listener = socket.create_server((host, port), backlog=_BACKLOG)
    except (OSError, OverflowError) as e:
        raise InvalidRequest(f"Cannot listen on {host}:{port}: {e}. Choose another host or port.") from None
    # Connections inherit it. asyncio sets it only if the socket names its protocol, which this one does not. Without
    # it, a response's body waits about 40 ms for the client's delayed acknowledgement of its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def serve(
    backend: SimBackend, host: str, port: int, grace_s: float, announce: Callable[[int], None] = lambda port: None
) -> None:
    """Serves until SIGTERM or SIGINT; then open calls have `grace_s` seconds.

    Args:
        announce: called with the port once the server listens.

    Raises:
        InvalidRequest: the extra `server` is not installed, or the server cannot listen on this address.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as e:
        raise InvalidRequest(MISSING) from e
    with listen(host, port) as listener:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # uvicorn handles them and raises them again after its shutdown
        announce(listener.getsockname()[1])
        await backend.start()
        try:
            config = uvicorn.Config(
                SimServer(backend).app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=max(1, round(grace_s)),
            )
            await uvicorn.Server(config).serve(sockets=[listener])
        finally:
            await backend.stop(0)
