"""`EngineProcess`: a single engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from rsm.broker import CallHandle, Client, RsmError, Settings
from rsm.broker.protocol.models import CallResult
from rsm.engine.fleet import START_TIMEOUT_S, Fleet
from rsm.workers.config import EngineConfig


@dataclass(frozen=True, slots=True)
class LLMRequest:
    """A call for one engine. `prompt` is text or token ids."""

    request_id: str
    session_id: str
    prompt: str | list[int] = field(repr=False)
    sampling_params: dict[str, Any] = field(default_factory=dict, repr=False)
    priority: int = 0


class EngineProcess:
    """A single engine with its own fleet. Without `redis_url` it starts a private embedded Redis.

    Args:
        start_timeout: how long the engine may take to start, in seconds.
    """

    def __init__(
        self,
        config: EngineConfig,
        redis_url: str | None = None,
        *,
        settings: Settings | None = None,
        start_timeout: float = START_TIMEOUT_S,
    ) -> None:
        self.config = config
        self._fleet = Fleet((settings or Settings()).with_redis(redis_url))
        self._start_timeout = start_timeout
        self._client: Client | None = None
        self._ended: SimpleQueue[CallHandle] = SimpleQueue()

    def start(self) -> None:
        """Starts the engine; returns once it is READY. Raises EngineFailed if it does not start."""
        self._fleet.start([self.config], self._start_timeout)
        self._client = Client(settings=self._fleet.settings)

    def submit_request(self, request: LLMRequest) -> None:
        """Submits a call; `get_result` returns its result once it has ended.

        Raises:
            InvalidRequest, Conflict: see `rsm.broker.Client.submit`.
        """
        handle = self._started().submit(
            request.prompt,
            id=request.request_id,
            session=request.session_id,
            priority=request.priority,
            **request.sampling_params,
        )
        handle.add_done_callback(self._ended.put)

    def get_result(self, timeout: float | None = 1.0) -> CallResult | None:
        """The result of the next call that ended, in the order of their ends; None after `timeout` seconds.

        Raises:
            CallCancelled, CallFailed: that call ended without a result; both have its record.
        """
        try:
            return self._ended.get(timeout=timeout).result()
        except Empty:
            return None

    def cancel_request(self, request_id: str) -> bool:
        """Cancels a call; True if that took effect."""
        return self._started().cancel(request_id)

    def stop(self) -> None:
        """Drains and stops the engine. No process is left."""
        if self._client is not None:
            self._client.close()
            self._client = None
        self._fleet.stop()

    def __enter__(self) -> EngineProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _started(self) -> Client:
        if self._client is None:
            raise RsmError("Call start() before sending calls.")
        return self._client
