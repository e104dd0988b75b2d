"""`MultiEngineManager`: many engines behind one object, for a frontend like that of the Autellix paper."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rsm.broker import AsyncCall, AsyncClient, Delta, Settings
from rsm.broker.client.request import Prompt
from rsm.broker.errors import RsmError
from rsm.broker.protocol.models import CallResult
from rsm.broker.views.monitor import Monitor
from rsm.engine.fleet import START_TIMEOUT_S, Fleet
from rsm.workers.config import EngineConfig

if TYPE_CHECKING:
    from rsm.workers.supervision.node import NodeClient

_CLOSE_S = 5.0


class RequestFuture(asyncio.Task[CallResult]):
    """The future that `submit_request` returns. Awaiting it gives the result; cancelling it does not cancel the call.

    Attributes:
        request_id: the id of the call, for `cancel_request`.
        session_id: the session of the call.
    """

    def __init__(self, call: AsyncCall) -> None:
        super().__init__(call.result())
        self.request_id = call.id
        self.session_id = call.session


class MultiEngineManager:
    """Owns a fleet of engines and sends calls to it.

    Args:
        engine_configs: the engines to start with.
        cache_token_threshold: prompts of up to this many tokens go to the least loaded engine, longer ones to the one
            with their session's cache. Default: RSM_CACHE_TOKEN_THRESHOLD, otherwise 2048.
        redis_url: the URL of an external Redis. Default: a private embedded server.
        settings: all other settings. Default: the RSM_* environment.
        routers: the number of router processes.
        start_timeout: how long an engine may take to start, in seconds.
    """

    def __init__(
        self,
        engine_configs: Sequence[EngineConfig] = (),
        cache_token_threshold: int | None = None,
        redis_url: str | None = None,
        *,
        settings: Settings | None = None,
        routers: int = 1,
        start_timeout: float = START_TIMEOUT_S,
    ) -> None:
        base = (settings or Settings()).with_redis(redis_url)
        if cache_token_threshold is not None:
            base = base.model_copy(update={"cache_token_threshold": cache_token_threshold})
        self._fleet = Fleet(base, routers=routers)
        self._configs = list(engine_configs)
        self._start_timeout = start_timeout
        self._started = False
        self._remote: dict[str, str] = {}
        self._client: AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- start and stop

    @property
    def settings(self) -> Settings:
        """The settings with the URL of the Redis in use, for example for an `rsm.broker.Client` in another thread."""
        return self._fleet.settings

    def start(self) -> None:
        """Starts the embedded Redis if there is one, the routers, and a worker process per engine; returns once all
        engines are READY.

        Raises:
            EngineFailed: an engine did not start; everything is stopped again.
            BrokerUnavailable: no Redis.
            EvictingRedis: Redis would delete calls when its memory is full.
        """
        self._fleet.start(self._configs, self._start_timeout)
        self._started = True

    def stop(self) -> None:
        """Drains and stops everything that this manager started, within the grace period. No process is left."""
        for engine_id, node in list(self._remote.items()):
            with contextlib.suppress(RsmError):
                self._node(node).stop_engine(engine_id)
        self._remote.clear()
        self._fleet.stop_processes()
        self._close_client()  # after the drain, because until then it gets the events of calls that finish
        self._fleet.stop()
        self._started = False

    async def __aenter__(self) -> MultiEngineManager:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    def add_engine(self, config: EngineConfig, node: str | None = None) -> None:
        """Adds an engine. Before `start` it is only noted; later this returns once the engine is READY.

        Args:
            node: the name of the host to start it on, where `rsm node` runs. Default: this host.

        Raises:
            EngineFailed: it did not start, its id is in use, or the node is not listening.
            InvalidRequest: a node is named, but the extra [node] is not installed here.
        """
        if node is not None:
            self._require_started("add_engine(node=…)")
            self._node(node).start_engine(config, self._start_timeout)
            self._remote[config.engine_id] = node
        elif self._started:
            self._fleet.add(config)
            self._fleet.wait_ready(config.engine_id, self._start_timeout)
        else:
            self._configs.append(config)

    def remove_engine(self, engine_id: str, drain: bool = True) -> None:
        """Removes an engine. With `drain` its running calls finish first; otherwise other engines run them again.

        Raises:
            EngineFailed: this manager has no such engine.
        """
        if engine_id in self._remote:
            self._node(self._remote[engine_id]).stop_engine(engine_id, drain=drain)
            del self._remote[engine_id]
        elif self._started:
            self._fleet.remove(engine_id, drain)
        else:
            self._configs = [c for c in self._configs if c.engine_id != engine_id]

    # -- calls

    async def submit_request(
        self,
        session_id: str,
        prompt: Prompt,
        sampling_params: Mapping[str, Any] | None = None,
        priority: int = 0,
        request_id: str | None = None,
        deadline: float | None = None,
        **options: Any,
    ) -> RequestFuture:
        """Submits one call and returns a future at once. Awaiting the future gives the result.

        Args:
            prompt: text or token ids; for the OpenAI kinds, such as `kind="chat.completions"`, the request body.
            priority: lower is earlier, from -128 to 127.
            deadline: seconds from now. If the call has not finished by then, it fails with `deadline_exceeded`. The
                same as `timeout` elsewhere.
            options: `kind`, `model`, `prompt_tokens`, `traceparent`, `on_engine_loss`, `parent_session`, as
                `rsm.broker.Client.submit` takes them.

        Raises:
            InvalidRequest, Conflict, BrokerUnavailable: see `rsm.broker.Client.submit`. The future raises CallCancelled
            or CallFailed, both with the record and the partial text.
        """
        call = await self._submit(session_id, prompt, sampling_params, priority, request_id, deadline, options)
        future = RequestFuture(call)
        future.add_done_callback(_retrieve_error)
        return future

    async def stream_request(
        self,
        session_id: str,
        prompt: Prompt,
        sampling_params: Mapping[str, Any] | None = None,
        priority: int = 0,
        request_id: str | None = None,
        deadline: float | None = None,
        **options: Any,
    ) -> AsyncIterator[Delta]:
        """Submits one call and yields its deltas as they arrive. Arguments and errors are those of `submit_request`."""
        options["stream"] = True
        call = await self._submit(session_id, prompt, sampling_params, priority, request_id, deadline, options)
        async for delta in call.stream():
            yield delta

    async def cancel_request(self, request_id: str, reason: str = "") -> bool:
        """Cancels a call. True if it is, or is about to be, CANCELLED. Its record keeps the partial text."""
        return await self._get_client().cancel(request_id, reason)

    async def cancel_session(self, session_id: str, reason: str = "", *, descendants: bool = True) -> int:
        """Cancels all calls of a session and, with `descendants`, of its sub-agents; returns how many."""
        return await self._get_client().cancel_session(session_id, reason, descendants=descendants)

    # -- status

    def get_engine_status(self, engine_id: str) -> dict[str, Any]:
        """The state, running and queued calls, tokens/s, KV usage and more; see `Monitor.engine`."""
        return Monitor(self.settings).engine(engine_id)

    def get_stats(self) -> dict[str, Any]:
        """Calls by state, hit rate, waiting and running times, and each engine's status under `engines`."""
        monitor = Monitor(self.settings)
        return {**monitor.stats(), "engines": {e["engine_id"]: e for e in monitor.engines()}}

    # -- internals

    async def _submit(
        self,
        session_id: str,
        prompt: Prompt,
        sampling_params: Mapping[str, Any] | None,
        priority: int,
        request_id: str | None,
        deadline: float | None,
        options: Mapping[str, Any],
    ) -> AsyncCall:
        given = {"timeout": deadline, **options, **(sampling_params or {})}
        return await self._get_client().submit(prompt, session=session_id, id=request_id, priority=priority, **given)

    def _get_client(self) -> AsyncClient:
        self._require_started("sending calls")
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._close_client()
            self._client, self._loop = AsyncClient(settings=self.settings), loop
        return self._client

    def _close_client(self) -> None:
        """Closes the client in its own loop. If that loop has ended, its client has ended too."""
        client, loop, self._client = self._client, self._loop, None
        if client is None or loop is None or not loop.is_running():
            return
        closing = asyncio.run_coroutine_threadsafe(client.close(), loop)
        if not _is_running_here(loop):  # inside that loop, waiting would block it; the client closes soon anyway
            with contextlib.suppress(TimeoutError):
                closing.result(_CLOSE_S)

    def _node(self, name: str) -> NodeClient:
        """A client for a node. Imported here, because it needs RQ from the extra [node]."""
        from rsm.workers.supervision.node import NodeClient

        return NodeClient(name, self.settings)

    def _require_started(self, what: str) -> None:
        if not self._started:
            raise RsmError(f"Call start() (or use `async with`) before {what}.")


def _is_running_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _retrieve_error(future: asyncio.Future[CallResult]) -> None:
    """Retrieves the error, so that a future that is never awaited logs nothing at exit. The call's record has it."""
    if not future.cancelled():
        future.exception()
