"""The interface between a worker and its engine, which is vLLM, a remote server or a modelled engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rsm.broker.protocol.models import OnEngineLoss
from rsm.broker.protocol.snapshot import Speed


class CallRejected(Exception):
    """The engine can never run this call; the message says what to change. It ends as FAILED `invalid_request`."""


class EngineError(Exception):
    """This attempt failed in the engine; another attempt may succeed."""


class EngineDied(Exception):
    """The engine has died, with every call that it was running."""


class EngineMisconfigured(EngineDied):
    """The engine can never start with this configuration; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """What earlier attempts of a streamed call have published. It must not be published again.

    Attributes:
        text: all text published, for `generate`.
        token_ids: all token ids published, for `generate`.
        replays: the `replay` of each event in order, for the OpenAI kinds.
        chunks: how many chunks were published, for the OpenAI kinds.
        published: those chunks.
    """

    text: str = field(repr=False)
    token_ids: list[int] = field(repr=False)
    replays: list[str] = field(repr=False)
    chunks: int
    published: list[str] = field(default_factory=list, repr=False)


@dataclass(frozen=True, slots=True)
class Job:
    """A claimed call, decoded. `key` is unique among the engine's running calls: id and fence.

    `program`, `inherited`, `waited_ms` and `ran_ms` are for a program-aware scheduler, as in `Claimed`.
    """

    key: str
    call_id: str
    session: str
    kind: str
    body: dict[str, Any] = field(repr=False)  # prompts never appear in a repr or a log
    stream: bool = False
    priority: int = 0
    level: int = 0
    traceparent: str = ""
    resumed: Resumed | None = None
    on_engine_loss: OnEngineLoss = "continue"
    program: str = ""
    inherited: int = 0
    waited_ms: int = 0
    ran_ms: int = 0


@dataclass(slots=True)
class Chunk:
    """New output of a streamed call: text and token_ids for `generate`, one JSON document for the OpenAI kinds.

    Attributes:
        replay: opaque text. If this attempt is lost, the next one gets it in `Resumed.replays`.
    """

    text: str = field(default="", repr=False)
    token_ids: list[int] = field(default_factory=list, repr=False)
    document: str = field(default="", repr=False)
    replay: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended in the engine. `finish_reason="abort"`: it was stopped, and the output is partial.

    `cached_tokens`: prompt tokens found in the cache. `response`: the whole response body of an OpenAI kind.
    `running_ms`: how long it was in the engine's batch; None if the engine does not report it.
    """

    finish_reason: str
    text: str = field(default="", repr=False)
    token_ids: list[int] = field(default_factory=list, repr=False)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    ttft_ms: float | None = None
    response: dict[str, Any] | None = field(default=None, repr=False)
    running_ms: float | None = None


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine reports once it has started. `kv_tokens`: the capacity of its KV cache, 0 = unknown."""

    model: str
    max_num_seqs: int
    kv_tokens: int = 0
    version: str = ""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The current load of an engine. `kv_usage` is a share from 0 to 1.

    `speed`: measured from its steps; None if it does not report them or has not worked yet.
    """

    kv_usage: float = 0.0
    tokens_per_s: float = 0.0
    speed: Speed | None = None


class Backend(ABC):
    """One engine. All methods but `preemption_threshold` run in the worker's event loop."""

    @abstractmethod
    async def start(self) -> EngineFacts:
        """Starts the engine; returns once it can run calls.

        Raises:
            EngineDied: it cannot start; the message says why.
            EngineMisconfigured: it can never start with this configuration.
        """

    @abstractmethod
    async def run(self, job: Job, emit: Callable[[Chunk], None]) -> Outcome:
        """Runs one call to its end. Passes each chunk of a streamed call to `emit`, which never blocks.

        Raises:
            CallRejected, EngineError, EngineDied: see there.
        """

    @abstractmethod
    def abort(self, key: str) -> None:
        """Stops a job: its `run` returns soon, with finish_reason "abort". Unknown keys are ignored."""

    @abstractmethod
    def load(self) -> EngineLoad:
        """How busy the engine is."""

    def progress(self) -> int | None:
        """A number that changes as the engine works, also on prompts and on calls that do not stream.

        None: not measured, because this backend itself detects an engine that hangs.
        """
        return None

    def preemption_threshold(self) -> tuple[int, int] | None:
        """The class and level that a waiting call must beat now to displace a running one.

        None: the engine does not preempt. The only method that is called from another thread.
        """
        return None

    @abstractmethod
    async def died(self) -> str:
        """Waits until the engine dies; returns the reason."""

    @abstractmethod
    async def stop(self, grace_s: float) -> None:
        """Stops the engine, with all of its processes."""


class Refused(Backend):
    """Stands in for an engine whose configuration is wrong: the worker reports the reason and exits."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def start(self) -> EngineFacts:
        raise EngineMisconfigured(self._reason)

    async def run(self, job: Job, emit: Callable[[Chunk], None]) -> Outcome:
        raise EngineDied(self._reason)

    def abort(self, key: str) -> None:
        """There are no calls."""

    def load(self) -> EngineLoad:
        return EngineLoad()

    async def died(self) -> str:
        return self._reason

    async def stop(self, grace_s: float) -> None:
        """There is nothing to stop."""
