"""The arguments and replies of the scripts, as records. broker/protocol/transitions.py has the commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal, NamedTuple

from rsm.broker.protocol.codec import Format
from rsm.broker.protocol.models import CallRequest, OnEngineLoss, RequestState


class Submission(NamedTuple):
    """A checked call with its encoded body: msgpack ("body") or JSON. Its result will have the same format.

    `until`: when its timeout ends, in seconds on this process's monotonic clock; None = no timeout.
    """

    request: CallRequest
    digest: str
    body: bytes
    body_field: Format = "body"
    until: float | None = None

    def fields(self) -> list[str | int]:
        """Its routing fields, with the remaining timeout."""
        return self.request.fields(None if self.until is None else max(0, round((self.until - monotonic()) * 1000)))

    def __repr__(self) -> str:  # prompts and outputs never appear in a repr
        return f"Submission({self.request!r}, {len(self.body)} bytes)"


class Submitted(NamedTuple):
    code: str  # "new" | "duplicate" | "conflict" | "overloaded" | "invalid"
    state: RequestState | None  # None if overloaded or invalid: there is no record
    bound: str = ""  # which limit was reached (overload.lua)
    retry_ms: int = 0  # when to try again; 0 = never, because its deadline has passed
    error: str = ""  # why it is invalid

    @property
    def ended(self) -> bool:
        return self.state is not None and self.state.terminal


class SessionCancel(NamedTuple):
    """One round of the cancel of a session."""

    cursor: str  # "0" = done
    ended: int  # calls ended or flagged
    children: tuple[str, ...] = ()  # sessions whose calls are to be cancelled, too


class RawCall(NamedTuple):
    """A checked call that a bare XADD pushed. Its body stays in Redis, in the entry's field `body_field`."""

    entry: str
    request: CallRequest
    digest: str
    body_field: Format


class Rejection(NamedTuple):
    entry: str
    call_id: str
    gen: str
    session: str
    inbox: str
    error_code: str
    error: str


class Placement(NamedTuple):
    """Where the router puts a call. `engine=""` parks it until an engine of its model is ready.

    Attributes:
        reuse: tokens of its prompt that the engine should find in its cache.
        costs: how long the call would take on each engine, as text for its record (`costs_text`).
        throttle: True if no engine has KV headroom for it.
        context: tokens of KV that it will hold; 0 without admission.
        new: the part of `context` that no other call of its session holds on that engine.
    """

    entry: str
    call_id: str
    gen: str
    engine: str
    bind: bool
    seen: str
    hit: bool | None
    why: str
    reuse: int = 0
    costs: str = ""
    throttle: bool = False
    context: int = 0
    new: int = 0


class Placed(NamedTuple):
    code: str  # see assign.lua
    engine: str


@dataclass(frozen=True, slots=True)
class Fence:
    """Identifies one attempt of one call. Publishing or finishing with an old fence changes nothing."""

    call_id: str
    gen: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.gen}:{self.attempt}"


@dataclass(frozen=True, slots=True)
class Claimed:
    """A call that a worker has taken.

    Attributes:
        events: how many events earlier attempts have published; those before number `begins` are void.
        left_ms: the time from the claim to its deadline, on Redis's clock; None = no deadline.
        program: the session that is charged for it: its own session or an ancestor.
        inherited: the program's service when the call was assigned, in service units.
        waited_ms: the program's wait that no promotion has paid for yet (programs.lua), including this call's wait.
        ran_ms: the program's run time that no promotion has paid for yet.
        reuse: tokens of its prompt that should be in this engine's cache, as the router estimated.
    """

    fence: Fence
    session: str
    kind: str
    stream: bool
    inbox: str
    priority: int
    level: int
    events: int
    traceparent: str
    prompt_tokens: int
    body_field: Format
    body: bytes = field(repr=False)
    cancelled: bool = False
    on_engine_loss: OnEngineLoss = "continue"
    begins: int = 0
    left_ms: int | None = None
    program: str = ""
    inherited: int = 0
    waited_ms: int = 0
    ran_ms: int = 0
    reuse: int = 0


class Event(NamedTuple):
    """An event of a streamed call. OpenAI kinds use `chunk`; `generate` uses `text` and `token_ids`."""

    fence: Fence
    n: int
    text: str
    token_ids: Sequence[int]
    chunk: str
    replay: str

    def __repr__(self) -> str:
        return f"Event({self.fence}, n={self.n})"


class Finish(NamedTuple):
    fence: Fence
    state: RequestState
    error_code: str
    error: str
    result: bytes
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    resident_tokens: int
    events: int | None = None  # how many were published for the call, including earlier attempts
    service: int = 0  # what the call cost, in the deployment's service unit

    def __repr__(self) -> str:
        return f"Finish({self.fence}, {self.state}, {self.error_code!r})"


# Why an attempt ended: its engine's process died, the engine failed on the call, or "": the worker gave the call back.
Fault = Literal["death", "error", ""]


class Release(NamedTuple):
    fence: Fence
    fault: Fault
    error_code: str
    error: str

    def __repr__(self) -> str:  # the error may come from a remote server, and quote the prompt
        return f"Release({self.fence}, {self.fault!r}, {self.error_code!r})"


class Registered(NamedTuple):
    ok: bool
    control_from: str = "0-0"
    heartbeat_ms: int = 0
    node: str = ""
    pid: str = ""


class Differences(NamedTuple):
    """The differences between a worker's calls and Redis's records of them."""

    lost: list[Fence]  # the worker has them, but according to Redis they do not run on it
    unknown: list[Fence]  # according to Redis they run on the worker, but it does not have them


class Reaped(NamedTuple):
    moved: int
    engines: list[str]


class Retained(NamedTuple):
    entries: int  # removed from the index of finished calls
    early: int  # calls whose records were removed before their TTL
