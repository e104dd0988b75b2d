"""What producers push, what Redis keeps, and what callers get back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rsm.broker.errors import BadRecord, RsmError
from rsm.broker.protocol import codec
from rsm.broker.protocol.ids import check_id, check_model

Kind = Literal["generate", "chat.completions", "completions", "embeddings"]
KINDS: tuple[str, ...] = get_args(Kind)
# What happens to a running call when its engine process dies: see `Client.submit`.
OnEngineLoss = Literal["continue", "restart", "fail"]
MAX_PROMPT_TOKENS = 100_000_000


class RequestState(StrEnum):
    """States of a call. The last three are terminal."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"

    @property
    def terminal(self) -> bool:
        return self not in (RequestState.PENDING, RequestState.RUNNING)


class ErrorCode(StrEnum):
    """The closed set of reasons why a call is FAILED."""

    INVALID_REQUEST = "invalid_request"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    OVERLOADED = "overloaded"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    ENGINE_ERROR = "engine_error"
    ENGINE_LOST = "engine_lost"
    NO_ENGINE_FOR_MODEL = "no_engine_for_model"
    CONFLICT = "conflict"


class EngineState(StrEnum):
    """States of an engine's registration."""

    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"
    DEAD = "DEAD"


class CallRequest(BaseModel):
    """The checked routing fields of a call. The body stays separate, as bytes: it can be megabytes and is sent once."""

    model_config = ConfigDict(frozen=True)

    id: str
    session: str
    kind: Kind = "generate"
    model: str = ""
    priority: int = Field(default=0, ge=-128, le=127)
    prompt_tokens: int = Field(default=0, ge=0, le=MAX_PROMPT_TOKENS)
    deadline_ms: int | None = Field(default=None, ge=0, le=1 << 52)
    stream: bool = False
    inbox: str = ""
    # Goes into a header unchanged.
    traceparent: str = Field(default="", max_length=256, pattern=r"^[!-~]*$")
    on_engine_loss: OnEngineLoss = "continue"
    parent_session: str = ""

    @field_validator("id", "session", "inbox", "parent_session")
    @classmethod
    def _ids(cls, value: str, info: Any) -> str:
        optional = info.field_name in ("inbox", "parent_session")
        return value if optional and not value else check_id(value, info.field_name)

    @field_validator("model")
    @classmethod
    def _model(cls, value: str) -> str:
        return check_model(value) if value else value

    def fields(self, remaining_ms: int | None = None) -> list[str | int]:
        """The routing fields in the order of submit.lua and accept.lua.

        Args:
            remaining_ms: the deadline as a time from now. Default: use `deadline_ms`.
        """
        deadline: str | int = "" if self.deadline_ms is None else self.deadline_ms
        return [
            self.id,
            self.session,
            self.kind,
            self.model,
            self.priority,
            self.prompt_tokens,
            deadline if remaining_ms is None else f"+{remaining_ms}",
            int(self.stream),
            self.inbox,
            self.traceparent,
            "" if self.on_engine_loss == "continue" else self.on_engine_loss,
            self.parent_session,
        ]


@dataclass(frozen=True, slots=True)
class CallResult:
    """The result of a call. Times are in seconds on Redis's clock. Token counts are the engine's own.

    `text` and `token_ids` are from the first choice. For OpenAI kinds, `response` is the whole response body.
    `latency` is the time from submit to finish, `waiting_time` from submit to claim, `ttft` from submit to first token.
    """

    request_id: str
    session_id: str
    engine_id: str
    text: str = field(repr=False)
    token_ids: list[int] = field(repr=False)
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    finish_reason: str
    latency: float
    waiting_time: float
    ttft: float | None
    attempts: int
    response: dict[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class CallRecord:
    """A call's record in Redis, without its body.

    Attributes:
        failures: how many attempts failed with an error.
        deaths: how many engine processes died while it ran. A death does not count if, at the time of the last one, it
            was known that another call had caused it.
        costs: the router's estimate of how long the call would take on each engine, in seconds, the chosen engine
            first. In a large fleet only the cheapest engines are listed. Empty if the policy estimates no costs.
        reuse: tokens of its prompt that should be in the cache of the chosen engine.
        stolen_from: the engines from whose queues it was moved to idle engines, in order.
    """

    request_id: str
    state: RequestState
    session_id: str
    kind: str = "generate"
    engine_id: str = ""
    model: str = ""
    attempt: int = 1
    failures: int = 0
    deaths: int = 0
    priority: int = 0
    level: int = 0
    stream: bool = False
    prompt_tokens: int = 0
    submitted_ms: int = 0
    assigned_ms: int | None = None
    started_ms: int | None = None
    finished_ms: int | None = None
    deadline_ms: int | None = None
    error_code: str = ""
    error: str = ""
    why: str = ""
    reuse: int = 0
    costs: Mapping[str, float] = field(default_factory=dict)
    stolen_from: tuple[str, ...] = ()
    cancel_requested: bool = False
    result: CallResult | None = None

    @classmethod
    def from_hash(cls, call_id: str, h: Mapping[bytes, bytes]) -> CallRecord:
        """Reads the hash `{ns}:call:ID`.

        Raises:
            BadRecord: it is not as the scripts write it. The message never quotes the hash.
        """
        try:
            return cls._from_hash(call_id, h)
        except (LookupError, ValueError, TypeError, ArithmeticError) as e:
            raise BadRecord(f"The record of call {call_id} cannot be read ({type(e).__name__}).") from None

    @classmethod
    def _from_hash(cls, call_id: str, h: Mapping[bytes, bytes]) -> CallRecord:
        """Runs for every result, so it reads each field once and copies nothing."""
        get = h.get

        def words(name: bytes) -> str:
            value = get(name)
            return value.decode("utf-8", "replace") if value else ""

        def whole(name: bytes) -> int:
            return int(get(name) or 0)

        def time_ms(name: bytes) -> int | None:
            value = get(name)
            return int(value) if value else None

        return cls(
            request_id=call_id,
            state=_STATES[h[b"state"]],
            session_id=words(b"session"),
            kind=words(b"kind"),
            engine_id=words(b"engine"),
            model=words(b"model"),
            attempt=int(get(b"attempt") or 1),
            failures=whole(b"failures"),
            deaths=len(words(b"deaths").split()),
            priority=whole(b"priority"),
            level=whole(b"level"),
            stream=get(b"stream") == b"1",
            prompt_tokens=whole(b"prompt_tokens"),
            submitted_ms=whole(b"submitted_ms"),
            assigned_ms=time_ms(b"assigned_ms"),
            started_ms=time_ms(b"started_ms"),
            finished_ms=time_ms(b"finished_ms"),
            deadline_ms=time_ms(b"deadline_ms"),
            error_code=words(b"error_code"),
            error=words(b"error"),
            why=words(b"why"),
            reuse=whole(b"reuse"),
            costs=_costs(words(b"costs")) if b"costs" in h else {},
            stolen_from=tuple(words(b"stolen_from").split()),
            cancel_requested=b"cancel" in h,
            result=_result(call_id, h),
        )

    def outcome(self) -> CallResult:
        """The result of a finished call.

        Raises:
            CallCancelled, CallFailed: it ended without a result.
        """
        if self.state is RequestState.COMPLETED and self.result is not None:
            return self.result
        raise self.ending()

    def ending(self) -> CallEnded:
        """The error for a call that ended without a result."""
        return CallCancelled(self) if self.state is RequestState.CANCELLED else CallFailed(self)


class CallEnded(RsmError):
    """A call reached a terminal state without a result.

    Attributes:
        record: the call's final record.
        partial_text: the text that the engine had produced until then; "" if none.
    """

    def __init__(self, record: CallRecord) -> None:
        self.record = record
        self.partial_text = record.result.text if record.result else ""
        super().__init__(record.error or f"Call {record.request_id} ended as {record.state}.")


class CallCancelled(CallEnded):
    """The call, or its whole session, was cancelled."""


class CallFailed(CallEnded):
    """The call failed. `error_code` says why; the message says what to do about it."""

    @property
    def error_code(self) -> str:
        return self.record.error_code


def _costs(words: str) -> dict[str, float]:
    """From `ENGINE=MS ENGINE=MS …` (router/cost_model.py)."""
    pairs = (word.partition("=") for word in words.split())
    return {engine: int(ms) / 1000 for engine, _, ms in pairs}


_STATES = {state.value.encode(): state for state in RequestState}
# An event with one of these states is the end of its call.
ENDS = frozenset(raw for raw, state in _STATES.items() if state.terminal)


def result_format(data: bytes) -> codec.Format:
    """The format of a result. A msgpack map never starts with a brace."""
    return "json" if data[:1] == b"{" else "body"


def _result(call_id: str, h: Mapping[bytes, bytes]) -> CallResult | None:
    data = h.get(b"result")
    if not data:
        return None
    r = codec.decode(data, result_format(data))
    _check_result(r)
    submitted, started, finished = (int(h.get(k) or 0) for k in (b"submitted_ms", b"started_ms", b"finished_ms"))
    ttft = r.get("ttft_ms")
    waiting = (started - submitted) / 1000 if started else 0.0
    return CallResult(
        request_id=call_id,
        session_id=h.get(b"session", b"").decode(),
        engine_id=h.get(b"engine", b"").decode(),
        text=r.get("text") or "",
        token_ids=r.get("token_ids") or [],
        prompt_tokens=int(h.get(b"prompt_tokens") or 0),
        completion_tokens=int(h.get(b"completion_tokens") or 0),
        cached_tokens=int(h.get(b"cached_tokens") or 0),
        finish_reason=r.get("finish_reason") or "",
        latency=(finished - submitted) / 1000,
        waiting_time=waiting,
        ttft=None if ttft is None else waiting + ttft / 1000,
        attempts=int(h.get(b"attempt") or 1),
        response=r.get("response"),
    )


def _check_result(r: Mapping[str, Any]) -> None:
    text, reason, ids, response = (r.get(name) for name in ("text", "finish_reason", "token_ids", "response"))
    texts = isinstance(text, str | None) and isinstance(reason, str | None)
    if not (texts and isinstance(ids, list | None) and isinstance(response, dict | None)):
        raise TypeError("a field of the result has the wrong type")


@dataclass(frozen=True, slots=True)
class Delta:
    """A chunk of a streamed call.

    OpenAI kinds have `chunks`, the JSON documents of the response stream; `generate` has `text` and `token_ids`.

    Attributes:
        n: the number of the chunk in its call, from 0, across attempts.
        event_id: the entry's id in the call's log. Pass it to `stream(last_event_id=…)` to resume after this chunk.
        restart: True = discard all chunks so far; the text starts again after this one. Happens only with
            `on_engine_loss="restart"`, or if Redis has lost chunks that were read, in a failover to a replica that
            lacked them (then n = -1).
    """

    n: int
    event_id: str
    text: str = field(default="", repr=False)
    token_ids: list[int] = field(default_factory=list, repr=False)
    chunks: list[str] = field(default_factory=list, repr=False)
    restart: bool = False
