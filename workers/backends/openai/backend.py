"""A remote OpenAI-compatible server as an engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from pydantic import SecretStr

from rsm.broker.protocol.ids import shorten
from rsm.workers.backends.base import (
    Backend,
    CallRejected,
    Chunk,
    EngineDied,
    EngineError,
    EngineFacts,
    EngineLoad,
    EngineMisconfigured,
    Job,
    Outcome,
)
from rsm.workers.backends.openai import about
from rsm.workers.backends.openai.about import About
from rsm.workers.backends.openai.calls import Exchange, exchange
from rsm.workers.backends.openai.resume import CANNOT_RESUME
from rsm.workers.backends.openai.wire import MAX_BYTES, SseParser, document, error, error_inside, readable
from rsm.workers.environment import API_KEY_VARIABLE
from rsm.workers.meters.rate import RateMeter

if TYPE_CHECKING:
    import httpx


_DONE = "[DONE]"
_SLOTS = 256  # for a server that does not report how many calls it runs at once
_CLOSE_S = 5.0  # the time to close the connections of stopped calls
# Servers that can continue a partial message of the assistant: vLLM, and the modelled engine's server.
_CONTINUE_CHATS = frozenset({"vllm", "rsm-engine"})
_RETRY_S = 0.2  # between two tries to reach a server at the start

log = logging.getLogger("rsm.worker")


def _is_alive(status: int) -> bool:
    """Whether this answer to a health check shows a live server. A 5xx may come from a proxy in front of it."""
    return 0 < status < 500


@dataclass(slots=True)
class _Run:
    """A call in progress."""

    # Not a timeout, but a scope that `end` can close from outside, and that differs from a cancelled caller.
    scope: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))
    done: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False
    aborted: bool = False

    def end(self, aborted: bool) -> None:
        """Closes the connection at once. The first reason counts."""
        if not self.ended:
            self.ended, self.aborted = True, aborted
            self.scope.reschedule(0)


class OpenAIBackend(Backend):
    """One remote server.

    Args:
        base_url: with the version, such as `https://host/v1`.
        model: the model for bodies that name none; "" = the first one that the server lists.
        api_key: sent as a bearer token. Default: the value of RSM_OPENAI_API_KEY.
        max_num_seqs: calls sent to the server at once. Default: what the server reports, otherwise 256.
        kv_tokens: the capacity of its KV cache. Default: what the server reports, otherwise unknown.
        timeout_s: how long the server may be silent during a call.
        connect_s: how long `start` waits for a server that does not answer.
        health_s: the time between two health checks, and the time limit of each.
        health_misses: failed health checks in a row after which the server counts as dead.

    Raises:
        ValueError: the URL is invalid, or has a password, which would end up in logs.
    """

    def __init__(
        self,
        base_url: str,
        model: str = "",
        *,
        api_key: SecretStr | None = None,
        max_num_seqs: int | None = None,
        kv_tokens: int | None = None,
        timeout_s: float = 600.0,
        connect_s: float = 60.0,
        health_s: float = 5.0,
        health_misses: int = 3,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("base_url must be a URL such as http://host:8000/v1.")
        if parts.username or parts.password:
            raise ValueError(f"Set the key in {API_KEY_VARIABLE}, not in the URL: URLs end up in logs.")
        self._base_url = base_url.rstrip("/")
        self._where = parts.netloc or base_url
        self._model = model
        self._key = api_key or SecretStr("")
        self._max_num_seqs = max_num_seqs
        self._kv_tokens = kv_tokens
        self._timeout_s = timeout_s
        self._connect_s = connect_s
        self._health_s = health_s
        self._health_misses = health_misses
        self._misses = 0
        self._is_vllm = False
        self._continues_chats = False
        self._client: httpx.AsyncClient | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._check: asyncio.Task[bool] | None = None
        self._runs: dict[str, _Run] = {}
        self._rate = RateMeter()
        self._death = asyncio.Event()
        self._facts = EngineFacts(model, 0)
        self._gone = "The engine was not started."  # why no call can run; "" while it can

    async def start(self) -> EngineFacts:
        """Connects, and asks the server for its models. Waits for a server that is still starting.

        Raises:
            EngineDied: there is no answer within `connect_s`.
            EngineMisconfigured: httpx is missing, the key is refused, or the server does not serve the model.
        """
        self._client = self._connect()
        try:
            await self._identify(self._client)
        except BaseException:
            await self._client.aclose()
            raise
        self._gone, self._misses = "", 0
        self._death.clear()
        self._watcher = asyncio.create_task(self._watch(), name="openai-health")
        return self._facts

    async def run(self, job: Job, emit: Callable[[Chunk], None]) -> Outcome:
        """Runs one call on the server. `ttft_ms` is the time until the first text of a stream."""
        if self._gone:
            raise EngineDied(self._gone)
        ex = exchange(job, self._model, self._is_vllm, self._continues_chats)
        if ex.complete:
            return ex.outcome()
        run = _Run()
        try:
            async with run.scope:
                self._runs[job.key] = run
                await self._converse(ex, job, emit)
        except TimeoutError:
            if not run.aborted:
                raise EngineDied(self._gone) from None
        finally:
            run.done.set()
            self._runs.pop(job.key, None)
        with readable():
            return ex.outcome(run.aborted)

    def abort(self, key: str) -> None:
        """Closes the call's connection at once, which aborts the call on the server."""
        if (run := self._runs.get(key)) is not None:
            run.end(aborted=True)

    def load(self) -> EngineLoad:
        """Output tokens per second of this worker's calls. The use of the server's cache is unknown."""
        return EngineLoad(0.0, self._rate.per_s(time.perf_counter()))

    async def died(self) -> str:
        """Waits until `health_misses` health checks in a row fail, or the one right after a failed call."""
        await self._death.wait()
        return self._gone

    async def stop(self, grace_s: float) -> None:
        """Takes no more calls, gives running ones `grace_s` seconds, then ends the rest with EngineDied."""
        self._gone = self._gone or "The engine was stopped."
        await self._settle(grace_s)
        self._lose(self._gone)
        await self._settle(_CLOSE_S)
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        if self._client is not None:
            await self._client.aclose()
        self._watcher = self._client = None

    async def _settle(self, timeout_s: float) -> None:
        """Waits until no call is running, at most `timeout_s` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for run in list(self._runs.values()):
                    await run.done.wait()

    def _die(self, reason: str) -> None:
        self._lose(self._gone or reason)
        self._death.set()

    def _lose(self, reason: str) -> None:
        self._gone = reason
        for run in self._runs.values():
            run.end(aborted=False)

    # -- the server

    def _connect(self) -> httpx.AsyncClient:
        try:
            import httpx
        except ImportError as e:
            raise EngineMisconfigured("A remote server needs httpx: pip install 'rsm-engine[openai]'.") from e
        key = self._key.get_secret_value()
        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self._timeout_s, connect=10.0, pool=None),
            # The worker limits the calls. A full pool would delay the health check and make a live server look dead.
            limits=httpx.Limits(max_connections=None),
        )

    async def _identify(self, client: httpx.AsyncClient) -> None:
        status, models = await self._first_answer(client)
        if status in (401, 403):
            raise EngineMisconfigured(f"{self._where} refuses the API key; set {API_KEY_VARIABLE}.")
        if not _is_alive(status):
            raise EngineDied(
                f"No OpenAI-compatible server answers at {self._where} (waited {self._connect_s:g} s). "
                "Check that it is running and that base_url ends in /v1."
            )
        owners = {m.get("owned_by") for m in models if isinstance(m.get("owned_by"), str)}
        self._is_vllm = "vllm" in owners
        self._continues_chats = bool(owners & _CONTINUE_CHATS)
        served = [str(m["id"]) for m in models if m.get("id")]
        self._model = self._model or next(iter(served), "")
        if not self._model:
            raise EngineMisconfigured(f"{self._where} lists no models; set model to the one to use.")
        if served and self._model not in served:
            raise EngineMisconfigured(
                f"{self._where} serves no model {shorten(self._model)}, but {shorten(', '.join(served), 200)}. "
                "Set model to one of these; calls can use another name if you set served_model_name."
            )
        reported = About()
        if self._max_num_seqs is None or self._kv_tokens is None:
            reported = await about.fetch(client, self._base_url, self._health_s)
        slots = self._max_num_seqs or reported.slots or _SLOTS
        kv_tokens = reported.kv_tokens if self._kv_tokens is None else self._kv_tokens
        self._facts = EngineFacts(self._model, slots, kv_tokens, "vllm" if self._is_vllm else "openai")

    async def _first_answer(self, client: httpx.AsyncClient) -> tuple[int, list[dict[str, Any]]]:
        """Repeats `_models` until the server answers, for at most `connect_s` seconds."""
        until, logged = time.monotonic() + self._connect_s, False
        while True:
            found = await self._models(client)
            if _is_alive(found[0]) or time.monotonic() > until:
                return found
            if not logged:
                log.warning("waiting at most %.0f s for a server at %s", self._connect_s, self._where)
                logged = True
            await asyncio.sleep(_RETRY_S)

    async def _models(self, client: httpx.AsyncClient) -> tuple[int, list[dict[str, Any]]]:
        """The status of GET /models, 0 without an answer, and the listed models."""
        import httpx

        try:
            reply = await client.get(f"{self._base_url}/models", timeout=self._health_s)
        except (httpx.HTTPError, httpx.InvalidURL):
            return 0, []
        try:
            listed = document(reply.content).get("data") if reply.is_success else None
        except EngineError:  # not JSON, but the server is reachable
            listed = None
        return reply.status_code, [m for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []

    async def _watch(self) -> None:
        while self._client is not None:
            await asyncio.sleep(self._health_s)
            status, _ = await self._models(self._client)
            self._misses = 0 if _is_alive(status) else self._misses + 1
            if self._misses >= self._health_misses:
                self._die(f"{self._where} has not answered {self._misses} health checks in a row.")
                return

    async def _is_reachable(self) -> bool:
        """Whether the server answers now. Checked once for all calls that failed at the same time."""
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._check_now(), name="openai-check")
        return await asyncio.shield(self._check)

    async def _check_now(self) -> bool:
        if self._client is None:
            return False
        return _is_alive((await self._models(self._client))[0])

    # -- one call

    async def _converse(self, ex: Exchange, job: Job, emit: Callable[[Chunk], None]) -> None:
        import httpx

        try:
            await self._exchange(ex, job, emit)
        except httpx.HTTPError as e:
            # Ignored once the answer is complete; only the end of the stream is missing then.
            if not ex.finished:
                raise await self._lost(ex, job, f"The connection to {self._where} failed: {type(e).__name__}.") from e
        except EngineError as e:
            raise await self._lost(ex, job, str(e)) from e
        if not ex.streams:
            self._rate.add(ex.tokens(), time.perf_counter())

    async def _lost(self, ex: Exchange, job: Job, why: str) -> CallRejected | EngineError | EngineDied:
        """The error for a failed call: its server died with all of its calls, or only this attempt failed."""
        died = not await self._is_reachable()
        if died:
            self._die(f"{self._where} no longer answers.")
        # With on_engine_loss "restart" or "fail" the call need not be resumable.
        if ex.resumable or job.on_engine_loss == "restart" or (died and job.on_engine_loss == "fail"):
            return EngineDied(self._gone) if died else EngineError(why)
        return CallRejected(CANNOT_RESUME)

    async def _exchange(self, ex: Exchange, job: Job, emit: Callable[[Chunk], None]) -> None:
        if self._client is None:
            raise EngineDied(self._gone)
        headers = {"Content-Type": "application/json"}
        if job.traceparent:
            headers["traceparent"] = job.traceparent
        url, content = self._base_url + ex.path, ex.content()
        async with self._client.stream("POST", url, content=content, headers=headers) as reply:
            if reply.status_code != 200:
                raise error(reply.status_code, await _whole(reply), self._key.get_secret_value())
            if ex.streams:
                await self._read_stream(ex, reply, emit)
            else:
                data = await _whole(reply)
                with readable():
                    ex.whole(data)

    async def _read_stream(self, ex: Exchange, reply: httpx.Response, emit: Callable[[Chunk], None]) -> None:
        parser = SseParser()
        chunks_of_bytes = cast("AsyncGenerator[bytes, None]", reply.aiter_bytes())
        async with aclosing(chunks_of_bytes) as chunks:
            async for data in chunks:
                self._misses = 0  # a server that is answering is alive, even if its health check is late
                if self._take(ex, parser.feed(data), emit):
                    return
        if not self._take(ex, parser.close(), emit) and not ex.finished:
            raise EngineError(f"{self._where} ended its stream before the answer was complete.")

    def _take(self, ex: Exchange, events: list[str], emit: Callable[[Chunk], None]) -> bool:
        """Publishes events. True after the last one."""
        for data in events:
            if data == _DONE:
                return True
            doc = document(data)
            if (failure := error_inside(doc, self._key.get_secret_value())) is not None:
                raise failure
            before = ex.tokens()
            with readable():
                chunk = ex.chunk(doc, data)
            self._rate.add(max(0, ex.tokens() - before), time.perf_counter())
            if chunk is not None:
                emit(chunk)
        return False


async def _whole(reply: httpx.Response) -> bytes:
    """Reads the body of a reply.

    Raises:
        EngineError: it is larger than MAX_BYTES.
    """
    parts: list[bytes] = []
    size = 0
    async for part in reply.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise EngineError(f"The server sent a body of more than {MAX_BYTES >> 20} MiB.")
    return b"".join(parts)
