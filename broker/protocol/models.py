"""Messages and records: what producers push, what Redis keeps, and what callers get back."""

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
# What becomes of a call whose engine process is lost under it: see `Client.submit`.
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
    """Routing fields of a call, checked. The body stays bytes: it can be megabytes and travels once."""

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
    # Goes into a header as it is.
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
            remaining_ms: the deadline as a time from now; None = `deadline_ms`.
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
    """The result of a call. Times in seconds on Redis's clock; token counts are the engine's own.

    `text` and `token_ids` are those of the first choice. For OpenAI kinds, `response` is the whole response body.
    `latency` is from submit to finish, `waiting_time` from submit to the claim, `ttft` from submit to the first token.
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
    """A call as Redis keeps it, without its body.

    Attributes:
        failures: how many attempts were lost to errors.
        deaths: how many engine processes died while it ran. Deaths that another call was known to have caused when the
            last one happened do not count.
        costs: the router's estimate of the time that it would take on each engine, in seconds, the chosen engine first.
            In a large fleet only the cheapest are listed. Empty if the policy estimates no costs.
        reuse: tokens of its prompt that it should find in the cache there.
        stolen_from: the engines from whose queues it was moved to idle ones, in order.
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
            BadRecord: it is not as the scripts write it. The message never quotes it.
        """
        try:
            return cls._from_hash(call_id, h)
        except (LookupError, ValueError, TypeError, ArithmeticError) as e:
            raise BadRecord(f"The record of call {call_id} cannot be read ({type(e).__name__}).") from None

    @classmethod
    def _from_hash(cls, call_id: str, h: Mapping[bytes, bytes]) -> CallRecord:
        """Every result goes through here, so it reads each field once and copies nothing."""
        get = h.get

        def words(name: bytes) -> str:
            value = get(name)
            return value.decode("utf-8", "replace") if value else ""

        def whole(name: bytes) -> int:
            return int(get(name) or 0)

        def moment(name: bytes) -> int | None:
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
            assigned_ms=moment(b"assigned_ms"),
            started_ms=moment(b"started_ms"),
            finished_ms=moment(b"finished_ms"),
            deadline_ms=moment(b"deadline_ms"),
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
            CallCancelled, CallFailed: it ended without one.
        """
        if self.state is RequestState.COMPLETED and self.result is not None:
            return self.result
        raise self.ending()

    def ending(self) -> CallEnded:
        """The error that says how the call ended."""
        return CallCancelled(self) if self.state is RequestState.CANCELLED else CallFailed(self)


class CallEnded(RsmError):
    """A call reached a terminal state without a result.

    Attributes:
        record: the call's record at its end.
        partial_text: what the engine had produced by then, "" if nothing.
    """

    def __init__(self, record: CallRecord) -> None:
        self.record = record
        self.partial_text = record.result.text if record.result else ""
        super().__init__(record.error or f"Call {record.request_id} ended as {record.state}.")


class CallCancelled(CallEnded):
    """The call, or its whole session, was cancelled."""


class CallFailed(CallEnded):
    """The call failed. `error_code` says why, the message what to do about it."""

    @property
    def error_code(self) -> str:
        return self.record.error_code


def _costs(words: str) -> dict[str, float]:
    """From `ENGINE=MS ENGINE=MS …` (router/cost_model.py)."""
    pairs = (word.partition("=") for word in words.split())
    return {engine: int(ms) / 1000 for engine, _, ms in pairs}


_STATES = {state.value.encode(): state for state in RequestState}
# The states that mark an event as an end.
ENDS = frozenset(raw for raw, state in _STATES.items() if state.terminal)


def result_format(data: bytes) -> codec.Format:
    """A result is JSON if the body was. A msgpack map never begins with a brace."""
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
    said, why, ids, response = (r.get(name) for name in ("text", "finish_reason", "token_ids", "response"))
    texts = isinstance(said, str | None) and isinstance(why, str | None)
    if not (texts and isinstance(ids, list | None) and isinstance(response, dict | None)):
        raise TypeError("a field of the result is of another type")


@dataclass(frozen=True, slots=True)
class Delta:
    """A chunk of a streamed call.

    OpenAI kinds carry `chunks`, the JSON documents of the response stream; `generate` carries `text` and `token_ids`.

    Attributes:
        n: numbers the chunks of a call from 0, across attempts.
        event_id: the entry's id in the call's log. Give it to `stream(last_event_id=…)` to resume after this chunk.
        restart: forget the chunks so far: the text starts again after this one. Happens with `on_engine_loss="restart"`
            only, or if Redis has lost chunks that were read, in a failover to a replica that lacked them (then n = -1).
    """

    n: int
    event_id: str
    text: str = field(default="", repr=False)
    token_ids: list[int] = field(default_factory=list, repr=False)
    chunks: list[str] = field(default_factory=list, repr=False)
    restart: bool = False
